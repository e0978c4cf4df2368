"""Scales in the dtype they are stored in, as codes are chosen for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.core._stored import stored_as

# XLA takes what is smaller for 0.
_LEAST = jnp.finfo(jnp.float32).tiny


def stored_scale(scale: jax.Array, dtype: DTypeLike, largest: jax.Array | None = None) -> jax.Array:
    """Scales as they are stored, with which codes are to be chosen.

    Args:
      scale: Float32.
      dtype: Floating, of 16 or 32 bits.
      largest: What tells by 0 which groups hold zeros alone, of the scales' shape; None if the
        scale itself does.

    Returns:
      The scales as `dtype`; of groups of zeros they are 1. Others below the least normal float32
      are raised to it: what codes then miss is less than XLA tells from 0. Where `dtype` rounds a
      scale to 0, as float16 does what is below 3e-8, it stays 0, for `describe_bad_scales` to find.
    """
    largest = scale if largest is None else largest
    least = jnp.asarray(_LEAST, scale.dtype)
    scale = jnp.where(jnp.abs(scale) < least, least, scale)
    return stored_as(jnp.where(largest == 0, jnp.ones_like(scale), scale), dtype)
