"""Whether two leaves hold the same values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.weights._weight import is_weight


def same(first: Any, second: Any) -> bool:
    """Whether two leaves, dense or represented, are equal in every bit of their values.

    Traced and abstract arrays of one shape and dtype count as the same.

    Args:
      first: A leaf.
      second: Another.

    Returns:
      Whether they are.
    """
    if first is second:
        return True
    if is_weight(first) or is_weight(second):
        one, two = jax.tree.flatten(first), jax.tree.flatten(second)
        return one[1] == two[1] and all(map(same, one[0], two[0]))
    if not (hasattr(first, "dtype") and hasattr(second, "dtype")):
        return bool(np.all(first == second))
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in (first, second)):
        return True
    if jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
        first, second = jax.random.key_data(first), jax.random.key_data(second)
    return bool(np.array_equal(first, second))
