"""apply: runs a transform once over a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core._context import Context, Progress
from jaxweights.core._host import on_host
from jaxweights.core._layout import Layout, conventional_layout
from jaxweights.core._paths import (
    Flat,
    Params,
    Path,
    check_pattern,
    fail,
    flatten,
    matching,
    no_match,
    unflatten,
)
from jaxweights.core._stats import Stats
from jaxweights.core._transform import Transform
from jaxweights.core._untouched import untouched_tree
from jaxweights.weights._axes import Axes

LayoutLike = Layout | Mapping[str, Axes] | None


def apply(
    tx: Transform,
    params: Params,
    *,
    stats: Stats | None = None,
    models: Sequence[Params] | None = None,
    grads: Params | None = None,
    key: jax.Array | None = None,
    step: int | jax.Array | None = None,
    layout: LayoutLike = None,
    progress: Progress | None = None,
) -> Params:
    """Transforms a tree: builds the context, initialises, updates once, drops the state.

    Tied leaves (one array at several paths) are transformed once, by the statistics of all their
    uses, and stay tied.

    Args:
      tx: The transform.
      params: Tree of arrays and represented weights, concrete, traced or abstract.
      stats: Statistics from `calibrate`.
      models: Other models, for transforms that read them; trees like `params`, tied alike.
      grads: Gradients; a tree like `params`.
      key: Randomness; every leaf gets a key of its own from it.
      step: Updates so far.
      layout: Axes of the leaves: a `Layout` from `infer_layout`, or a mapping from patterns to
        `Axes`, which wins over what the statistics' or the conventional layout says.
      progress: Called on the host with (path, done, total) after each leaf.

    Returns:
      The tree, transformed.

    Raises:
      TypeError: If an argument is of another kind, such as a tree in the transform's place.
      ValueError: If something that the transform needs is missing, a leaf does not suit it, the
        transform gives back another tree, or a method of this library finds no leaf to change.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}}
      >>> pruned = jw.apply(jw.sparsify.magnitude(sparsity=0.5), params)
      >>> float(pruned["dense"]["kernel"].mask.mean())
      0.5
    """
    _check_arguments(tx, stats, models, key, layout)
    new = transform_tree(
        tx,
        params,
        stats=stats,
        models=models,
        grads=grads,
        key=key,
        step=step,
        layout=layout,
        progress=progress,
    )
    axes = lambda: resolve_layout(params, layout, stats)  # noqa: E731
    fail("apply", untouched_tree(tx.name, params, new, axes))
    return new


def transform_tree(
    tx: Transform,
    params: Params,
    *,
    stats: Stats | None = None,
    models: Sequence[Params] | None = None,
    grads: Params | None = None,
    key: jax.Array | None = None,
    step: int | jax.Array | None = None,
    layout: LayoutLike = None,
    progress: Progress | None = None,
) -> Params:
    """As `apply`, for trees that may have nothing to transform, such as one leaf of a stream."""
    flat, structure = flatten(params)
    unique, representative = _untie(flat)
    _refuse_torn_ties(tx, representative)
    resolved = resolve_layout(flat, layout, stats)
    _refuse_other_model(flat, resolved)
    context = Context(
        stats=None if stats is None else stats.of_tied(representative),
        models=None if models is None else _flat_models(models, representative),
        grads=None if grads is None else flatten(grads)[0],
        step=None if step is None else jnp.asarray(step, jnp.int32),
        key=key,
        layout=resolved,
        tied=tuple((first, path) for path, first in representative.items() if path != first),
        progress=progress,
    )
    new, _ = tx.update(unique, tx.init(unique), context)
    if dropped := [path for path in unique if path not in new]:
        raise ValueError(
            f"apply: {tx.name} gave back no leaf at {dropped[:5]}. A transform must return a tree "
            "with the paths that it was given."
        )
    return unflatten(structure, {path: new[representative[path]] for path in flat})


def _check_arguments(tx: Any, stats: Any, models: Any, key: Any, layout: Any) -> None:
    """Refuses arguments of another kind, before anything is computed."""
    if not isinstance(tx, Transform):
        raise TypeError(
            f"apply: the first argument is a {type(tx).__name__}, not a transform. Write "
            "apply(tx, params), with a transform such as quantize.round_to_nearest(bits=4)."
        )
    if stats is not None and not isinstance(stats, Stats):
        raise TypeError(
            f"apply: stats is a {type(stats).__name__}. Pass what calibrate(fn, params, batches, "
            "needs=tx.needs(params)) returns."
        )
    if models is not None and not isinstance(models, list | tuple):
        raise TypeError(
            f"apply: models is a {type(models).__name__}. Pass a list of trees, models=[model] "
            "where there is one."
        )
    if key is not None and not hasattr(key, "dtype"):
        raise TypeError(
            f"apply: key={key!r} is a {type(key).__name__}. Pass key=jax.random.key({key!r})."
            if isinstance(key, int)
            else f"apply: key is a {type(key).__name__}. Pass key=jax.random.key(0)."
        )
    if layout is not None and not isinstance(layout, Mapping):
        raise TypeError(
            f"apply: layout is a {type(layout).__name__}. Pass infer_layout(fn, params, *inputs), "
            "or a dict from patterns of paths to Axes."
        )


def resolve_layout(params: Params, layout: LayoutLike, stats: Stats | None = None) -> Layout:
    """The layout to use: the caller's, else the statistics', else the conventional one."""
    if isinstance(layout, Layout):
        return layout
    found = stats.layout if stats is not None and len(stats.layout) else conventional_layout(params)
    if not layout:
        return found
    paths = flatten(params)[0]
    stated: dict[Path, Axes] = {}
    problems = []
    for pattern, axes in layout.items():
        check_pattern("apply: layout", pattern)
        matched = matching(pattern, paths)
        stated |= dict.fromkeys(matched, axes)
        if not matched:
            problems.append(no_match(pattern, paths))
    fail("apply: layout", problems)
    return found.with_stated(stated)


def _refuse_torn_ties(tx: Transform, representative: dict[Path, Path]) -> None:
    """Refuses rules that treat two names of one array differently: only one can be kept."""
    fail(
        "apply",
        (
            f"{path!r}: is the same array as {first!r}, but {theirs} takes the one and {ours} the "
            "other. Let one rule name both, or give the tree a copy of its own at one path, such "
            "as jnp.copy(leaf), which unties them."
            for path, first in representative.items()
            if path != first and (ours := tx.rule_of(first)) != (theirs := tx.rule_of(path))
        ),
    )


def _refuse_other_model(flat: Flat, layout: Layout) -> None:
    """Refuses statistics or a layout whose model had other leaves than the tree has."""
    if not layout.seen or layout.seen == tuple(flat):
        return
    lacking = [path for path in layout.seen if path not in flat]
    unknown = [path for path in flat if path not in layout.seen]
    words = []
    if lacking:
        words.append(f"the tree lacks {lacking[:5]}, which the traced model has")
    if unknown:
        words.append(f"the tree has {unknown[:5]}, which the traced model lacks")
    if words:
        raise ValueError(
            f"apply: {' and '.join(words)}. The statistics or the layout belong to another tree; "
            "calibrate, or infer the layout, with the one that is transformed."
        )


def _flat_models(models: Sequence[Params], representative: dict[Path, Path]) -> tuple[Flat, ...]:
    """The models by path, after what they hold and the tree cannot was refused."""
    flats = tuple(flatten(model)[0] for model in models)
    tied = {path: first for path, first in representative.items() if path != first}
    problems = []
    for i, flat in enumerate(flats):
        if extra := [path for path in flat if path not in representative]:
            problems.append(
                f"models[{i}] has {extra[:5]}, which params lacks. Remove them from it, or start "
                "from a tree that has them."
            )
        problems += [
            f"{path!r}: is tied to {first!r} in params, but models[{i}] holds other values there. "
            "Give params a copy of its own at this path."
            for path, first in tied.items()
            if path in flat and first in flat and _differ(flat[path], flat[first])
        ]
    fail("apply", problems)
    return flats


def _differ(first: Any, second: Any) -> bool:
    known = all(isinstance(x, jax.Array | np.ndarray) for x in (first, second))
    if first is second or not known or isinstance(first, Tracer) or isinstance(second, Tracer):
        return False
    if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in (first, second)):
        return False
    return not np.array_equal(on_host(first), on_host(second))


def _untie(flat: Flat) -> tuple[Flat, dict[Path, Path]]:
    """Keeps the first path of every array; maps each path to the one that was kept."""
    first: dict[int, Path] = {}
    representative: dict[Path, Path] = {}
    for path, leaf in flat.items():
        tieable = isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim > 0
        representative[path] = first.setdefault(id(leaf), path) if tieable else path
    return {path: flat[path] for path in flat if representative[path] == path}, representative
