"""The Karcher mean: the point on the sphere nearest to all models."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._transform import Transform
from jaxweights.merge._delta_leaf import Compat
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    check_choice,
    check_weights,
    per_model,
)
from jaxweights.merge._multislerp import SHORTEST, refuse_cancelling
from jaxweights.merge._sphere import (
    Measuring,
    Vectors,
    chords,
    mean_direction,
    safe_inverse,
    safe_sqrt,
)
from jaxweights.merge._spherical import SphereMerge, spherical

# Steps cost nothing beside the leaf, and points in one half of the sphere converge in a few dozen.
_STEPS = {"paper": 50, "mergekit": 10}
_TOLERANCE = {"paper": 0.0, "mergekit": 1e-5}


def karcher(
    *,
    weights: Weights = None,
    deltas: bool = False,
    steps: int | None = None,
    tolerance: float | None = None,
    compat: Compat = "paper",
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Finds the point on the sphere whose weighted squared angles to the models are smallest.

    SLERP for any number of models. Directions are averaged, leaf by leaf (and for each layer and
    expert of a stacked leaf), and the result is given the weighted mean of the norms. Of two models
    with weights :math:`(1-t, t)` it is `slerp(t=t, norm="interpolate")`.

    All that the iteration needs of the models are the distances between them, which are taken once.

    Args:
      weights: One number per model, none negative; None gives equal ones. May be a traced array.
      deltas: Whether the models' differences to the tree are merged and added to it.
      steps: Greatest number of steps; None takes that of `compat`.
      tolerance: Length of a step, in radians, at which it stops; None takes that of `compat`.
      compat: `"paper"` takes 50 steps, which is exact; `"mergekit"` at most 10, to within 1e-5.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the tree's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a weight is negative, all are zero, or directions cancel.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
      >>> merged = jw.apply(jw.merge.karcher(weights=[2, 1]), models[0], models=models)
      >>> [round(x, 3) for x in merged["w"].tolist()]
      [1.732, 1.0]

    Source: Karcher 1977, Riemannian center of mass and mollifier smoothing; for models
    arXiv:2603.04972.
    Differs: (1) weights. (2) Directions that cancel, which have no single mean, are an error.
    """
    name = "merge.karcher"
    check_choice(name, "compat", compat, ("paper", "mergekit"))
    weights = check_weights(name, weights, normalize=True)
    if weights is not None and not isinstance(weights, Tracer) and np.min(weights) < 0:
        raise ValueError(
            f"{name}: weights={np.asarray(weights).tolist()} must not be negative: they weigh "
            "squared angles."
        )
    steps = _STEPS[compat] if steps is None else steps
    tolerance = _TOLERANCE[compat] if tolerance is None else tolerance
    if steps < 0 or not tolerance >= 0:
        raise ValueError(f"{name}: steps={steps} and tolerance={tolerance} must not be negative.")
    output = Output.checked(name, out_dtype, rounding, nonfloat)

    def factors(vectors: Vectors) -> Measuring[tuple[jax.Array, jax.Array]]:
        n = vectors.models
        given = per_model(name, "weights", np.ones(n) if weights is None else weights, n)
        shares = jnp.asarray(given, vectors.dtype)
        shares = shares / jnp.sum(shares)
        norms, length = yield from mean_direction(vectors, shares)
        squares = yield from chords(vectors, norms)
        limit = jnp.asarray(tolerance, vectors.dtype)
        return _factors(norms, length, squares, shares, limit, steps=steps)

    report = functools.partial(refuse_cancelling, name)
    merge = SphereMerge(name, factors, output, deltas=deltas, report=report)
    return spherical(merge, names=names)


@functools.partial(jax.jit, static_argnames="steps")
def _factors(
    norms: jax.Array,  # (models, vectors)
    length: jax.Array,  # (vectors,)
    squares: jax.Array,  # (vectors, models, models)
    shares: jax.Array,  # (models,), of sum 1
    tolerance: jax.Array,
    *,
    steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Factors of the models `(models, vectors)`, and whether directions cancel anywhere."""
    nonzero = norms.T > 0
    weights = jnp.where(nonzero, shares[None], 0)  # a vector without length has no direction
    weights = weights * safe_inverse(jnp.sum(weights, axis=1, keepdims=True))
    start = weights
    if steps:
        step = functools.partial(_step, squares=squares, weights=weights, tolerance=tolerance)
        start = jax.lax.fori_loop(0, steps, lambda _, c: step(c), start)
    radius = safe_sqrt(1 - jnp.sum(start * _half(squares, start), axis=1))
    size = jnp.sum(shares[:, None] * norms, axis=0)
    towards = start.T * safe_inverse(radius)[None] * safe_inverse(norms)
    return size[None] * towards, jnp.any((length < SHORTEST) & jnp.any(nonzero, axis=1))


def _half(squares: jax.Array, c: jax.Array) -> jax.Array:
    return jnp.sum(squares * c[:, None, :], axis=2) / 2


def _step(
    c: jax.Array,  # (vectors, models), of sum 1
    *,
    squares: jax.Array,
    weights: jax.Array,
    tolerance: jax.Array,
) -> jax.Array:
    r"""One step of :math:`m \leftarrow \exp_m(\sum_i w_i \log_m u_i)`.

    The mean is :math:`m = \sum_j c_j u_j / \rho`. Directions enter by their squared distances Q
    alone: with coefficients of sum 1, :math:`\langle u_i, \sum_j c_j u_j\rangle = 1 - (Qc)_i / 2`
    and :math:`\rho^2 = 1 - c^\top Q c / 2`, both exact for directions that are close.
    """
    half = _half(squares, c)
    lost = jnp.sum(c * half, axis=1, keepdims=True)  # 1 - ρ²
    radius = safe_sqrt(1 - lost)
    inverse = safe_inverse(radius)
    # 1 - cos Ω, without subtracting nearly equal numbers.
    versine = jnp.clip((half - lost / (1 + radius)) * inverse, 0, 2)
    pull = weights * _angle_over_sine(versine)
    along = jnp.sum(pull * (1 - versine), axis=1, keepdims=True)
    move = pull - along * inverse * c
    total = jnp.sum(move, axis=1, keepdims=True)
    spread = jnp.sum(move * _half(squares, move), axis=1, keepdims=True)
    distance = safe_sqrt(jnp.maximum(total * total - spread, 0))
    far = distance > 0
    sine = jnp.where(far, jnp.sin(distance) / jnp.where(far, distance, 1), 1)
    moved = jnp.cos(distance) * inverse * c + sine * move
    moved = moved * safe_inverse(jnp.sum(moved, axis=1, keepdims=True))
    return jnp.where(distance < tolerance, c, moved)


def _angle_over_sine(versine: jax.Array) -> jax.Array:
    """Ω / sin Ω from 1 - cos Ω; the series where sines vanish, and bounded where they do at π."""
    small = versine < 1e-6
    inner = jnp.clip(jnp.where(small, 1, versine), 0, 2 - 1e-6)
    omega = 2 * jnp.arctan2(jnp.sqrt(inner), jnp.sqrt(2 - inner))
    return jnp.where(small, 1 + versine / 3, omega / jnp.sqrt(inner * (2 - inner)))
