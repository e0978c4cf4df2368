"""What lies at the ends of each group of a matrix: extremes and percentiles, without sorting."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def largest_magnitude(groups: jax.Array) -> jax.Array:
    """The entry of largest magnitude, with its sign, of each `(rows, group, out)` group.

    Returns:
      `(rows, 1, out)`, float32; NaN where a group holds one.
    """
    return _fold(groups, _larger)


def extremes(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Least and largest entry of each `(rows, group, out)` group, `(rows, 1, out)`.

    NaN where a group holds one.
    """
    if groups.size == 0:
        none = jnp.zeros((groups.shape[0], 1, groups.shape[2]))
        return none, none
    return _fold(groups, jnp.minimum), _fold(groups, jnp.maximum)


def _fold(groups: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Reduces `(rows, group, out)` to `(rows, 1, out)`, up to eight slices at a time.

    XLA's own minimum and maximum along an axis lose NaN on CPU (seen with jax 0.10.2), and any
    other reduction along an axis that is not the last is not vectorised there. Slices are.
    """
    while (size := groups.shape[1]) > 1:
        parts = next((n for n in (8, 7, 6, 5, 4, 3, 2) if size % n == 0), None)
        if parts is None:
            # A large prime: the first slice is folded twice, which changes no extreme.
            padding = groups[:, : 8 - size % 8]
            groups = jnp.concatenate([groups, padding], axis=1)
            continue
        slices = groups.reshape(groups.shape[0], parts, size // parts, groups.shape[2])
        groups = functools.reduce(combine, (slices[:, i] for i in range(parts)))
    return groups


def _larger(first: jax.Array, second: jax.Array) -> jax.Array:
    """Whichever has the larger magnitude; NaN has the largest."""
    # As integers, magnitudes have the order of the floats, and NaN lies above infinity.
    magnitude = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7FFFFFFF)  # noqa: E731
    return jnp.where(magnitude(first) >= magnitude(second), first, second)


def percentiles(groups: jax.Array, percentile: float) -> tuple[jax.Array, jax.Array]:
    """The (100 - p)-th and p-th percentile of each group, entries of it, without sorting.

    Bisects the 32 bits of an order-preserving integer image of the floats, counting at each step.
    """
    rows, size, out_dim = groups.shape
    rank = max(1, math.ceil(percentile / 100 * size))  # entries at or below the p-th percentile

    def ranked(values: jax.Array) -> jax.Array:
        keys = in_order(values)

        def narrow(i: jax.Array, found: jax.Array) -> jax.Array:
            trial = found | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
            below = jnp.sum(keys < trial, axis=1, keepdims=True, dtype=jnp.int32)
            return jnp.where(below < rank, trial, found)

        found = jnp.zeros((rows, 1, out_dim), jnp.uint32)
        return _unordered(jax.lax.fori_loop(0, 32, narrow, found))

    poison = jnp.sum(groups * 0, axis=1, keepdims=True)  # NaN where a value is not finite
    return -ranked(-groups) + poison, ranked(groups) + poison


def in_order(values: jax.Array) -> jax.Array:
    """float32 as uint32 of the same order; -0.0 comes before 0.0."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    negative = (bits >> jnp.uint32(31)) == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _unordered(keys: jax.Array) -> jax.Array:
    """The inverse of `in_order`."""
    positive = (keys >> jnp.uint32(31)) == 1
    bits = jnp.where(positive, keys & jnp.uint32((1 << 31) - 1), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
