"""Casts to a narrower dtype that stay casts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def stored_as(values: jax.Array, dtype: Any) -> jax.Array:
    """Floats in the dtype they are stored in, whatever is computed from them in the same program.

    A compiler that may keep excess precision, as XLA does on GPUs, drops a cast to a narrow dtype
    that is followed by one back: what depends on the stored values, such as codes, errors and
    checks for overflow, would be computed from the unrounded ones.

    Args:
      values: Floats.
      dtype: A floating dtype.

    Returns:
      The values as `dtype`.
    """
    cast = values.astype(dtype)
    if jnp.finfo(cast.dtype).bits >= jnp.finfo(values.dtype).bits:
        return cast
    return jax.lax.optimization_barrier(cast)
