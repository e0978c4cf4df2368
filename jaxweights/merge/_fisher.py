"""The Fisher-weighted mean: every entry by how much each model's predictions depend on it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._context import Context
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, path_key, unflatten
from jaxweights.core._transform import Transform, stateless
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    all_finite,
    check_choice,
    check_names,
    check_positive_weights,
    compute_dtype,
    label,
    merge_leaves,
    per_model,
    require_models,
    selected,
)
from jaxweights.merge._stacks import stack_axes

Normalization = Literal["none", "leaf", "model"]

_NAME = "merge.fisher"


def fisher(
    *,
    fishers: Sequence[Params],
    weights: Weights = None,
    normalize: Normalization = "none",
    damping: float = 1e-6,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Averages models, each entry weighted by its Fisher information in each model.

    .. math:: \theta = \frac{\sum_i w_i (F_i + \epsilon) \odot \theta_i}
              {\sum_i w_i (F_i + \epsilon)}

    Entries that matter to no model take the weighted mean. Models that agree in an entry keep it
    bit for bit.

    Args:
      fishers: One tree like the models per model, in the order of `models`: the diagonal Fisher
        information from `diagonal_fisher`, computed or loaded from a checkpoint.
      weights: One number per model, none negative; None gives equal ones.
      normalize: Divides the Fisher information by its Euclidean norm over the whole `"model"`,
        or over each `"leaf"` (each layer of a stack), or by nothing (`"none"`). Data sets of
        different difficulty then count alike.
      damping: ε, as a fraction of the mean of the models' Fisher information over the leaf
        (the layer, in a stack). At 0, entries that are zero in all models take the mean.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), as in `mean`.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a model's Fisher information lacks a leaf, does not fit, or is negative.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> models = [{"bias": jnp.array([0.0, 0.0])}, {"bias": jnp.array([1.0, 1.0])}]
      >>> fishers = [{"bias": jnp.array([3.0, 0.0])}, {"bias": jnp.array([1.0, 0.0])}]
      >>> jw.apply(jw.merge.fisher(fishers=fishers), models[0], models=models)["bias"].round(3)
      Array([0.25, 0.5 ], dtype=float32)

    Source: Matena and Raffel 2021, arXiv:2111.09832, equation 3.
    Differs: (1) ε is relative to the leaf, so that the unit of the loss does not matter.
    """
    trees = [flatten(tree)[0] for tree in fishers]
    if not trees:
        raise ValueError(f"{_NAME}: fishers is empty. Pass one tree per model.")
    check_choice(_NAME, "normalize", normalize, ("none", "leaf", "model"))
    if not damping >= 0:
        raise ValueError(f"{_NAME}: damping={damping} must not be negative.")
    weights = check_positive_weights(_NAME, weights)
    check_names(_NAME, names)
    output = Output.checked(_NAME, out_dtype, rounding, nonfloat)

    def update(params: Params, context: Context) -> Params:
        everything, structure = flatten(params)
        flat = selected(everything, context)
        models = require_models(_NAME, flat, context, names, delta=False)
        per_model(_NAME, "fishers", list(range(len(trees))), len(models))
        shares = np.ones(len(models)) if weights is None else weights
        per_model(_NAME, "weights", shares, len(models))
        floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
        _require_fit(floats, trees, names)
        stacks = stack_axes(_NAME, floats, context.layout)
        norms = None
        if normalize == "model":
            norms = [_norm_of_tree([tree[path] for path in floats]) for tree in trees]
        valid = {}

        def merge_leaf(path: Path, leaf: Any, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            key = None
            if output.rounds_randomly(leaf):
                key = path_key(context.require("key", _NAME), path)
            compute = compute_dtype(leaf)
            merged, finite, valid[path] = _fisher_of_leaves(
                leaves,
                [tree[path] for tree in trees],
                jnp.asarray(shares, compute),
                norms,
                jnp.asarray(damping, compute),
                key,
                stack=stacks[path],
                per_leaf=normalize == "leaf",
                output=output,
                dtype=output.dtype_of(leaf),
            )
            return merged, finite

        new = merge_leaves(_NAME, flat, models, context, output, names, merge_leaf)
        if not any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in valid.values()):
            bad = [path for path, good in valid.items() if not np.all(good)]
            fail(_NAME, [_invalid(path, valid[path], names) for path in bad])
        return unflatten(structure, everything | new)

    return stateless(update, name=_NAME, scope="tree" if normalize == "model" else "leaf")


def _require_fit(flat: Flat, trees: list[Flat], names: Sequence[str] | None) -> None:
    problems = []
    for i, tree in enumerate(trees):
        whose = f"the Fisher information of {label(names, i)}"
        for path, leaf in flat.items():
            if path not in tree:
                problems.append(f"{path!r}: is missing from {whose}. Compute it of this model.")
            elif np.shape(tree[path]) != np.shape(leaf):
                problems.append(
                    f"{path!r}: is {np.shape(tree[path])} in {whose} but {np.shape(leaf)} in the "
                    "base. Compute it of this model."
                )
    fail(_NAME, problems)


def _invalid(path: Path, valid: Any, names: Sequence[str] | None) -> str:
    whose = ", ".join(label(names, i) for i, good in enumerate(np.asarray(valid)) if not good)
    return (
        f"{path!r}: the Fisher information of {whose} has entries that are negative or not finite. "
        "It is a mean of squares; compute it again with `diagonal_fisher`."
    )


@functools.partial(jax.jit, static_argnames=("stack", "per_leaf", "output", "dtype"))
def _fisher_of_leaves(
    leaves: list[jax.Array],
    fishers: list[jax.Array],
    weights: jax.Array,  # (models,)
    norms: list[jax.Array] | None,
    damping: jax.Array,
    key: jax.Array | None,
    *,
    stack: tuple[int, ...],
    per_leaf: bool,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The merged leaf, whether it is finite, and per model whether its information is valid."""
    compute = weights.dtype
    axes = tuple(a for a in range(leaves[0].ndim) if a not in stack)
    information = [f.astype(compute) for f in fishers]
    valid = jnp.stack([jnp.all((f >= 0) & jnp.isfinite(f)) for f in information])
    if per_leaf:
        norms = [_norm(f, axes) for f in information]
    if norms is not None:
        information = [
            f / _or_one(norm).astype(compute) for f, norm in zip(information, norms, strict=True)
        ]
    # One ε for all models: where none of them cares, all count alike.
    levels = [jnp.mean(f, axis=axes, keepdims=True) for f in information]
    level = sum(levels[1:], start=levels[0]) / len(levels)
    shares = [weights[i] * (f + damping * level) for i, f in enumerate(information)]
    total = sum(shares[1:], start=shares[0])
    plain = weights / jnp.sum(weights)
    first = leaves[0].astype(compute)
    shift = jnp.zeros_like(first)
    for i, other in enumerate(leaves[1:], start=1):
        share = jnp.where(total > 0, shares[i] / _or_one(total), plain[i])
        shift = shift + share * (other.astype(compute) - first)
    stored = output.store(first + shift, dtype, key)
    # Invalid information has an error of its own.
    return stored, all_finite(stored) | ~jnp.all(valid), valid


@jax.jit
def _norm_of_tree(leaves: list[Any]) -> jax.Array:
    norms = jnp.stack([_norm(jnp.asarray(x).astype(jnp.float32), None).reshape(()) for x in leaves])
    return _norm(norms, None).reshape(())


def _norm(x: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """Euclidean norm that neither overflows nor underflows: entries are squares already."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    unit = x / _or_one(largest)
    return largest * jnp.sqrt(jnp.sum(unit * unit, axis=axes, keepdims=True))


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.ones_like(x))
