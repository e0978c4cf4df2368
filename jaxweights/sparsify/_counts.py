"""How many zeros a sparsity asks of a group, in integers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# A product this little below an integer counts as that integer: 0.29 * 100 is 28.999...
_SLACK = 1e-6
# The same for a sparsity that is a float32, whose own rounding grows with the group.
_TRACED_SLACK_LIMIT = 1e-2


def count_zeros(sparsity: float, size: int) -> int:
    """Zeros in a group of `size` weights: `floor(sparsity * size)`.

    Args:
      sparsity: Fraction of zeros in [0, 1).
      size: Weights in the group.

    Returns:
      The number of zeros.

    Example:
      >>> count_zeros(0.29, 100)  # although 0.29 * 100 < 29 in floating point
      29
    """
    return math.floor(sparsity * size + _SLACK)


def count_zeros_traced(sparsity: jax.Array, size: int) -> jax.Array:
    """The same for a sparsity that is an array, exactly also where float32 counts are not.

    Args:
      sparsity: Scalar, taken as float32; clipped to [0, 1] and to at least one kept weight.
      size: Weights in the group, fewer than 2^32.

    Returns:
      uint32 scalar: the floor of the product of the float32 value and `size`, where a product
      within float32's rounding of the next integer counts as that integer.
    """
    scaled = jnp.clip(jnp.asarray(sparsity).astype(jnp.float32), 0, 1) * jnp.float32(2**32)
    # The fraction of scaled that 32 bits do not hold; zero where sparsity >= 2^-8.
    floor = jnp.minimum(jnp.floor(scaled), jnp.float32(2**32 - 2**8))
    rest = (scaled - floor) * jnp.float32(size / 2**32)
    whole, fraction = _multiply(floor.astype(jnp.uint32), size)
    slack = min(_SLACK + size * 2.0**-25, _TRACED_SLACK_LIMIT)
    part = fraction.astype(jnp.float32) * jnp.float32(2**-32) + rest + jnp.float32(slack)
    zeros = whole + jnp.floor(part).astype(jnp.uint32)
    return jnp.minimum(zeros, jnp.uint32(max(size - 1, 0)))


def _multiply(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """High and low 32 bits of the product of two 32-bit numbers."""
    low_16 = jnp.uint32(0xFFFF)
    a_high, a_low = a >> 16, a & low_16
    b_high, b_low = jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    low, cross_1, cross_2 = a_low * b_low, a_low * b_high, a_high * b_low
    middle = (low >> 16) + (cross_1 & low_16) + (cross_2 & low_16)
    high = a_high * b_high + (cross_1 >> 16) + (cross_2 >> 16) + (middle >> 16)
    return high, (middle << 16) | (low & low_16)
