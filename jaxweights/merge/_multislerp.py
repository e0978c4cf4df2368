"""The normalised mean of models, known as multi-SLERP."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core._paths import Path, fail
from jaxweights.core._transform import Transform
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    check_weights,
    per_model,
)
from jaxweights.merge._sphere import Measuring, Vectors, mean_direction, safe_inverse
from jaxweights.merge._spherical import SphereMerge, spherical

# A mean of unit vectors that is shorter points nowhere in particular.
SHORTEST = 1e-6


def multislerp(
    *,
    weights: Weights = None,
    deltas: bool = False,
    normalize: bool = True,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Averages the directions of models, and gives the result the mean of their norms.

    With :math:`u_i = \theta_i / \|\theta_i\|`, every leaf (each layer and expert of a stacked one)
    becomes

    .. math:: \frac{\sum_i w_i u_i}{\|\sum_i w_i u_i\|} \sum_i w_i \|\theta_i\|

    It is not the mean on the sphere, and of two models not SLERP except halfway: `karcher` is both.

    Args:
      weights: One number per model; None gives equal ones. May be a traced array.
      deltas: Whether the models' differences to the tree are merged and added to it.
      normalize: Whether weights are divided by their sum. Without, they scale the norm.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the tree's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If weights sum to zero and are to be normalised, or directions cancel.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> models = [{"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
      >>> merged = jw.apply(jw.merge.multislerp(), models[0], models=models)
      >>> [round(x, 3) for x in merged["w"].tolist()]
      [1.414, 1.414]

    Source: mergekit's method of this name, whose step in the tangent space is zero by construction;
    no paper.
    Differs: (1) the step that does nothing is left out. (2) Directions that cancel are an error
    for two models, too.
    """
    name = "merge.multislerp"
    weights = check_weights(name, weights, normalize=normalize)
    output = Output.checked(name, out_dtype, rounding, nonfloat)

    def factors(vectors: Vectors) -> Measuring[tuple[jax.Array, jax.Array]]:
        n = vectors.models
        given = per_model(name, "weights", np.ones(n) if weights is None else weights, n)
        shares = _shares(jnp.asarray(given, vectors.dtype), normalize=normalize)
        norms, length = yield from mean_direction(vectors, shares)
        return _factors(norms, length, shares)

    report = functools.partial(refuse_cancelling, name)
    merge = SphereMerge(name, factors, output, deltas=deltas, report=report)
    return spherical(merge, names=names)


def refuse_cancelling(name: str, paths: list[Path]) -> None:
    """One error for all leaves whose mean has no direction."""
    fail(
        name,
        [
            f"{path!r}: the weighted directions of the models cancel, so that their mean has none. "
            "Leave this weight to `mean` with `partition`, or change the weights."
            for path in paths
        ],
    )


@functools.partial(jax.jit, static_argnames="normalize")
def _shares(weights: jax.Array, *, normalize: bool) -> jax.Array:
    return weights / jnp.sum(weights) if normalize else weights


@jax.jit
def _factors(norms: jax.Array, length: jax.Array, shares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of the models `(models, vectors)`, and whether directions cancel anywhere."""
    cancels = length < SHORTEST * jnp.sum(jnp.abs(shares))
    size = jnp.sum(shares[:, None] * norms, axis=0)
    towards = shares[:, None] * safe_inverse(norms) * safe_inverse(length)[None]
    return size[None] * towards, jnp.any(cancels & jnp.any(norms > 0, axis=0))
