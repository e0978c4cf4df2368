"""Blocks: which entries of a matrix share a scale, and the largest magnitude of each block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxweights.quantize._extremes import largest_magnitude
from jaxweights.quantize._grid import Pad
from jaxweights.quantize._settings import is_whole, is_word
from jaxweights.weights._divide import divide
from jaxweights.weights._scaled import combine

_SLICES = 64

# Input rows of one output, all rows of an output, the whole matrix, or a tile (rows, columns).
Block = int | Literal["tensor"] | tuple[int, int] | None


def check_block(asker: str, block: Any) -> None:
    """Refuses what is no block size.

    Raises:
      TypeError: If it is of the wrong kind.
      ValueError: If a length is below 1.
    """
    if block is None or is_word(block, ["tensor"]):
        return
    sizes = block if isinstance(block, tuple) else (block,)
    if not all(map(is_whole, sizes)) or (isinstance(block, tuple) and len(block) != 2):
        raise TypeError(
            f"{asker}: group_size={block!r} must be an integer, None (one scale per output), "
            "'tensor' (one scale per matrix) or a pair (rows, columns) of a tile."
        )
    if min(sizes) < 1:
        raise ValueError(
            f"{asker}: group_size={block} must be at least 1. None gives one scale per output."
        )


def unfit_block(
    block: Block, in_dim: int, out_dim: int, *, word: str | None = None, pads: bool = False
) -> str | None:
    """What is wrong with a block size for a matrix, if anything.

    Args:
      block: The block size.
      in_dim: Rows of the matrix.
      out_dim: Columns of the matrix.
      word: What errors call the block size.
      pads: Whether the caller has a setting `pad` to name as a remedy.
    """
    if block is None or block == "tensor":
        return None
    rows, columns = block if isinstance(block, tuple) else (block, 1)
    for size, length, axis in ((rows, in_dim, "input"), (columns, out_dim, "output")):
        if length % size:
            remedy = "L" if word else _smaller(length, size, pads=pads)
            return (
                f"{word or f'group_size={block}'} does not divide the {axis} axis, which has "
                f"length {length}. {remedy}eave this weight out with `partition`."
            )
    return None


def refuse_unfit(asker: str, block: Block, shape: tuple[int, ...], *, pads: bool = False) -> None:
    """Refuses a block size that does not divide a matrix of this shape; `pads` as `unfit_block`.

    Raises:
      ValueError: If it does not.
    """
    if problem := unfit_block(block, *shape, pads=pads):
        raise ValueError(f"{asker}: {problem}")


def fit_block(
    asker: str, block: Block, pad: Pad | None, shape: tuple[int, ...]
) -> tuple[Block, int]:
    """The block size for a matrix of this shape, whose last group may be shorter with `pad`.

    Returns:
      The size with which rows are cut, once `fill_up_group` filled up the last group; and
      `full_group` as in `Scaled`.

    Raises:
      ValueError: If the block size does not divide the shape, and the caller was not told to pad.
    """
    if pad is None:
        refuse_unfit(asker, block, shape, pads=True)
        return block, 0
    size = int(block)  # type: ignore[arg-type]  # `check_pad` refused all but whole numbers
    if size >= shape[0]:
        return None, 0
    return size, size if shape[0] % size else 0


def fill_up_group(weight: jax.Array, full_group: int) -> jax.Array:
    """An `(in, out)` matrix with rows of zeros behind a shorter last group, if there is one."""
    missing = -len(weight) % full_group if full_group else 0
    return jnp.pad(weight, ((0, missing), (0, 0))) if missing else weight


def _smaller(length: int, size: int, *, pads: bool) -> str:
    padded = ", fill up the last group by pad='zero'" if pads else ""
    divisors = [d for d in range(1, min(length, size) + 1) if length % d == 0]
    return f"Choose one of {', '.join(map(str, divisors))}{padded}, or l"


def block_counts(block: Block, in_dim: int, out_dim: int) -> tuple[int, int]:
    """Rows and columns of the scales of an `(in_dim, out_dim)` matrix."""
    if block is None:
        return 1, out_dim
    if block == "tensor":
        return 1, 1
    rows, columns = block if isinstance(block, tuple) else (block, 1)
    return in_dim // rows, out_dim // columns


def block_max(weight: jax.Array, counts: tuple[int, int]) -> jax.Array:
    """Largest magnitude of each block of a float32 `(in, out)` matrix, NaN where one is NaN.

    Args:
      weight: The matrix.
      counts: Rows and columns of blocks.

    Returns:
      The magnitudes, of the shape `counts`.
    """
    (rows, cols), (in_dim, out_dim) = counts, weight.shape
    if weight.size == 0:
        return jnp.zeros(counts)
    folded = largest_magnitude(weight.reshape(rows, in_dim // rows, out_dim))
    if cols < out_dim:
        folded = largest_magnitude(folded.reshape(rows * cols, out_dim // cols, 1))
    return jnp.abs(folded.reshape(counts))


def in_units(weight: jax.Array, scale: jax.Array) -> jax.Array:
    """Every entry of a float32 `(in, out)` matrix, divided by the scale of its block."""
    return combine(weight, scale.astype(jnp.float32), divide)


def add_up(groups: jax.Array, measure: Callable[[jax.Array], Any]) -> Any:
    """Adds up what a function makes of slices of `(rows, group, out)` along the middle axis.

    XLA on CPU stores what it reduces. Slice after slice, what it stores stays in the cache, and a
    search takes no memory to speak of. Every slice has entries of all groups, so that no sharded
    matrix is gathered.

    Args:
      groups: The entries.
      measure: From `(rows, some, out)` to a pytree of arrays.

    Returns:
      The sum of the pytrees.
    """
    rows, size, out_dim = groups.shape
    count = max((d for d in range(1, min(size, _SLICES) + 1) if size % d == 0), default=1)
    slices = groups.reshape(rows, size // count, count, out_dim)
    at = lambda i: measure(jax.lax.dynamic_index_in_dim(slices, i, axis=2, keepdims=False))  # noqa: E731
    add = lambda i, total: jax.tree.map(jnp.add, total, at(i))  # noqa: E731
    return jax.lax.fori_loop(1, count, add, at(0))
