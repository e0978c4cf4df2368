"""Scales in the dtype they are stored in, as codes are chosen for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.core._stored import stored_as


def stored_scale(scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Scales as they are stored, with which codes are to be chosen.

    Args:
      scale: Float32.
      dtype: Floating, of 16 or 32 bits.

    Returns:
      The scales as `dtype`; of groups of zeros, or of numbers so small that XLA takes their scale
      for 0, they are 1. Where `dtype` rounds a scale to 0, as float16 does what is below 3e-8, it
      stays 0, for `describe_bad_scales` to find.
    """
    # Of the scale alone: XLA would find the extremes of a group again for each of its entries.
    return stored_as(jnp.where(scale == 0, jnp.ones_like(scale), scale), dtype)
