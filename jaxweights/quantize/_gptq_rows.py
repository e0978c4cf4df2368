"""The loop of GPTQ: rows one after another, their errors spread in blocks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.quantize._grid import Grid, decode, encode, find_scale

# Rows whose errors are gathered before they are spread over the rest of their block: enough to make
# that a product worth its name, few enough that a row's own update stays in cache.
_SUBBLOCK = 32

_matmul = functools.partial(jnp.matmul, precision="highest")
_slice = jax.lax.dynamic_slice_in_dim
_put = jax.lax.dynamic_update_slice_in_dim


class RowScales(NamedTuple):
    """Scales, and which of them each row reads.

    Attributes:
      scale: `(rows, cols)`.
      zero_point: Likewise, uint8, or None.
      of_row: Row of `scale` that each row of the matrix reads, `(in,)`.
    """

    scale: jax.Array
    zero_point: jax.Array | None
    of_row: jax.Array

    @classmethod
    def unset(cls, rows: int, cols: int, of_row: jax.Array, grid: Grid) -> RowScales:
        """Scales still to be found."""
        zero = jnp.zeros((rows, cols), jnp.uint8) if grid.unsigned else None
        return cls(jnp.ones((rows, cols), grid.scale_dtype), zero, of_row)

    def at(self, i: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point of the i-th row of the matrix, `(cols,)`."""
        row = self.of_row[i]
        return self.scale[row], None if self.zero_point is None else self.zero_point[row]

    def found(self, group: jax.Array, values: jax.Array, grid: Grid) -> RowScales:
        """With one group's scales found from its `(group, out)` values."""
        new = find_scale(values[None], grid)  # each (1, 1, out), or None
        put = lambda old, x: None if x is None else _put(old, x[0], group, axis=0)  # noqa: E731
        return self._replace(scale=put(self.scale, new[0]), zero_point=put(self.zero_point, new[1]))


def quantize_rows(
    weight: jax.Array,
    factor: jax.Array,
    scales: RowScales,
    grid: Grid,
    *,
    moving: int | None,
    stale: bool,
    block_size: int,
    mask: jax.Array | None,
) -> tuple[jax.Array, RowScales, jax.Array]:
    r"""Rounds rows in order, correcting later ones for the errors of earlier ones.

    Looks backwards: a block of rows receives the errors of all blocks before it in one product, and
    within the block `_SUBBLOCK` rows at a time do the same. So nothing of the weight's size is
    rewritten.

    Args:
      weight: `(in, out)` float32, in the order in which rows are visited.
      factor: U, `(in, in)` upper triangular, with :math:`U^\top U` the inverse Gram matrix.
      scales: All scales; of moving groups those that are still to be found.
      grid: The grid.
      moving: Rows of a group, where a group's scales are found when its first row is reached.
      stale: Whether they are then read from rows that lack the errors of their own block.
      block_size: Rows of a block, about.
      mask: Bool like `weight`; False makes a code that stands for zero.

    Returns:
      Codes `(in, out)` int8 or uint8, the scales, and the errors `(in, out)` float32.
    """
    in_dim, out_dim = weight.shape
    block, sub = _block_sizes(in_dim, moving, block_size)
    padding = -in_dim % block
    # Rows of zeros with an identity factor take no part.
    weight = jnp.pad(weight, ((0, padding), (0, 0)))
    spread = jnp.pad(factor.T, (0, padding))  # spread[j, i] = U[i, j]
    on_padding = jnp.arange(in_dim + padding) >= in_dim
    spread = jnp.where(on_padding[:, None] & jnp.eye(in_dim + padding, dtype=bool), 1, spread)
    scales = _pad_scales(scales, padding, moving)
    if mask is not None:
        mask = jnp.pad(mask, ((0, padding), (0, 0)))
    kept = lambda rows, at: (  # noqa: E731
        rows if mask is None else jnp.where(_slice(mask, at, rows.shape[0]), rows, 0)
    )

    def block_step(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
        errors, scales = carry
        # Rows of `errors` that are still to come are zero.
        spread_rows = _slice(spread, start, block)
        rows = _slice(weight, start, block) - _matmul(spread_rows, errors)
        first = rows
        inside = _slice(spread_rows, start, block, axis=1)

        def sub_step(s: jax.Array, state: Any) -> Any:
            rows, errors, codes, scales = state
            at = s * sub
            if moving:
                group = kept(_slice(first if stale else rows, at, moving), start + at)
                number = (start + at) // moving
                found_now = lambda old: old.found(number, group, grid)  # noqa: E731
                if sub == moving:
                    scales = found_now(scales)
                else:
                    scales = jax.lax.cond(at % moving == 0, found_now, lambda old: old, scales)
            now, found = _subblock(
                _slice(rows, at, sub),
                _slice(_slice(inside, at, sub), at, sub, axis=1),
                scales,
                grid,
                start + at,
                mask,
            )
            rows = rows - _matmul(_slice(inside, at, sub, axis=1), found)
            return rows, _put(errors, found, at, axis=0), _put(codes, now, at, axis=0), scales

        state = (
            rows,
            jnp.zeros_like(rows),
            jnp.zeros((block, out_dim), jnp.uint8 if grid.unsigned else jnp.int8),
            scales,
        )
        _, found, codes, scales = jax.lax.fori_loop(0, block // sub, sub_step, state)
        return (_put(errors, found, start, axis=0), scales), codes

    (errors, scales), codes = jax.lax.scan(
        block_step, (jnp.zeros_like(weight), scales), jnp.arange(0, in_dim + padding, block)
    )
    rows = in_dim // moving if moving else scales.scale.shape[0]
    scales = RowScales(
        scales.scale[:rows],
        None if scales.zero_point is None else scales.zero_point[:rows],
        scales.of_row[:in_dim],
    )
    return codes.reshape(-1, out_dim)[:in_dim], scales, errors[:in_dim]


def _subblock(
    rows: jax.Array,
    spread: jax.Array,
    scales: RowScales,
    grid: Grid,
    start: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Codes and errors of a few rows that already carry the errors of all rows before them."""

    def row_step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, errors = state
        row = rows[i] - _matmul(spread[i], errors)
        scale, zero = scales.at(start + i)
        code = encode(row, scale, zero, grid)
        if mask is not None:
            at_zero = 0 if zero is None else zero.astype(code.dtype)
            code = jnp.where(mask[start + i], code, at_zero)
        error = (row - decode(code, scale, zero)) / spread[i, i]
        return codes.at[i].set(code.astype(codes.dtype)), errors.at[i].set(error)

    dtype = jnp.uint8 if grid.unsigned else jnp.int8
    start_state = jnp.zeros(rows.shape, dtype), jnp.zeros_like(rows)
    return jax.lax.fori_loop(0, rows.shape[0], row_step, start_state)


def _block_sizes(in_dim: int, group: int | None, block_size: int) -> tuple[int, int]:
    """Rows of a block, which holds whole groups, and of a sub-block, which divides a group."""
    if group is None:
        block = unit = min(block_size, -(-in_dim // _SUBBLOCK) * _SUBBLOCK)
    else:
        block, unit = group * max(1, block_size // group), group
    return block, max(d for d in range(1, min(_SUBBLOCK, unit) + 1) if unit % d == 0)


def _pad_scales(scales: RowScales, padding: int, group: int | None) -> RowScales:
    """Scales for the rows of padding: groups of their own where groups move, else any."""
    if not padding:
        return scales
    scale, zero, of_row = scales
    if group is None:
        return scales._replace(of_row=jnp.pad(of_row, (0, padding)))
    new_rows = ((0, padding // group), (0, 0))
    zero = None if zero is None else jnp.pad(zero, new_rows)
    padded = jnp.arange(of_row.shape[0], of_row.shape[0] + padding) // group
    return RowScales(jnp.pad(scale, new_rows), zero, jnp.concatenate([of_row, padded]))
