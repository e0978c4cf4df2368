"""The unit in which squares of weights stay within float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Of weights of 2**24 the fourth power, which Adam takes, is 2**96.
_USUAL = 24
# Units and their inverses are normal numbers, of which XLA makes no 0.
_LARGEST = 100


def unit_of(*matrices: jax.Array) -> jax.Array:
    """A power of four to divide matrices by, so that squares neither overflow nor vanish.

    Dividing by it or its root, and multiplying by it afterwards, is exact. It is 1 for all weights
    that models have: between 2**-24 and 2**24 nothing is changed, to the last bit, and neither are
    zeros.

    Args:
      matrices: Float32; NaN and infinity are passed over.

    Returns:
      Float32, `()`.

    Example:
      >>> float(unit_of(jnp.ones((2, 2)))), float(unit_of(jnp.array([3e30]))) > 1e30
      (1.0, True)
    """
    sizes = [jnp.max(jnp.abs(one), initial=0.0, where=jnp.isfinite(one)) for one in matrices]
    largest = jnp.max(jnp.stack(sizes))
    exponent = jnp.frexp(largest)[1]
    exponent = jnp.where(jnp.abs(exponent) <= _USUAL, 0, exponent // 2 * 2)
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -_LARGEST, _LARGEST))
