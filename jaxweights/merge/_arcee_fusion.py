"""Arcee fusion: copy the entries of another model that matter most."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._select import kth_smallest
from jaxweights.core._transform import Transform
from jaxweights.merge._delta_leaf import Compat, to_rows
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    all_finite,
    check_choice,
    compute_dtype,
)
from jaxweights.merge._per_leaf import LeafJob, Merged, per_leaf

_MERGEKIT_EPSILON = 1e-8  # added to probabilities
_QUARTILES = (0.25, 0.5, 0.75)


class FusionMerge(NamedTuple):
    """What was asked for; a stream does it slice by slice."""

    name: str
    whisker: Any
    compat: Compat
    output: Output
    remedy: str = "Entries are copied from the one model to the tree."


def arcee_fusion(
    *,
    whisker: float | jax.Array = 1.5,
    compat: Compat = "paper",
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Copies the model's entries that changed most in the outputs that changed most.

    An entry's importance is :math:`|\theta_1 - \theta_0|` times the Kullback-Leibler divergence of
    the softmax over the inputs of its output, in the model from that in the tree. Entries at or
    above :math:`median + 1.5 (Q_3 - Q_1)` of a leaf's importances (of each layer and expert of a
    stacked one) are those of the model; the others stay the tree's. A bias or norm is one softmax.

    Args:
      whisker: How many interquartile ranges above the median an importance must be; traced
        or not.
      compat: `"paper"`, or `"mergekit"`, which adds 1e-8 to probabilities and takes
        logarithms of their quotient: for small deltas its divergence is rounding noise.
      names: What errors call the model.
      out_dtype: Dtype of the merged leaves; None keeps the tree's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`; the base is the tree.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If the number of models is not one, or it does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> tree = {"w": jnp.zeros((4, 2))}
      >>> model = {"w": jnp.zeros((4, 2)).at[0, 0].set(1.0).at[1, 0].set(0.1)}
      >>> jw.apply(jw.merge.arcee_fusion(whisker=5.0), tree, models=[model])["w"][:2]
      Array([[1. , 0. ],
             [0.1, 0. ]], dtype=float32)

    Source: mergekit's method of this name; no paper.
    Differs: (1) quartiles are exact however large the leaf; mergekit draws a million entries.
    (2) The divergence is exact for small deltas. (3) It is computed in float32 for bfloat16 leaves,
    with either `compat`. mergekit takes softmax and logarithm in the models' dtype, and steps of
    bfloat16 in probabilities are as large as what deltas of 1 % change: its divergences are then
    ten times the true ones and vary from row to row by a quarter. About one entry in 25 is copied
    by one and kept by the other, and differs by all of its delta. mergekit with `dtype: float32`
    agrees.
    """
    name = "merge.arcee_fusion"
    check_choice(name, "compat", compat, ("paper", "mergekit"))
    if not isinstance(whisker, Tracer) and not (np.ndim(whisker) == 0 and np.isfinite(whisker)):
        raise ValueError(f"{name}: whisker={whisker} must be one finite number.")
    output = Output.checked(name, out_dtype, rounding, nonfloat)
    settings = FusionMerge(name, whisker, compat, output)

    def merge_leaf(job: LeafJob) -> Merged:
        dtype = compute_dtype(job.base)
        scores = importance_of(job.base, job.models[0], axes=job.axes, compat=compat)
        cut = _cut(scores, jnp.asarray(whisker, dtype), stack=job.stack, compat=compat)
        return Merged(
            *_copy_above(
                job.base, job.models[0], scores, cut, job.key, output=output, dtype=job.dtype
            )
        )

    return per_leaf(
        name,
        merge_leaf,
        output=output,
        names=names,
        most=1,
        remedy=settings.remedy,
        group="output",
        settings=settings,
    )


@functools.partial(jax.jit, static_argnames=("axes", "compat"))
def importance_of(base: Any, model: Any, *, axes: tuple[int, ...], compat: Compat) -> jax.Array:
    dtype = compute_dtype(base)
    old, new = (jnp.asarray(x).astype(dtype) for x in (base, model))
    if compat == "mergekit":
        p, q = (jax.nn.softmax(x, axis=axes) + _MERGEKIT_EPSILON for x in (new, old))
        divergence = jnp.sum(p * jnp.log(p / q), axis=axes, keepdims=True)
    else:
        divergence = _divergence(old, new - old, axes)
    return jnp.abs(new - old) * divergence


def _divergence(old: jax.Array, delta: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    r"""KL(softmax(old + delta) ‖ softmax(old)), without cancellation.

    With q the old probabilities and :math:`r_j` the change of log-probability, the sum of
    :math:`p_j r_j - p_j + q_j = q_j (e^{r_j} r_j - e^{r_j} + 1)`, none of which is negative.
    """
    q = jax.nn.softmax(old, axis=axes)
    # Changes beside their mean, so that the logarithm is taken near 1.
    delta = delta - jnp.sum(q * delta, axis=axes, keepdims=True)
    top = jnp.maximum(jnp.max(delta, axis=axes, keepdims=True, initial=0), 0)
    near = jnp.log1p(jnp.sum(q * jnp.expm1(jnp.minimum(delta, 1)), axis=axes, keepdims=True))
    far = top + jnp.log(jnp.sum(q * jnp.exp(delta - top), axis=axes, keepdims=True))
    r = delta - jnp.where(top < 1, near, far)
    series = r * r * (0.5 + r * (1 / 3 + r * (1 / 8 + r / 30)))
    safe = jnp.minimum(r, 80)  # e^80 is finite; there q is below 1e-34
    exact = jnp.exp(safe) * safe - jnp.expm1(safe)
    return jnp.sum(q * jnp.where(jnp.abs(r) < 0.05, series, exact), axis=axes, keepdims=True)


@functools.partial(jax.jit, static_argnames=("stack", "compat"))
def _cut(
    scores: jax.Array, whisker: jax.Array, *, stack: tuple[int, ...], compat: Compat
) -> jax.Array:
    """Where copying starts, shaped to broadcast over the leaf."""
    rows = to_rows(scores, stack).astype(jnp.float32)
    ranks = quartile_ranks(rows.shape[1])
    kth = _kth_signed if compat == "mergekit" else kth_smallest
    low, median, high = (jax.vmap(lambda row, k=k: kth(row, k))(rows) for k in ranks)
    cut = cut_above(low, median, high, whisker)
    return cut.reshape([n if a in stack else 1 for a, n in enumerate(scores.shape)])


def _kth_signed(row: jax.Array, k: int) -> jax.Array:
    """The k-th smallest, where rounding noise may have made divergences negative."""
    below = jnp.sum(row < 0, dtype=jnp.int32)
    negative = -kth_smallest(jnp.where(row < 0, row, jnp.inf), jnp.maximum(below - k + 1, 1))
    positive = kth_smallest(jnp.where(row < 0, jnp.inf, row), jnp.maximum(k - below, 1))
    return jnp.where(k <= below, negative, positive)


def quartile_ranks(entries: int) -> list[int]:
    """Which of the smallest scores are the quartiles, from 1."""
    return [int(q * (entries - 1)) + 1 for q in _QUARTILES]


def cut_above(low: jax.Array, median: jax.Array, high: jax.Array, whisker: jax.Array) -> jax.Array:
    """Where copying starts, in the dtype of the whisker."""
    return median.astype(whisker.dtype) + whisker * (high - low).astype(whisker.dtype)


@functools.partial(jax.jit, static_argnames=("output", "dtype"))
def _copy_above(
    base: Any,
    model: Any,
    scores: jax.Array,
    cut: jax.Array,
    key: jax.Array | None,
    *,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    old, new = (jnp.asarray(x).astype(scores.dtype) for x in (base, model))
    stored = output.store(jnp.where(scores >= cut, new, old), dtype, key)
    # A model's NaN may not have been copied, so that the result alone proves nothing.
    return stored, all_finite(stored, old, new)
