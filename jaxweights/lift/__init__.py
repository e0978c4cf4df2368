"""lift: any JAX function on represented weights."""

from jaxweights.lift._infer_layout import infer_layout as infer_layout
from jaxweights.lift._lift import lift as lift

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
