"""Calibrated transforms of checkpoints that do not fit in memory: one block of layers at a time."""

from jaxweights.recipes.onload._transform import transform_in_blocks as transform_in_blocks

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
