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
    total = jax.tree.map(
        lambda x: jnp.broadcast_to(x, scores.shape[members:]),
        Count.of(math.prod(scores.shape[:members])),
    )
    count = lambda candidates: count_below(scores, pattern, candidates, members)  # noqa: E731
    return descend(count, wanted, total, scores.dtype, jax.lax.fori_loop)


def descend(
    count: Callable[[jax.Array], Count],
    wanted: Count,
    total: Count,
    dtype: Any,
    loop: Callable[..., Any],
) -> Bracket:
    """The largest pattern with fewer than `wanted` entries below it, or 0 where none is wanted.

    Args:
      count: `count(candidates)` with candidates `(3, *columns)` gives how many lie below each.
      wanted: Rank, counted from 1, `(*columns,)`.
      total: Number of entries, `(*columns,)`.
      dtype: Of the scores.
      loop: `jax.lax.fori_loop` or its like.
    """
    columns = total.low.shape
    width = 8 * jnp.dtype(dtype).itemsize
    unsigned = jnp.dtype(f"uint{max(width, 32)}")
    rounds = width // _DIGIT_BITS

    def body(i: jax.Array, state: Bracket) -> Bracket:
        shift = (_DIGIT_BITS * (rounds - 1 - i)).astype(unsigned)
        steps = jnp.arange(1, _CANDIDATES + 1, dtype=unsigned) << shift
        counts = count(state.value[None] + steps.reshape(-1, *(1,) * len(columns)))
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
        return Bracket(state.value + (digit.astype(unsigned) << shift), at(digit), at(digit + 1))

    zero = jax.tree.map(jnp.zeros_like, total)
    return loop(0, rounds, body, Bracket(jnp.zeros(columns, unsigned), zero, total))


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
