"""Model Stock: how far to go from the base to the mean of its fine-tunes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.core._transform import Transform
from jaxweights.merge._delta_leaf import Compat
from jaxweights.merge._models import Nonfloat, Output, Rounding, check_choice
from jaxweights.merge._per_leaf import GROUPS, Group
from jaxweights.merge._sphere import Measuring, Vectors, chords, mean_direction, norms_of
from jaxweights.merge._spherical import SphereMerge, spherical

_MERGEKIT_FLOOR = 1e-6  # of products of two norms


def model_stock(
    *,
    group: Group = "leaf",
    clip: bool | None = None,
    compat: Compat = "paper",
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Moves the base towards the mean of its fine-tunes, as far as they agree in direction.

    The base is the tree that is transformed. With the mean cosine :math:`\cos\varphi` between two
    of the :math:`N` deltas, every leaf (each layer and expert of a stacked one) becomes

    .. math:: t\,\bar\theta + (1-t)\,\theta_0, \qquad t = \frac{N\cos\varphi}{1+(N-1)\cos\varphi}

    Deltas that agree give t = 1, orthogonal ones the base. A delta that is zero counts as
    orthogonal to all.

    Args:
      group: What one vector is: a `"leaf"`, the inputs of one `"output"` (filter-wise), or the
        outputs of one `"input"`.
      clip: Whether t is kept in [0, 1]; None: with `compat="paper"`. It has a pole where
        the cosine is -1 / (N - 1), which three deltas come close to by summing to zero.
      compat: `"paper"`, or `"mergekit"`: products of norms below 1e-6 count as 1e-6, which
        pulls small leaves towards the base.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If there are fewer than two models, or one does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"w": jnp.zeros(2)}
      >>> models = [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}]
      >>> merged = jw.apply(jw.merge.model_stock(), base, models=models)
      >>> [round(x, 3) for x in merged["w"].tolist()]
      [0.828, 0.414]

    Source: Jang et al. 2024, arXiv:2403.19522.
    Differs: (1) of more than two models the cosines of all pairs are averaged, which the paper
    leaves open. (2) t is clipped.
    """
    name = "merge.model_stock"
    check_choice(name, "group", group, GROUPS)
    check_choice(name, "compat", compat, ("paper", "mergekit"))
    output = Output.checked(name, out_dtype, rounding, nonfloat)
    clip = compat == "paper" if clip is None else clip

    def factors(vectors: Vectors) -> Measuring[tuple[jax.Array, None]]:
        cosine = yield from _mean_cosine(vectors, compat=compat)
        return _factors(cosine, vectors.models, clip=clip), None

    merge = SphereMerge(
        name,
        factors,
        output,
        deltas=True,
        group=group,
        fewest=2,
        remedy="One delta has no angle to another; `mean` or `task_arithmetic` takes a single one.",
    )
    return spherical(merge, names=names)


def _mean_cosine(vectors: Vectors, *, compat: Compat) -> Measuring[jax.Array]:
    """Mean cosine of the angles between all pairs of deltas, `(vectors,)`."""
    n = vectors.models
    pairs = n * (n - 1)
    if compat == "mergekit":
        norms = jnp.stack((yield from norms_of(vectors)))
        squares = yield from chords(vectors, norms)
        return _sum_of_guarded_cosines(norms, squares) / pairs
    # The square of the sum of unit vectors is the sum of all cosines, those with themselves too.
    norms, length = yield from mean_direction(vectors, jnp.ones(n, vectors.dtype))
    return (length * length - jnp.sum(norms > 0, axis=0, dtype=norms.dtype)) / pairs


@jax.jit
def _sum_of_guarded_cosines(
    norms: jax.Array,  # (models, vectors)
    squares: jax.Array,  # (vectors, models, models)
) -> jax.Array:
    total = jnp.zeros_like(norms[0])
    for i in range(len(norms)):
        for j in range(i):
            size = norms[i] * norms[j]
            cosine = jnp.where(size > 0, 1 - squares[:, i, j] / 2, 0)
            total = total + 2 * jnp.clip(cosine * size / jnp.maximum(size, _MERGEKIT_FLOOR), -1, 1)
    return total


@functools.partial(jax.jit, static_argnames=("models", "clip"))
def _factors(cosine: jax.Array, models: int, *, clip: bool) -> jax.Array:
    """How much of each delta is added: `(models, vectors)`."""
    below = 1 + (models - 1) * cosine
    if clip:
        t = jnp.where(
            cosine > 0, jnp.clip(models * cosine / jnp.where(cosine > 0, below, 1), 0, 1), 0
        )
    else:
        t = models * cosine / below
    return jnp.broadcast_to(t / models, (models, *t.shape))
