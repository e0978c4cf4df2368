"""ordered_sum: sums that come out the same in every program."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

_SLICES = 8


def ordered_sum(values: jax.Array) -> jax.Array:
    """Sums a matrix over its rows, in an order that no compiler changes.

    XLA adds up a reduction in an order that depends on what it is fused with, so a scale that is a
    mean would differ in its last digit between training and what is stored afterwards. Here slices
    are added entry by entry, eight at a time.

    Args:
      values: `(in, out)`, floating.

    Returns:
      `(1, out)`.

    Example:
      >>> ordered_sum(jnp.ones((100, 2)))
      Array([[100., 100.]], dtype=float32)
    """
    while (size := values.shape[0]) > 1:
        slices = min(_SLICES, size)
        padded = jnp.pad(values, ((0, -size % slices), (0, 0)))
        parts = padded.reshape(slices, padded.shape[0] // slices, values.shape[1])
        values = functools.reduce(operator.add, (parts[i] for i in range(slices)))
    return values if values.shape[0] else jnp.zeros((1, values.shape[1]), values.dtype)
