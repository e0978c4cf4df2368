"""Levels: the tables of narrow formats, and the code of the level nearest to a number."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxweights.weights._minifloat import ELEMENTS as ELEMENTS
from jaxweights.weights._minifloat import Element as Element
from jaxweights.weights._minifloat import Minifloat


def minifloat_table(kind: Minifloat) -> np.ndarray:
    """The value of every code, sign in the highest bit; float32.

    Example:
      >>> minifloat_table(ELEMENTS["e2m1"])[:8].tolist()
      [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    magnitudes = np.arange(2 ** (kind.bits - 1))
    exponent, mantissa = np.divmod(magnitudes, 2**kind.mantissa_bits)
    normal = exponent > 0
    values = np.ldexp(
        mantissa + normal * 2.0**kind.mantissa_bits,
        np.maximum(exponent, 1) - kind.bias - kind.mantissa_bits,
    )
    return np.concatenate([values, -values]).astype(np.float32)


def minifloat_code(units: Float[Array, "*shape"], kind: Minifloat) -> Integer[Array, "*shape"]:
    """Codes of the minifloats nearest to float32 numbers, halves to even; int32.

    Numbers beyond the largest magnitude get its code.

    Example:
      >>> minifloat_code(jnp.array([0.25, 0.75, -100.0]), ELEMENTS["e2m1"]).tolist()
      [0, 2, 15]
    """
    if kind.bits <= 4:
        magnitudes = minifloat_table(kind)[: 2 ** (kind.bits - 1)]
        return signed_code(jnp.abs(units), signs(units), magnitudes, ties="even")
    fraction = 23 - kind.mantissa_bits  # bits of a float32's mantissa that are rounded away
    magnitude = jnp.minimum(jnp.abs(units), kind.largest)
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    # Half a last place less one, and one more where the last place is odd: a tie goes to even.
    odd = (bits >> fraction) & 1
    rounded = (bits + odd + ((1 << (fraction - 1)) - 1)) >> fraction
    normal = rounded - ((127 - kind.bias) << kind.mantissa_bits)
    # Below the smallest normal number the levels are evenly spaced.
    subnormal = jnp.round(magnitude * 2.0 ** (kind.bias - 1 + kind.mantissa_bits))
    code = jnp.where(magnitude < 2.0 ** (1 - kind.bias), subnormal.astype(jnp.int32), normal)
    return code | (signs(units).astype(jnp.int32) << (kind.bits - 1))


def signs(values: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Where float32 numbers are negative, -0.0 among them."""
    return jax.lax.bitcast_convert_type(values, jnp.int32) < 0


def nearest_code(
    units: Float[Array, "*shape"],
    table: np.ndarray,
    *,
    ties: Literal["lower", "even"] = "lower",
) -> Integer[Array, "*shape"]:
    """Codes of the entries of a small table nearest to float32 numbers; int32.

    Bisects the midpoints between neighbouring levels: the distances to every level would take many
    times as long.

    Args:
      units: The numbers.
      table: Distinct levels in any order.
      ties: The level of a number on a midpoint: the "lower" one, or the one of "even" rank.

    Returns:
      Indices into the table.

    Example:
      >>> nearest_code(jnp.array([-0.4, 0.6, 9.0]), np.array([0.0, 1.0, -1.0])).tolist()
      [0, 1, 1]
    """
    order = np.argsort(table)
    levels = table[order].astype(np.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    if ties == "even":  # what lies on a midpoint above an odd rank lies beyond the float before it
        middles[1::2] = np.nextafter(middles[1::2], -np.inf, dtype=np.float32)
    rank = rank_bits(units, list(middles))
    if not np.array_equal(order, np.arange(len(order))):
        return pick(list(order.astype(np.int32)), rank)
    bits = [jnp.where(bit, 2**i, 0) for i, bit in enumerate(reversed(rank))]
    return functools.reduce(operator.or_, bits).astype(jnp.int32)


def rank_bits(units: Float[Array, "*shape"], middles: Sequence[Any]) -> list[Bool[Array, "*shape"]]:
    """How many of the ascending `middles` lie below each number, as bits, the highest first."""
    depth = max(len(middles), 1).bit_length()
    middles = [*middles, *[np.float32(np.inf)] * (2**depth - 1 - len(middles))]
    bits: list[jax.Array] = []
    for i in range(depth):
        step = 2 ** (depth - 1 - i)
        bits.append(units > pick(middles[step - 1 :: 2 * step], bits))
    return bits


def pick(values: Sequence[Any], bits: list[Bool[Array, "*shape"]]) -> Array:
    """The scalar whose place the bits spell, the highest first; the last one beyond the end."""
    padded = [*values, *[values[-1]] * (2 ** len(bits) - len(values))]
    chosen = [jnp.asarray(v) for v in padded]
    for bit in reversed(bits):
        pairs = zip(chosen[::2], chosen[1::2], strict=True)
        chosen = [jnp.where(bit, upper, lower) for lower, upper in pairs]
    return chosen[0]


def signed_code(
    size: Float[Array, "*shape"],
    negative: Bool[Array, "*shape"],
    magnitudes: np.ndarray,
    *,
    ties: Literal["lower", "even"] = "lower",
) -> Integer[Array, "*shape"]:
    """As `nearest_code`, of tables with a sign in the highest bit, also of what rounds to zero.

    Magnitudes and signs come apart, so that XLA needs to store no quotient that both were read off.

    Example:
      >>> size, negative = jnp.array([0.4, 0.6, 9.0]), jnp.array([True, False, True])
      >>> signed_code(size, negative, np.array([0.0, 1.0])).tolist()
      [2, 1, 3]
    """
    code = nearest_code(size, magnitudes, ties=ties)
    return code | jnp.where(negative, len(magnitudes), 0).astype(jnp.int32)
