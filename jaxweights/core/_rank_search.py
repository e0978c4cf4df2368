"""The bit pattern of the score of a given rank, found by counting.

The bit pattern of a non-negative float, read as an unsigned integer, orders as the float does. So
the k-th smallest score is found by fixing its pattern from the highest bits down, two bits a pass:
each pass counts the entries below three candidates. Passes only compare and count, hence `k` may
be traced, counts add over shards and over leaves, and the number of passes depends on the dtype
alone: 16 for float32, 8 for bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxweights.core._counting import Count, count_where

# Three candidates a pass are the digits of a number in base 4.
_CANDIDATES = 3
_DIGIT_BITS = 2

Pattern = Callable[[jax.Array], jax.Array]


class Bracket(NamedTuple):
    """A pattern, and how many entries lie below it and not above it; shaped like the columns."""

    value: jax.Array
    below: Count
    through: Count


def magnitude_bits(scores: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """Unsigned integers that order as `abs(scores)` does: the pattern without its sign bit.

    Args:
      scores: Floats of any width and sign.

    Returns:
      uint32, or uint64 for float64; NaN orders above infinity.

    Example:
      >>> bits = magnitude_bits(jnp.array([-2.0, 1.0, jnp.inf]))
      >>> bool(bits[1] < bits[0] < bits[2])
      True
    """
    width = 8 * scores.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(scores, jnp.dtype(f"uint{width}"))
    # 16-bit comparisons vectorise worse on CPU than widening first.
    wide = bits.astype(jnp.dtype(f"uint{max(width, 32)}"))
    return wide & jnp.asarray(largest_pattern(scores.dtype), wide.dtype)


def reversed_bits(scores: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """Unsigned integers that order as `-abs(scores)` does.

    Args:
      scores: Floats of any width and sign.

    Returns:
      As `magnitude_bits`; NaN orders below everything.
    """
    bits = magnitude_bits(scores)
    return jnp.asarray(largest_pattern(scores.dtype), bits.dtype) - bits


def largest_pattern(dtype: Any) -> int:
    return (1 << (8 * jnp.dtype(dtype).itemsize - 1)) - 1


def find_rank(scores: jax.Array, pattern: Pattern, wanted: Count, members: int) -> Bracket:
    """The pattern of the wanted rank among the leading `members` axes, in each column."""
    columns = scores.shape[members:]
    total = jax.tree.map(
        lambda x: jnp.broadcast_to(x, columns), Count.of(math.prod(scores.shape[:members]))
    )

    def body(i: jax.Array, state: Bracket) -> Bracket:
        shift = shift_of(i, scores.dtype)
        counts = count_below(scores, pattern, candidates_of(state.value, shift), members)
        return narrow(state, counts, wanted, shift)

    start = whole_range(total, scores.dtype)
    return jax.lax.fori_loop(0, rounds_of(scores.dtype), body, start)


def rounds_of(dtype: Any) -> int:
    """How many passes fix all bits of a pattern."""
    return 8 * jnp.dtype(dtype).itemsize // _DIGIT_BITS


def shift_of(i: Any, dtype: Any) -> Any:
    """The place of the digit that pass `i` fixes, in bits from the right."""
    return _DIGIT_BITS * (rounds_of(dtype) - 1 - i)


def whole_range(total: Count, dtype: Any) -> Bracket:
    """The bracket to start from: all `total` entries, `(*columns,)`, at any pattern."""
    unsigned = jnp.dtype(f"uint{max(8 * jnp.dtype(dtype).itemsize, 32)}")
    zero = jax.tree.map(jnp.zeros_like, total)
    return Bracket(jnp.zeros(total.low.shape, unsigned), zero, total)


def candidates_of(value: jax.Array, shift: jax.Array) -> jax.Array:
    """The patterns `(3, *columns)` that one pass counts below: the next digit's other values."""
    steps = jnp.arange(1, _CANDIDATES + 1, dtype=value.dtype) << jnp.asarray(shift, value.dtype)
    return value[None] + steps.reshape(-1, *(1,) * value.ndim)


def narrow(state: Bracket, counts: Count, wanted: Count, shift: jax.Array) -> Bracket:
    """Fixes the next digit: the largest one with fewer than `wanted` entries below it, or 0.

    Args:
      state: The digits found so far.
      counts: How many entries lie below each of its candidates, `(3, *columns)`.
      wanted: Rank, counted from 1, `(*columns,)`.
      shift: Of the digit.
    """
    fewer = counts.less(jax.tree.map(lambda x: x[None], wanted))
    digit = fewer.sum(axis=0, dtype=jnp.int32)  # counts grow with the candidate
    bounds = jax.tree.map(
        lambda first, middle, last: jnp.concatenate([first[None], middle, last[None]]),
        state.below,
        counts,
        state.through,
    )
    at = lambda place: jax.tree.map(  # noqa: E731
        lambda x: jnp.take_along_axis(x, place[None], axis=0)[0], bounds
    )
    unsigned = state.value.dtype
    fixed = digit.astype(unsigned) << jnp.asarray(shift, unsigned)
    return Bracket(state.value + fixed, at(digit), at(digit + 1))


def count_below(scores: jax.Array, pattern: Pattern, candidates: jax.Array, members: int) -> Count:
    """How many entries of each column lie below each of three candidates."""
    # Bound to the candidates, patterns cannot be hoisted out of the loop into a copy of the leaf.
    scores, candidates = jax.lax.optimization_barrier((scores, candidates))

    def below(x: jax.Array) -> list[jax.Array]:
        bits = pattern(x)
        return [bits < over_members(candidate, bits.ndim) for candidate in candidates]

    return count_where(scores, below, members)


def over_members(column: jax.Array, ndim: int) -> jax.Array:
    """Puts axes of length 1 in front, for broadcasting one value per column over its members."""
    return column.reshape(*(1,) * (ndim - column.ndim), *column.shape)
