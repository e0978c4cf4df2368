"""Values of arrays on the host, wherever they are held."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def on_host(array: Any) -> np.ndarray:
    """The values of a concrete array, with those parts that only other processes hold.

    Where several processes hold an array, all of them have to ask for it.
    """
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def where_not_finite(array: Any) -> np.ndarray:
    """Indices `(n, rank)` of the entries that are NaN or infinite.

    An array that is not in this host's memory is brought there only if it has such an entry.
    """
    if isinstance(array, jax.Array) and not _is_here(array) and bool(_is_finite(array)):
        return np.zeros((0, array.ndim), np.int64)
    values = on_host(array)
    narrow = values.dtype.itemsize < 4  # of which NumPy knows few
    return np.argwhere(~np.isfinite(values.astype(np.float32) if narrow else values))


def where_zero(array: Any) -> np.ndarray:
    """Indices `(n, rank)` of the entries that are 0; as `where_not_finite` does it."""
    if isinstance(array, jax.Array) and not _is_here(array) and not bool(_has_zero(array)):
        return np.zeros((0, array.ndim), np.int64)
    return np.argwhere(on_host(array) == 0)


def _is_here(array: jax.Array) -> bool:
    return array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


@jax.jit
def _has_zero(array: jax.Array) -> jax.Array:
    return (array == 0).any()
