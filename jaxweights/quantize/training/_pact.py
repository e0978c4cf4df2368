"""pact: activations between zero and a learned bound."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.quantize._settings import check_between
from jaxweights.weights._divide import divide

_NAME = "quantize.pact"


def pact(x: jax.Array, bound: jax.Array, *, bits: int) -> jax.Array:
    r"""Clips activations to `[0, bound]` and rounds them to evenly spaced levels of that range.

    Takes the place of a ReLU. The gradient of `x` is that of the clipping, 1 inside and 0 outside;
    that of `bound` sums what arrives at activations at or above it. A penalty on the square of
    `bound` in the loss keeps the range as narrow as it may be; 10 is the published start.

    Args:
      x: Activations, floating.
      bound: Above 0, a scalar, or of a shape that broadcasts to that of `x`.
      bits: Bits per code, 1 to 8; there are :math:`2^b` levels.

    Returns:
      The rounded activations, in the dtype of `x`.

    Raises:
      TypeError: If `bits` is no integer.
      ValueError: If `bits` is out of range.

    Example:
      >>> pact(jnp.array([-1.0, 0.9, 7.0]), jnp.array(6.0), bits=2)
      Array([0., 0., 6.], dtype=float32)
      >>> jax.grad(lambda bound: pact(jnp.array([5.0, 7.0, 8.0]), bound, bits=2).sum())(6.0)
      Array(2., dtype=float32, weak_type=True)

    Source: Choi et al. 2018, arXiv:1805.06085, equations 1 to 3.
    """
    bits = check_between(_NAME, "bits", bits, 1, 8)
    bound = jnp.asarray(bound)
    wide = jnp.broadcast_to(bound.astype(jnp.float32), x.shape)
    return _clipped(x.astype(jnp.float32), wide, 2**bits - 1).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _clipped(x: jax.Array, bound: jax.Array, steps: int) -> jax.Array:
    inside = jnp.clip(x, 0, bound)
    # A bound of 0 leaves 0 / 0: there is one level, and it is 0.
    step = divide(bound, steps)
    codes = jnp.round(divide(inside, jnp.where(step == 0, jnp.ones_like(step), step)))
    return jnp.where(x >= bound, bound, codes * step)


@_clipped.defjvp
def _clipped_jvp(steps: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, bound = primals
    above = x >= bound
    tangent = jnp.where(above, tangents[1], jnp.where(x > 0, tangents[0], 0))
    return _clipped(x, bound, steps), tangent
