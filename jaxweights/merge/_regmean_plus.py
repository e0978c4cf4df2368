"""RegMean++: RegMean on what the merged layers below feed into the next one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core._apply import LayoutLike, apply, resolve_layout
from jaxweights.core._layout import is_float, is_vector
from jaxweights.core._partition import partition
from jaxweights.core._paths import (
    Flat,
    Params,
    Path,
    check_pattern,
    fail,
    flatten,
    matching,
    unflatten,
)
from jaxweights.core._stats import Needs, Stats
from jaxweights.core._transform import identity
from jaxweights.merge._mean import mean
from jaxweights.merge._models import Weights
from jaxweights.merge._regmean import _layout, regmean
from jaxweights.merge._views import matrix_views

_NAME = "merge.regmean_plus"


def regmean_plus(
    fn: Callable[..., Any],
    models: Sequence[Params],
    batches: Sequence[Iterable[Any]],
    *,
    stages: Sequence[str],
    weights: Weights = None,
    alpha: float = 0.9,
    damping: float = 1e-6,
    layout: LayoutLike = None,
) -> Params:
    r"""Merges layer by layer, each fitted to its models' outputs on the merged model's own inputs.

    `regmean` takes every layer's inputs from the models by themselves; behind the first merged
    layer the merged model sees others. Here the mean of the models is calibrated on each model's
    data, the first stage is fitted and put in its place, and so on with the next one. That takes as
    many passes over all data as there are layers.

    Args:
      fn: The model, `fn(params, *inputs)`.
      models: The models.
      batches: For each model, batches of its own data; they are read once a layer, so no
        generators.
      stages: Patterns of the matrices that are fitted, in the order in which data passes them, such
        as `["embed_proj", "layers/attn/.*", "layers/mlp/.*"]`. Of matrices with the layers stacked
        on an axis, one layer is fitted at a time, those of one pattern together. What no pattern
        names takes the weighted mean.
      weights: As in `regmean`.
      alpha: As in `regmean`.
      damping: As in `regmean`.
      layout: As in `apply`.

    Returns:
      The merged model, in the dtypes of the first one.

    Raises:
      TypeError: If batches are generators, or stages a single pattern.
      ValueError: If the numbers of models and of data sets differ, a pattern matches no matrix or
        an embedding, two match the same one, or what `regmean` refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> model = lambda params, x: x @ params["one"] @ params["two"]
      >>> models = [{"one": i * jnp.eye(2), "two": jnp.eye(2)} for i in (1.0, 3.0)]
      >>> data = [[jnp.eye(2)], [jnp.eye(2)]]
      >>> regmean_plus(model, models, data, stages=["one", "two"])["one"]
      Array([[2., 0.],
             [0., 2.]], dtype=float32)

    Source: Nguyen et al. 2025, arXiv:2508.03121.
    Differs: (1) a ridge towards the mean, as in `regmean`.
    """
    from jaxweights.calibrate import calibrate

    if isinstance(stages, str):
        raise TypeError(f"{_NAME}: stages={stages!r} is one pattern. Pass a list, [{stages!r}].")
    if not models:
        raise ValueError(f"{_NAME}: models is empty. Pass at least one.")
    if len(batches) != len(models):
        raise ValueError(
            f"{_NAME}: {len(batches)} sets of batches were given for {len(models)} models. Pass "
            "one per model, in their order."
        )
    if any(iter(data) is data for data in batches):
        raise TypeError(f"{_NAME}: batches are read once a layer. Pass lists, not generators.")
    merged = apply(mean(weights=weights), models[0], models=list(models))
    groups = _groups(merged, stages)
    for pattern, paths in zip(stages, groups, strict=True):
        needs: Needs = {path: frozenset(("gram", "count")) for path in paths}
        layer, depth = 0, 1
        while layer < depth:
            stats = [calibrate(fn, merged, data, needs=needs, layout=layout) for data in batches]
            flat, structure = flatten(merged)
            axes = _layer_axes(paths, flat, stats, layout)
            depth = max((flat[p].shape[a] for p, a in axes.items() if a is not None), default=1)
            tx = regmean(
                stats=[_stats_of_layer(entry, axes, layer) for entry in stats],
                weights=weights,
                alpha=alpha,
                damping=damping,
            )
            only = partition((pattern, tx), (..., identity()))
            each = [_tree_of_layer(model, axes, layer) for model in models]
            fitted = flatten(apply(only, each[0], models=each, layout=layout))[0]
            new = {path: _with_layer(flat[path], fitted[path], axes[path], layer) for path in paths}
            merged = unflatten(structure, flat | new)
            layer += 1
    return merged


def _groups(params: Params, stages: Sequence[str]) -> list[list[Path]]:
    """The matrices of every stage."""
    flat = flatten(params)[0]
    matrices = [p for p, leaf in flat.items() if is_float(leaf) and not is_vector(p, leaf)]
    groups, problems, taken = [], [], {}
    for stage in stages:
        check_pattern(_NAME, stage)
        paths = matching(stage, matrices)
        if not paths:
            problems.append(
                f"stages: {stage!r} matches no matrix. There are {matrices[:5]}. Correct it."
            )
        for path in paths:
            if path in taken:
                problems.append(f"{path!r}: is in the stages {taken[path]!r} and {stage!r}.")
            taken[path] = stage
        groups.append(paths)
    fail(_NAME, problems)
    return groups


def _layer_axes(
    paths: list[Path], flat: Flat, stats: list[Stats], layout: LayoutLike
) -> dict[Path, int | None]:
    """On which axis of each matrix of a stage its layers are stacked, if on any."""
    found = _layout(resolve_layout(flat, layout), tuple(stats), flat)
    views = matrix_views(_NAME, {path: flat[path] for path in paths}, found, named=False)
    fail(
        _NAME,
        [
            f"{path!r}: is an embedding table or empty, and has no inputs to be fitted to. Leave "
            "it out of stages, and it takes the mean."
            for path in paths
            if path not in views
        ],
    )
    return {path: next(iter(views[path].stack_axes(flat[path].ndim)), None) for path in paths}


def _tree_of_layer(tree: Params, axes: dict[Path, int | None], layer: int) -> Params:
    """A model whose matrices of the stage have one layer, on an axis of length 1."""
    flat, structure = flatten(tree)
    stacked = {path: axis for path, axis in axes.items() if axis is not None}
    return unflatten(
        structure, flat | {path: _one(flat[path], axis, layer) for path, axis in stacked.items()}
    )


def _stats_of_layer(stats: Stats, axes: dict[Path, int | None], layer: int) -> Stats:
    """The statistics of this layer; layers are the first axis of what was collected of a stack."""
    stacked = {stats.owner(path) for path, axis in axes.items() if axis is not None}
    values = {
        path: {name: _one(value, 0, layer) for name, value in entry.items()}
        if path in stacked
        else entry
        for path, entry in stats.values.items()
    }
    return dataclasses.replace(stats, values=values)


def _one(array: jax.Array, axis: int, layer: int) -> jax.Array:
    """One layer; the last one where there are not so many, whose result nobody takes."""
    start = min(layer, array.shape[axis] - 1)
    return jax.lax.slice_in_dim(jnp.asarray(array), start, start + 1, axis=axis)


def _with_layer(old: jax.Array, new: jax.Array, axis: int | None, layer: int) -> jax.Array:
    """The old matrices, of which one layer is the new one."""
    if axis is None:
        return new
    if layer >= old.shape[axis]:
        return old
    return jax.lax.dynamic_update_slice_in_dim(jnp.asarray(old), new, layer, axis=axis)
