"""Levels: the tables of narrow formats, and the code of the level nearest to a number."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

Element = Literal["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]


class Minifloat(NamedTuple):
    """A float of one sign bit, some exponent bits and some mantissa bits, without infinities.

    Attributes:
      exponent_bits: Bits of the exponent, whose bias is `2**(exponent_bits - 1) - 1`.
      mantissa_bits: Bits behind the leading one.
      largest: Largest magnitude.
      dtype: The JAX dtype of 8-bit ones, else None.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float
    dtype: Any = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest magnitude."""
        return int(np.frexp(self.largest)[1]) - 1


# Of OCP's 8-bit floats and of its microscaling formats, version 1.0, section 5.3.
ELEMENTS: dict[str, Minifloat] = {
    "e4m3": Minifloat(4, 3, 448.0, jnp.float8_e4m3fn),
    "e5m2": Minifloat(5, 2, 57344.0, jnp.float8_e5m2),
    "e3m2": Minifloat(3, 2, 28.0),
    "e2m3": Minifloat(2, 3, 7.5),
    "e2m1": Minifloat(2, 1, 6.0),
}


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
    negative = jax.lax.bitcast_convert_type(units, jnp.int32) < 0
    return code | (negative.astype(jnp.int32) << (kind.bits - 1))


def nearest_code(units: Float[Array, "*shape"], table: np.ndarray) -> Integer[Array, "*shape"]:
    """Codes of the entries of a small table nearest to float32 numbers; int32.

    Compares with the midpoints between neighbouring levels, one after another: the distances to
    every level would take many times as long. A number on a midpoint gets the lower level.

    Args:
      units: The numbers.
      table: Distinct levels in any order.

    Returns:
      Indices into the table.

    Example:
      >>> nearest_code(jnp.array([-0.4, 0.6, 9.0]), np.array([0.0, 1.0, -1.0])).tolist()
      [0, 1, 1]
    """
    order = np.argsort(table)
    levels = table[order].astype(np.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    code = jnp.full(units.shape, int(order[0]), jnp.int32)
    for middle, step in zip(middles, np.diff(order), strict=True):
        code = code + jnp.where(units > middle, jnp.int32(step), jnp.int32(0))
    return code
