"""Counts of the entries of a large array that satisfy a few predicates, exactly."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_COUNTER_BITS = 10  # three counters in 32 bits
_FIRST_FAN, _SECOND_FAN = 15, 32  # 15 * 32 < 2**10: no counter overflows

Predicates = Callable[[jax.Array], list[jax.Array]]


class Count(NamedTuple):
    """A count below 2^48, as `high * 2^16 + low` with `low < 2^16`, in uint32 scalars or arrays."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, number: int | jax.Array) -> Count:
        """From a Python integer of any size or an integer array."""
        if isinstance(number, int):
            return cls(jnp.uint32(number >> 16), jnp.uint32(number & 0xFFFF))
        number = jnp.asarray(number).astype(jnp.uint32)
        return cls(number >> 16, number & jnp.uint32(0xFFFF))

    def plus(self, other: Count) -> Count:
        """Sum, exact."""
        low = self.low + other.low
        return Count(self.high + other.high + (low >> 16), low & jnp.uint32(0xFFFF))

    def minus(self, other: Count) -> jax.Array:
        """Difference of a count and a smaller one, clipped to 2^32 - 1."""
        borrow = (self.low < other.low).astype(jnp.uint32)
        high = self.high - other.high - borrow
        low = self.low + (borrow << 16) - other.low
        return jnp.where(high > jnp.uint32(0xFFFF), jnp.uint32(0xFFFFFFFF), (high << 16) | low)

    def less(self, other: Count) -> jax.Array:
        """Whether it is the smaller one."""
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))


def count_where(scores: jax.Array, predicates: Predicates, members: int) -> Count:
    """Counts, over the leading `members` axes, where each predicate holds.

    Args:
      scores: `(*members, *columns)`.
      predicates: Gives up to three bool arrays for any slice of the scores.
      members: Number of axes to count over.

    Returns:
      Counts `(predicates, *columns)`.
    """
    size = math.prod(scores.shape[:members])
    if size >= 2**32:
        raise ValueError(
            f"core.select: one leaf of {size} entries is ranked, but its indices must fit 32 bits. "
            "Declare its leading axes as stacked, so that each matrix is ranked for itself."
        )

    def plainly(scores: jax.Array) -> jax.Array:
        # One pass on accelerators, and a sharded leaf stays where it is: only counts travel.
        axes = tuple(range(members))
        return jnp.stack([b.sum(axis=axes, dtype=jnp.uint32) for b in predicates(scores)])

    def by_slices(scores: jax.Array) -> jax.Array:
        return _count_by_slices(scores.reshape(size, *scores.shape[members:]), predicates)

    if size < 4 * _FIRST_FAN * _SECOND_FAN:
        return Count.of(plainly(scores))
    return Count.of(jax.lax.platform_dependent(scores, cpu=by_slices, default=plainly))


def _count_by_slices(scores: jax.Array, predicates: Predicates) -> jax.Array:
    """Counts along axis 0 by adding slices elementwise.

    XLA's fused reductions on CPU are scalar loops, ten times slower than memory; sums of slices are
    vector loops. Three counters share a 32-bit word on the way.
    """
    length = scores.shape[0] // _FIRST_FAN
    slices = [jax.lax.slice_in_dim(scores, i * length, (i + 1) * length) for i in range(_FIRST_FAN)]
    # The barriers keep XLA from fusing both levels into one huge loop body.
    words = jax.lax.optimization_barrier(
        functools.reduce(jnp.add, [_pack(predicates(part)) for part in slices])
    )
    second = length // _SECOND_FAN
    parts = [jax.lax.slice_in_dim(words, i * second, (i + 1) * second) for i in range(_SECOND_FAN)]
    summed = jax.lax.optimization_barrier(functools.reduce(jnp.add, parts))
    words = jnp.concatenate([summed, words[_SECOND_FAN * second :]])
    counter = jnp.uint32((1 << _COUNTER_BITS) - 1)
    tail = predicates(scores[_FIRST_FAN * length :])
    return jnp.stack(
        [
            ((words >> (_COUNTER_BITS * j)) & counter).sum(axis=0, dtype=jnp.uint32)
            + last.sum(axis=0, dtype=jnp.uint32)
            for j, last in enumerate(tail)
        ]
    )


def _pack(predicates: list[jax.Array]) -> jax.Array:
    """One counter of 0 or 1 for each predicate, in one word."""
    counters = [
        jnp.where(b, jnp.uint32(1 << (_COUNTER_BITS * j)), jnp.uint32(0))
        for j, b in enumerate(predicates)
    ]
    return functools.reduce(jnp.add, counters)
