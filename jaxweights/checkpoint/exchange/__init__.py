"""Quantized checkpoints as other programs read them, written from represented weights."""

from jaxweights.checkpoint.exchange._module import LazyWeight as LazyWeight
from jaxweights.checkpoint.exchange._write import write_quantized as write_quantized

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
