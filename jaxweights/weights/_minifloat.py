"""Floats of eight bits and fewer: what they are, and the nearest one to a number."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def nearest_minifloat(units: jax.Array, kind: Minifloat) -> jax.Array:
    """The nearest of these floats, halves to even; beyond the largest, that one.

    In float32 throughout: a cast there and back may be dropped by the compiler. The gradient passes
    straight through.

    Args:
      units: Numbers, float32, any shape.
      kind: Of `ELEMENTS`.

    Returns:
      Float32 numbers; NaN stays NaN.

    Example:
      >>> nearest_minifloat(jnp.array([0.25, 2.5, -7.0]), ELEMENTS["e2m1"]).tolist()
      [0.0, 2.0, -6.0]
    """
    smallest_normal = 2.0 ** (1 - kind.bias)
    smallest = smallest_normal / 2**kind.mantissa_bits
    clipped = jnp.clip(units, -kind.largest, kind.largest)
    normal = jax.lax.reduce_precision(clipped, 8, kind.mantissa_bits)
    small = jnp.round(clipped / smallest) * smallest  # powers of two: exact
    return jnp.where(jnp.abs(clipped) < smallest_normal, small, normal)


@nearest_minifloat.defjvp
def _nearest_jvp(kind: Minifloat, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return nearest_minifloat(*primals, kind), tangents[0]
