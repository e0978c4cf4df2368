"""The weighted mean of models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._context import Context
from jaxweights.core._paths import Params, Path, flatten, path_key, unflatten
from jaxweights.core._transform import Transform, stateless
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    all_finite,
    check_names,
    check_weights,
    compute_dtype,
    merge_leaves,
    per_model,
    require_models,
    selected,
)


def mean(
    *,
    weights: Weights = None,
    normalize: bool = True,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Averages models, leaf by leaf.

    :math:`\theta = \sum_i w_i \theta_i / \sum_i w_i` over the `models` given to `apply`. The tree
    that is transformed is the base: it gives the structure, the dtypes and the leaves that are not
    floating, and is not one of those averaged unless it is also among `models`:
    `apply(mean(), models[0], models=models)`.

    Sums are taken in float32 (float64 for float64 leaves) and cast once. Models that agree in an
    entry keep it bit for bit, however many there are.

    Args:
      weights: One number per model, any sign; None gives equal ones. May be a traced array.
      normalize: Whether to divide by the sum of the weights. False gives the plain weighted sum.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: Where integers, booleans and keys come from: `"base"`, the `"first"` model, the base
        after checking that all are equal (`"require_equal"`), or `"error"`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If the weights sum to zero and are to be normalised, or a model does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> models = [{"kernel": jnp.full((2, 2), x)} for x in (1.0, 4.0)]
      >>> tx = jw.merge.mean(weights=[2, 1])
      >>> float(jw.apply(tx, models[0], models=models)["kernel"][0, 0])
      2.0

    Source: Wortsman et al. 2022, Model soups, arXiv:2203.05482.
    Differs: (1) differences to the heaviest model are averaged, not the models, which is exact for
    equal entries and needs no running sum of weights to differ from zero.
    """
    name = "merge.mean"
    weights = check_weights(name, weights, normalize=normalize)
    output = Output.checked(name, out_dtype, rounding, nonfloat)

    def weigh(count: int) -> tuple[list[int], Any]:
        return list(range(count)), np.ones(count) if weights is None else weights

    return mean_of(name, weigh, normalize=normalize, names=names, output=output)


BASE = -1
Weigh = Callable[[int], tuple[list[int], Any]]


def mean_of(
    name: str, weigh: Weigh, *, normalize: bool, names: Sequence[str] | None, output: Output
) -> Transform:
    """The weighted mean of trees that are chosen once the number of models is known.

    Args:
      name: What errors call the transform.
      weigh: `number of models -> (those that are averaged, one weight each)`; `BASE` among them
        stands for the tree that is transformed.
      normalize: As in `mean`.
      names: As in `mean`.
      output: How the result is stored.

    Returns:
      The transform.
    """
    check_names(name, names)

    def update(params: Params, context: Context) -> Params:
        everything, structure = flatten(params)
        flat = selected(everything, context)
        models = require_models(name, flat, context, names, delta=False)
        chosen, shares = weigh(len(models))
        shares = per_model(name, "weights", shares, len(chosen))
        pivot = 0 if isinstance(shares, Tracer) else int(np.argmax(np.abs(shares)))

        def merge_leaf(path: Path, leaf: Any, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            key = None
            if output.rounds_randomly(leaf):
                key = path_key(context.require("key", name), path)
            dtype = compute_dtype(leaf)
            averaged = [leaf if i == BASE else leaves[i] for i in chosen]
            return _mean_of_leaves(
                averaged[pivot],
                averaged[:pivot] + averaged[pivot + 1 :],
                jnp.asarray(with_first(shares, pivot), dtype),
                key,
                normalize=normalize,
                output=output,
                dtype=output.dtype_of(leaf),
            )

        new = merge_leaves(name, flat, models, context, output, names, merge_leaf)
        return unflatten(structure, everything | new)

    return stateless(update, name=name, scope="entry" if output.rounding == "nearest" else "leaf")


def with_first(shares: Any, i: int) -> Any:
    """The weights with the `i`-th in front."""
    if i == 0:
        return shares
    shares = np.asarray(shares)
    return np.concatenate([shares[i : i + 1], np.delete(shares, i)])


@functools.partial(jax.jit, static_argnames=("normalize", "output", "dtype"))
def _mean_of_leaves(
    pivot: jax.Array,
    others: list[jax.Array],
    weights: jax.Array,  # (models,), that of the pivot first
    key: jax.Array | None,
    *,
    normalize: bool,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    merged = weighted_mean(pivot, others, weights, normalize=normalize)
    stored = output.store(merged, dtype, key)
    return stored, all_finite(stored)


def weighted_mean(
    pivot: Any, others: Sequence[Any], weights: jax.Array, *, normalize: bool
) -> jax.Array:
    """Weighted mean as the pivot plus the weighted mean of the differences to it.

    Equal models differ by exactly zero, so their mean is exact; and differences of fine-tuned
    models are small, so their rounding errors are too.

    Args:
      pivot: The array of the heaviest model.
      others: Those of the others.
      weights: `(models,)` in the dtype of the computation, that of the pivot first.
      normalize: Whether to divide by the sum of the weights.

    Returns:
      The mean, in the dtype of the computation.
    """
    total = jnp.sum(weights)
    shares = weights / total if normalize else weights
    first = pivot.astype(weights.dtype)
    shift = jnp.zeros_like(first)
    for i, other in enumerate(others, start=1):
        shift = shift + shares[i] * (other.astype(weights.dtype) - first)
    return (first if normalize else total * first) + shift
