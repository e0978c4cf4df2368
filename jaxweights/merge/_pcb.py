"""PCB-Merging: entries compete within their model and balance against the other models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._context import Context
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Params, Path, flatten, path_key, unflatten
from jaxweights.core._select import kth_smallest, kth_smallest_of_leaves
from jaxweights.core._transform import Transform, stateless
from jaxweights.merge._delta_leaf import to_rows
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    all_finite,
    check_choice,
    check_names,
    check_weights,
    compute_dtype,
    merge_leaves,
    per_model,
    require_models,
    selected,
)
from jaxweights.merge._sphere import vectors_of
from jaxweights.merge._stacks import stack_axes

_CLIPPED = 1e-4  # share of magnitudes clipped at either end; of the authors' code
# Relative rounding of a score, for each model: exponents grow with their number.
_MARGIN = 1e-6

Leaves = list[jax.Array]
Kth = Callable[[Leaves, int], jax.Array]  # the k-th smallest of values ranked together


class _Bounds(NamedTuple):
    """Of all entries that compete; every field `(models, ...)`, to broadcast over a leaf."""

    low: jax.Array  # magnitudes are clipped to [low, high]
    high: jax.Array
    cut: jax.Array  # scores from here up count
    top: jax.Array  # the largest score


def pcb(
    *,
    density: float = 0.1,
    weights: Weights = None,
    scale: float | jax.Array = 1.0,
    scope: Literal["leaf", "tree"] = "tree",
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Weighs every entry of every delta by its size in its model and its agreement with others.

    The base is the tree that is transformed. With N deltas :math:`\tau_i`, whose magnitudes are
    clipped at the 0.01 % and 99.99 % quantiles and mapped to :math:`a_i \in [0, 1]`, an entry's
    score is

    .. math:: \beta_i = \exp(N a_i^2) \tanh\big(\tau_i \sum_j \tau_j\big)

    The `density` share of largest scores of each model, mapped to [0, 1], are the weights of a mean
    of the deltas; an entry in which no model scores stays the base's.

    Args:
      density: Share of scores that count, in (0, 1]; the authors use 0.05 to 0.1.
      weights: Multiplies each delta, but not its scores; None gives 1 each.
      scale: λ, of the whole merged delta; the authors use about 1.2. May be traced.
      scope: What competes: each matrix of a `"leaf"`, or the whole `"tree"` (within `partition`:
        the leaves of the rule).
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a setting is out of range, or a model does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"w": jnp.zeros(3)}
      >>> models = [{"w": jnp.array([1.0, 2.0, 3.0])}, {"w": jnp.array([-1.0, 0.0, 3.0])}]
      >>> jw.apply(jw.merge.pcb(density=0.3), base, models=models)["w"]
      Array([0., 0., 3.], dtype=float32)

    Source: Du et al. 2024, Parameter competition balancing, arXiv:2410.02396.
    Differs: (1) fewer than 10,000 entries are not clipped. (2) Where all scores that count are
    equal, they count fully.
    """
    name = "merge.pcb"
    if np.ndim(density) != 0 or not 0 < density <= 1:
        raise ValueError(f"{name}: density={density} must be one number in (0, 1].")
    check_choice(name, "scope", scope, ("leaf", "tree"))
    if not isinstance(scale, Tracer) and not np.isfinite(np.asarray(scale)).all():
        raise ValueError(f"{name}: scale={scale} must be finite.")
    weights = check_weights(name, weights, normalize=False)
    check_names(name, names)
    output = Output.checked(name, out_dtype, rounding, nonfloat)

    def update(params: Params, context: Context) -> Params:
        everything, structure = flatten(params)
        flat = selected(everything, context)
        models = require_models(name, flat, context, names, delta=True)
        floats = {path: leaf for path, leaf in flat.items() if is_float(leaf) and leaf.size}
        n = len(models)
        given = per_model(name, "weights", np.ones(n) if weights is None else weights, n)
        leaves = {path: (leaf, [m[path] for m in models]) for path, leaf in floats.items()}
        shared = None
        if scope == "tree":
            size = sum(leaf.size for leaf in floats.values())
            shared = _bounds(list(leaves.values()), size, density, _kth_of_all, jnp.max)
        stacks = stack_axes(name, floats, context.layout) if scope == "leaf" else {}

        def merge_leaf(path: Path, leaf: Any, others: list[Any]) -> tuple[jax.Array, jax.Array]:
            key = None
            if output.rounds_randomly(leaf):
                key = path_key(context.require("key", name), path)
            dtype = compute_dtype(leaf)
            bounds = shared
            if path not in floats:  # empty
                return leaf.astype(output.dtype_of(leaf)), jnp.asarray(True)
            if bounds is None:
                bounds = _bounds_of_leaf(leaves[path], stacks[path], density)
            return _pcb_leaf(
                leaf,
                others,
                jnp.asarray(given, dtype),
                jnp.asarray(scale, dtype),
                bounds,
                key,
                output=output,
                dtype=output.dtype_of(leaf),
            )

        new = merge_leaves(name, flat, models, context, output, names, merge_leaf)
        return unflatten(structure, everything | new)

    return stateless(update, name=name, scope=scope)


def _bounds_of_leaf(leaf: tuple[Any, list[Any]], stack: tuple[int, ...], density: float) -> _Bounds:
    """Bounds of each matrix of a stack, `(models, ...)`."""
    shape = jnp.shape(leaf[0])
    kept = [n if a in stack else 1 for a, n in enumerate(shape)]
    axes = tuple(a for a in range(len(shape)) if a not in stack)
    kth = lambda values, k: _kth_of_rows(values[0], np.uint32(k), stack).reshape(kept)  # noqa: E731
    top = lambda x: jnp.max(x, axis=axes, keepdims=True)  # noqa: E731
    return _bounds([leaf], math.prod(shape[a] for a in axes), density, kth, top)


def _bounds(
    leaves: list[tuple[Any, list[Any]]],
    size: int,
    density: float,
    kth: Kth,
    top: Callable[[jax.Array], jax.Array],
) -> _Bounds:
    """Bounds of each model, one model's values in memory at a time."""
    clipped = _CLIPPED * size
    below, above = int(clipped), math.ceil(clipped) if clipped >= 1 else 0
    rank = min(int(size * (1 - density)), size - 1) + 1
    found = []
    for i in range(len(leaves[0][1])):
        sizes = [_magnitudes(base, models[i]) for base, models in leaves]
        low, high = kth(sizes, below + 1), kth(sizes, size - above)
        del sizes
        scores = [_scores(base, models, models[i], low, high) for base, models in leaves]
        cut = kth([jnp.maximum(x, 0) for x in scores], rank)
        if isinstance(cut, Tracer) or not bool((cut > 0).all()):
            # Magnitudes are ranked: of negative scores, those from the other end.
            cut = cut - kth([jnp.maximum(-x, 0) for x in scores], size - rank + 1)
        largest = functools.reduce(jnp.maximum, [top(x) for x in scores])
        found.append((low, high, cut, largest))
    return _Bounds(*(jnp.stack(column) for column in zip(*found, strict=True)))


def _kth_of_all(values: Leaves, k: int) -> jax.Array:
    return kth_smallest_of_leaves(values, k)


@functools.partial(jax.jit, static_argnames="stack")
def _kth_of_rows(values: jax.Array, k: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda row: kth_smallest(row, k))(to_rows(values, stack))


@jax.jit
def _magnitudes(base: Any, model: Any) -> jax.Array:
    return jnp.abs(vectors_of(base, [model], deltas=True)[0]).astype(jnp.float32)


@jax.jit
def _scores(base: Any, models: list[Any], model: Any, low: jax.Array, high: jax.Array) -> jax.Array:
    deltas = vectors_of(base, models, deltas=True)
    own = vectors_of(base, [model], deltas=True)[0]
    return _score(own, jnp.asarray(sum(deltas)), len(models), low, high)


def _score(
    delta: jax.Array, total: jax.Array, models: int, low: jax.Array, high: jax.Array
) -> jax.Array:
    low, high = low.astype(delta.dtype), high.astype(delta.dtype)
    width = jnp.where(high > low, high - low, 1)
    share = (jnp.clip(jnp.abs(delta), low, high) - low) / width
    return (jnp.exp(models * share * share) * jnp.tanh(delta * total)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("output", "dtype"))
def _pcb_leaf(
    base: Any,
    models: list[Any],
    weights: jax.Array,  # (models,)
    scale: jax.Array,
    bounds: _Bounds,
    key: jax.Array | None,
    *,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    deltas = vectors_of(base, models, deltas=True)
    total = jnp.asarray(sum(deltas))
    merged = shares = jnp.zeros_like(total)
    for i, delta in enumerate(deltas):
        low, high, cut, top = (x[i] for x in bounds)
        score = _score(delta, total, len(models), low, high)
        width = jnp.where(top > cut, top - cut, 1)
        equal = (score >= cut).astype(score.dtype)
        # One entry lies on the cut itself; rounded otherwise here, it would count on its own.
        above = score - cut > _MARGIN * len(models) * jnp.abs(cut)
        share = jnp.where(above, jnp.clip((score - cut) / width, 0, 1), 0)
        share = jnp.where(top > cut, share, equal)
        share = share.astype(total.dtype)
        size = jnp.clip(jnp.abs(delta), low.astype(delta.dtype), high.astype(delta.dtype))
        merged = merged + weights[i] * share * jnp.sign(delta) * size
        shares = shares + share
    merged = merged / jnp.where(shares > 0, shares, 1)
    stored = output.store(jnp.asarray(base).astype(merged.dtype) + scale * merged, dtype, key)
    return stored, all_finite(stored, *deltas)
