"""loss_barrier: how far the loss rises on the straight line between two models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, fail, flatten, unflatten
from jaxweights.merge._models import compute_dtype
from jaxweights.weights._weight import materialize


class Barrier(NamedTuple):
    """The loss on the line between two models.

    Attributes:
      barrier: The largest height; not negative, because the ends have height 0.
      at: The share of the second model there.
      midpoint: Height halfway.
      alphas: Shares of the second model, `(points,)`, float64, from 0 to 1.
      losses: Loss there, `(points,)`, float64.
      heights: Loss less the straight line between the losses of the two ends, `(points,)`.
    """

    barrier: float
    at: float
    midpoint: float
    alphas: np.ndarray
    losses: np.ndarray
    heights: np.ndarray


def loss_barrier(
    loss_fn: Callable[[Params], Any],
    params_a: Params,
    params_b: Params,
    *,
    points: int = 25,
    at_once: int = 1,
    traced: bool = True,
) -> Barrier:
    """Measures the loss along the straight line from one model to another.

    Two models are linearly connected where the barrier is about 0. Interpolation is in float32;
    leaves that are not floating are those of `params_a`. A model with batch statistics has to
    compute them again at every point, in `loss_fn`, or the barrier is that of stale statistics.

    Args:
      loss_fn: Loss of a model, a scalar; for the loss of a data set, close over it.
      params_a: The model at 0.
      params_b: The model at 1.
      points: Points on the line, its ends included; odd, so that the midpoint is one.
      at_once: Points that are evaluated together by `vmap`, in the memory of as many models.
      traced: Whether `loss_fn` can be traced. False calls it on the host, point by point: for one
        that reads batches in a Python loop.

    Returns:
      The barrier and the curve.

    Raises:
      ValueError: If a setting is out of range, the models' leaves differ in shape, or a loss is
        not finite.

    Example:
      >>> found = loss_barrier(lambda p: (p["x"] ** 2 - 1) ** 2, {"x": -1.0}, {"x": 1.0})
      >>> found.barrier, found.at
      (1.0, 0.5)

    Source: Frankle et al. 2020, arXiv:1912.05671; Ainsworth et al. 2022, arXiv:2209.04836,
    definition 2.1.
    """
    name = "align.loss_barrier"
    if points < 3 or points % 2 == 0:
        raise ValueError(f"{name}: points={points} must be odd and at least 3.")
    if at_once < 1:
        raise ValueError(f"{name}: at_once={at_once} must be at least 1.")
    (ours, structure), (theirs, _) = (flatten(_arrays(x)) for x in (params_a, params_b))
    fail(name, _mismatches(ours, theirs))
    alphas = np.linspace(0.0, 1.0, points)
    shares = jnp.asarray(alphas, jnp.float32)

    def loss_at(ours: Flat, theirs: Flat, alpha: jax.Array) -> Any:
        return loss_fn(unflatten(structure, interpolate(ours, theirs, alpha)))

    if traced:
        losses = jax.jit(
            lambda ours, theirs, shares: jax.lax.map(
                functools.partial(loss_at, ours, theirs), shares, batch_size=at_once
            )
        )(ours, theirs, shares)
    else:
        line = jax.jit(interpolate)
        losses = [loss_fn(unflatten(structure, line(ours, theirs, alpha))) for alpha in shares]
    losses = np.asarray(losses, np.float64)
    if losses.shape != (points,):
        raise ValueError(
            f"{name}: loss_fn returned an array of shape {losses.shape[1:]}. It must be a scalar."
        )
    if not np.isfinite(losses).all():
        where = alphas[~np.isfinite(losses)].tolist()
        raise ValueError(
            f"{name}: the loss is not finite at {where}. Check the model and the loss."
        )
    heights = losses - ((1 - alphas) * losses[0] + alphas * losses[-1])
    top = int(np.argmax(heights))
    return Barrier(
        float(heights[top]),
        float(alphas[top]),
        float(heights[points // 2]),
        alphas,
        losses,
        heights,
    )


def interpolate(ours: Flat, theirs: Flat, alpha: jax.Array) -> Flat:
    """(1 − α)A + αB of every floating leaf, exact at both ends and where A = B."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        if not is_float(a):
            return a
        dtype = compute_dtype(a)
        wide_a, wide_b, share = a.astype(dtype), b.astype(dtype), alpha.astype(dtype)
        between = (1 - share) * wide_a + share * wide_b
        return jnp.where(wide_a == wide_b, wide_a, between).astype(a.dtype)

    return {path: leaf(a, theirs[path]) for path, a in ours.items()}


def _arrays(params: Params) -> Params:
    return jax.tree.map(jnp.asarray, materialize(params))


def _mismatches(ours: Flat, theirs: Flat) -> list[str]:
    problems = [
        f"{path!r}: is in only one of the models. Pass two models of one architecture."
        for path in {**ours, **theirs}
        if path not in ours or path not in theirs
    ]
    return problems + [
        f"{path!r}: is {theirs[path].shape} in params_b but {a.shape} in params_a. Pass two models "
        "of one architecture."
        for path, a in ours.items()
        if path in theirs and theirs[path].shape != a.shape
    ]
