"""The correctly rounded float32 quotient, on every device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_MANTISSA, _HIDDEN_BIT = 0x7FFFFF, 0x800000
_EXPONENT_BITS = 23
_LARGEST_EXPONENT = 255  # of infinity and NaN
# A float is its mantissa times 2^(exponent - 150).
_EXPONENT_OF_ONE_STEP = 150


def divide(values: jax.Array, by: jax.Array | float) -> jax.Array:
    """The float32 nearest to the quotient, compiled or not, on CPUs and accelerators.

    XLA replaces division by a broadcast or constant divisor by a product with its reciprocal, and
    accelerators divide to within two units in the last place. Either moves entries that lie on a
    tie, so that codes would depend on how and where they are computed. A divisor that depends on
    the dividend is left alone (0 / 1 is what 0 / by would be), and what accelerators give is
    corrected by its remainder.

    Args:
      values: float32.
      by: float32, or a number; not 0 where values are 0.

    Returns:
      Their quotient, broadcast together. On accelerators the last place is not certain where an
      operand or the result is below 2^-126.
    """
    by = jnp.asarray(by, jnp.float32)
    values, by = jnp.broadcast_arrays(values, jnp.where(values == 0, jnp.float32(1), by))
    return _quotient(values, by)


@jax.custom_jvp
def _quotient(values: jax.Array, by: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        values,
        by,
        cpu=lambda a, b: a / b,
        default=lambda a, b: nearest_quotient(a / b, a, b),
    )


@_quotient.defjvp
def _quotient_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (values, by), (moved, moved_by) = primals, tangents
    quotient = _quotient(values, by)
    return quotient, (moved - quotient * moved_by) / by


def nearest_quotient(quotient: jax.Array, values: jax.Array, by: jax.Array) -> jax.Array:
    """Rounds a quotient that is up to three units in the last place off.

    Mantissas are integers, and what remains of the dividend is small, hence exact in 32 bits
    although its two terms overflow them.

    Args:
      quotient: About `values / by`, float32.
      values: float32.
      by: float32 of the same shape.

    Returns:
      The nearest floats; where an operand or the quotient is 0, subnormal or not finite, what was
      given.
    """
    exponent, mantissa = _parts(values)
    exponent_by, mantissa_by = _parts(by)
    inside = _is_normal(exponent) & _is_normal(exponent_by)
    # Twice: the first correction may come from the other side of a power of two, where the units
    # differ.
    for _ in range(2):
        exponent_now, mantissa_now = _parts(quotient)
        shift = exponent - exponent_now - exponent_by + jnp.int32(_EXPONENT_OF_ONE_STEP)
        rest = (mantissa << jnp.clip(shift, 0, 31)) - mantissa_now * mantissa_by
        # Below a power of two, floats are twice as dense.
        rest = jnp.where((rest < 0) & (mantissa_now == _HIDDEN_BIT), 2 * rest, rest)
        twice = 2 * jnp.abs(rest)
        steps = sum((twice > odd * mantissa_by).astype(jnp.int32) for odd in (1, 3, 5))
        known = inside & _is_normal(exponent_now)
        bits = jax.lax.bitcast_convert_type(quotient, jnp.int32)
        bits = bits + jnp.where(known, jnp.sign(rest) * steps, 0)
        quotient = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return quotient


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponent and mantissa as they are stored, the mantissa with its hidden bit."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> _EXPONENT_BITS) & jnp.int32(_LARGEST_EXPONENT)
    return exponent, (bits & jnp.int32(_MANTISSA)) | jnp.int32(_HIDDEN_BIT)


def _is_normal(exponent: jax.Array) -> jax.Array:
    return (exponent > 0) & (exponent < _LARGEST_EXPONENT)
