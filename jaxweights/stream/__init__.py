"""Transforms checkpoints that do not fit in memory, at the speed of the disk."""

from jaxweights.stream._checkpoint import transform_checkpoint as transform_checkpoint
from jaxweights.stream._run import Streamed as Streamed

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
