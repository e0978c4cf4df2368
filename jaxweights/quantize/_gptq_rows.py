"""The loop of GPTQ: rows one after another, made to make up for what earlier ones lost."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core._lapack import solve_unit_lower
from jaxweights.quantize._damped_factor import Factor
from jaxweights.quantize._gptq_levels import Levels

# Rows that hand their changes to each other one by one, before a product hands them on: so few that
# they stay in cache, so many that the product is worth its name.
_AT_ONCE = 8

_matmul = functools.partial(jnp.matmul, precision="highest")
_slice = jax.lax.dynamic_slice_in_dim
_put = jax.lax.dynamic_update_slice_in_dim


class RowScales(NamedTuple):
    """Scales, and which of them each row reads.

    Attributes:
      scale: `(rows, cols)`; every scale serves `out / cols` neighbouring columns.
      zero_point: Likewise, uint8, or None.
      of_row: Row of `scale` that each row of the matrix reads, `(in,)`.
    """

    scale: jax.Array
    zero_point: jax.Array | None
    of_row: jax.Array

    @classmethod
    def unset(cls, rows: int, cols: int, of_row: jax.Array, levels: Levels) -> RowScales:
        """Scales still to be found."""
        zero = jnp.zeros((rows, cols), jnp.uint8) if levels.has_zero_point else None
        return cls(jnp.ones((rows, cols), levels.scale_dtype), zero, of_row)

    def at(self, start: jax.Array, size: int) -> RowScales:
        """The scales that `size` rows of the matrix read, one row each."""
        rows = _slice(self.of_row, start, size)
        zero = None if self.zero_point is None else self.zero_point[rows]
        return RowScales(self.scale[rows], zero, jnp.arange(size))

    def put(self, row: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> RowScales:
        """With other scales `(1, cols)` in one row."""
        zero = self.zero_point
        if zero is not None and zero_point is not None:
            zero = _put(zero, zero_point, row, axis=0)
        return self._replace(scale=_put(self.scale, scale, row, axis=0), zero_point=zero)

    def row(self, i: jax.Array, out_dim: int) -> tuple[jax.Array, jax.Array | None]:
        """One row of the scales and of the zero points, `(out,)`."""
        zero = None if self.zero_point is None else _widen(self.zero_point[i], out_dim)
        return _widen(self.scale[i], out_dim), zero


def quantize_rows(
    weight: jax.Array,
    factor: Factor,
    scales: RowScales,
    levels: Levels,
    *,
    moving: int | None,
    per_row: bool = False,
    stale: bool = False,
    block_size: int = 128,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, RowScales, jax.Array]:
    r"""Rounds rows in order, each to where it makes up best for the changes of the rows before it.

    Row i is not rounded itself but :math:`r_i = w_i + \sum_{j<i} S_{ij} D_j`, D being the changes
    so far: the level nearest to it leaves the least of row i of the loss (see `Factor`). A block of
    rows gets the changes of all blocks before it by products of blocks, and within the block a few
    rows at a time do the same. Nothing of the weight's size is rewritten.

    Args:
      weight: `(in, out)` float32, in the order in which rows are visited.
      factor: Of the Gram matrix, in the same order.
      scales: All scales; those that are still to be found are overwritten.
      levels: What is rounded to.
      moving: Rows of a group, where a group's scales are found when its first row is reached.
      per_row: Whether each row has scales of its own, found when it is reached.
      stale: Whether moving groups are read from rows that lack the changes of their own block.
      block_size: Rows of a block, about.
      mask: Bool like `weight`; False makes a code that stands for zero.

    Returns:
      Codes `(in, out)`, the scales, and the loss, float32, `(out,)`.
    """
    in_dim, out_dim = weight.shape
    block, few = _block_sizes(in_dim, moving, block_size)
    padding = -in_dim % block
    groups = scales.scale.shape[0]
    # Rows of zeros that nothing is handed to or on take no part.
    weight = jnp.pad(weight, ((0, padding), (0, 0)))
    mask = None if mask is None else jnp.pad(mask, ((0, padding), (0, 0)))
    spread = jnp.pad(factor.spread, (0, padding))
    diagonal = jnp.pad(factor.diagonal, (0, padding))
    scales = _pad_scales(scales, padding, moving, per_row=per_row)
    ahead = _looking_ahead(spread, block if stale or moving is None else moving)

    def kept(rows: jax.Array, at: jax.Array) -> jax.Array:
        return rows if mask is None else jnp.where(_slice(mask, at, rows.shape[0]), rows, 0)

    def block_step(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
        changes, scales, loss = carry
        original = _slice(weight, start, block)
        weights = _slice(spread, start, block)

        def hand_on(b: jax.Array, rows: jax.Array) -> jax.Array:
            at = b * block
            return rows + _matmul(_slice(weights, at, block, axis=1), _slice(changes, at, block))

        rows = jax.lax.fori_loop(0, start // block, hand_on, original)
        inside = _slice(weights, start, block, axis=1)

        received = rows - original

        def find_group(at: jax.Array, changed: jax.Array | None, scales: RowScales) -> RowScales:
            assert moving is not None
            if stale:  # the whole block looks ahead, before any of its rows is changed
                weights = _slice(ahead[start // block], at, moving)
                group = _matmul(weights, received)
            else:
                given = _slice(received, at, moving)
                if changed is not None:
                    given = given + _matmul(_slice(inside, at, moving), changed)
                group = _matmul(ahead[(start + at) // moving], given)
            group = group + _slice(original, at, moving)
            scale, zero = levels.find(kept(group, start + at)[None])
            number = scales.of_row[start + at]
            return scales.put(number, scale[0], None if zero is None else zero[0])

        if moving == block:
            scales = find_group(jnp.int32(0), None, scales)

        def few_step(m: jax.Array, state: Any) -> Any:
            changed, codes, scales, loss = state
            at = m * few
            if moving is not None and moving != block:
                found = lambda old: find_group(at, changed, old)  # noqa: E731
                scales = jax.lax.cond(at % moving == 0, found, lambda old: old, scales)
            weights = _slice(inside, at, few)
            now = _few_rows(
                _slice(rows, at, few) + _matmul(weights, changed),
                _slice(original, at, few),
                _slice(weights, at, few, axis=1),
                scales.at(start + at, few),
                levels,
                None if mask is None else _slice(mask, start + at, few),
                per_row=per_row,
            )
            if per_row:
                for i in range(few):
                    pick = lambda x, i=i: None if x is None else x[i : i + 1]  # noqa: E731
                    number = scales.of_row[start + at + i]
                    scales = scales.put(
                        number, now.scales.scale[i : i + 1], pick(now.scales.zero_point)
                    )
            lost = now.missed * _slice(diagonal, start + at, few)[:, None]
            return (
                _put(changed, now.changes, at, axis=0),
                _put(codes, now.codes, at, axis=0),
                scales,
                loss + jnp.sum(lost * lost, axis=0),
            )

        state = (jnp.zeros_like(rows), jnp.zeros(rows.shape, levels.code_dtype), scales, loss)
        changed, codes, scales, loss = jax.lax.fori_loop(0, block // few, few_step, state)
        return (_put(changes, changed, start, axis=0), scales, loss), codes

    (_, scales, loss), codes = jax.lax.scan(
        block_step,
        (jnp.zeros_like(weight), scales, jnp.zeros(out_dim)),
        jnp.arange(0, in_dim + padding, block),
    )
    scales = RowScales(
        scales.scale[:groups],
        None if scales.zero_point is None else scales.zero_point[:groups],
        scales.of_row[:in_dim],
    )
    return codes.reshape(-1, out_dim)[:in_dim], scales, loss


class _Few(NamedTuple):
    """What becomes of a few rows."""

    codes: jax.Array
    changes: jax.Array  # what the weight is more than the levels of its codes
    missed: jax.Array  # the same of what was rounded
    scales: RowScales


def _few_rows(
    rows: jax.Array,
    original: jax.Array,
    spread: jax.Array,
    scales: RowScales,
    levels: Levels,
    mask: jax.Array | None,
    *,
    per_row: bool,
) -> _Few:
    """Rounds a few rows that already carry the changes of all rows before them."""
    few, out_dim = rows.shape
    # Rows that are done, and each row itself, get nothing.
    spread = jnp.tril(spread, -1)

    def row_step(i: jax.Array, state: Any) -> Any:
        rows, codes, scales = state
        row = jax.lax.dynamic_index_in_dim(rows, i, 0, keepdims=False)
        row = row if mask is None else jnp.where(mask[i], row, 0)
        if per_row:
            cols = scales.scale.shape[1]
            scale, zero = levels.find(row.reshape(cols, out_dim // cols).T[None])
            scales = scales.put(i, scale[0], None if zero is None else zero[0])
        scale, zero = scales.row(i, out_dim)
        # Read back from where they are put: so no row of numbers is computed twice.
        codes = _put(codes, levels.encode(row, scale, zero)[None], i, axis=0)
        at = lambda x, axis=0: jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)  # noqa: E731
        change = at(original) - levels.decode(at(codes), scale, zero)
        return rows + at(spread, 1)[:, None] * change[None], codes, scales

    start = rows, jnp.zeros(rows.shape, levels.code_dtype), scales
    # A loop, not its steps written out: fused, they would no longer be vectorised. Its counter has
    # no sign and rows are put, not scattered: each check of an index is a launch of its own on CPU.
    rows, codes, scales = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(few), row_step, start)
    scale = _widen(scales.scale, out_dim)
    zero = None if scales.zero_point is None else _widen(scales.zero_point, out_dim)
    values = levels.decode(codes, scale, zero)
    return _Few(codes, original - values, rows - values, scales)


def _looking_ahead(spread: jax.Array, size: int) -> jax.Array:
    """What turns the changes that a group of rows has received into what its rows will become.

    Row i is rounded from what it received, and from what the group's rows before it hand on. Where
    nothing is rounded, that all of them make up for what they received, D_i = -(received_i +
    sum_{j<i} S_ij D_j), solves a triangular system.

    Args:
      spread: S, `(in, in)`.
      size: Rows of a group; divides `in`.

    Returns:
      Inverses of the diagonal blocks of S, `(in / size, size, size)`.
    """
    count = spread.shape[0] // size
    at = jnp.arange(count)
    blocks = spread.reshape(count, size, count, size)[at, :, at]
    identity = jnp.broadcast_to(jnp.eye(size), blocks.shape)
    with jax.default_matmul_precision("highest"):
        return solve_unit_lower(blocks, identity)


def _widen(field: jax.Array, out_dim: int) -> jax.Array:
    """`(..., cols)` scales as `(..., out)`, or `(..., 1)` where one serves all."""
    cols = field.shape[-1]
    return field if cols in (1, out_dim) else jnp.repeat(field, out_dim // cols, axis=-1)


def _block_sizes(in_dim: int, group: int | None, block_size: int) -> tuple[int, int]:
    """Rows of a block, which holds whole groups, and of the few at once, which divide a group."""
    if group is None:
        block = unit = min(block_size, -(-in_dim // _AT_ONCE) * _AT_ONCE)
    else:
        block, unit = group * max(1, block_size // group), group
    return block, max(d for d in range(1, min(_AT_ONCE, unit) + 1) if unit % d == 0)


def _pad_scales(scales: RowScales, padding: int, group: int | None, *, per_row: bool) -> RowScales:
    """Scales for the rows of padding: of their own where scales are still found, else any."""
    if not padding:
        return scales
    scale, zero, of_row = scales
    if group is None and not per_row:
        return scales._replace(of_row=jnp.pad(of_row, (0, padding)))
    rows, each, in_dim = scale.shape[0], group or 1, of_row.shape[0]
    new_rows = ((0, (in_dim + padding) // each - rows), (0, 0))
    zero = None if zero is None else jnp.pad(zero, new_rows)
    padded = (in_dim + jnp.arange(padding)) // each  # the first complete a last group that is short
    return RowScales(jnp.pad(scale, new_rows), zero, jnp.concatenate([of_row, padded]))
