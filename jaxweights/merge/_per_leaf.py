"""Merges that treat every leaf, or every vector of one, for itself: all of them but arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.core import Tracer

from jaxweights.core._context import Context
from jaxweights.core._layout import Layout, is_float
from jaxweights.core._paths import Flat, Params, Path, flatten, path_key, unflatten
from jaxweights.core._transform import Scope, Transform, stateless
from jaxweights.merge._models import Output, check_names, merge_leaves, require_models, selected
from jaxweights.merge._stacks import stack_axes

Group = Literal["leaf", "output", "input"]
GROUPS: tuple[Group, ...] = ("leaf", "output", "input")


class LeafJob(NamedTuple):
    """What a method sees of one leaf."""

    base: Any
    models: list[Any]
    axes: tuple[int, ...]  # along which one vector runs; every other axis has vectors of its own
    stack: tuple[int, ...]  # layers, experts
    key: jax.Array | None  # where storing the result draws random numbers
    dtype: Any  # of the result


class Merged(NamedTuple):
    """What a method returns for one leaf."""

    value: jax.Array
    finite: jax.Array  # whether all is
    odd: jax.Array | None = None  # whether the method has something to say about this leaf


def per_leaf(
    name: str,
    merge_leaf: Callable[[LeafJob], Merged],
    *,
    output: Output,
    names: Sequence[str] | None,
    fewest: int = 1,
    most: int | None = None,
    remedy: str = "",
    delta: bool = False,
    group: Group | None = "leaf",
    scope: Scope = "matrix",
    report: Callable[[list[Path]], None] | None = None,
    settings: Any = None,
) -> Transform:
    """A transform from a method that merges one leaf.

    Args:
      name: What errors call it.
      merge_leaf: The method.
      output: How results are stored.
      names: What the user calls the models.
      fewest: Least number of models.
      most: Greatest number; None for any.
      remedy: Ends the error about their number.
      delta: Whether the method takes differences to the tree, so that the tree must not be
        among the models.
      group: What one vector is; None for methods that are elementwise, and need no axes.
      scope: As in `Transform`, where rounding is to the nearest.
      report: Called with the paths of all leaves that were found odd, outside of `jit`.
      settings: As in `Transform`.

    Returns:
      The transform; it acts on every floating leaf.
    """
    check_names(name, names)

    def update(params: Params, context: Context) -> Params:
        everything, structure = flatten(params)
        flat = selected(everything, context)
        models = require_models(name, flat, context, names, delta=delta)
        check_count(name, len(models), fewest, most, remedy)
        floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
        none = dict.fromkeys(floats, ())
        stacks = none if group is None else stack_axes(name, floats, context.layout)
        axes = none if group is None else group_axes(floats, context.layout, stacks, group)
        odd: dict[Path, jax.Array] = {}

        def one(path: Path, leaf: Any, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            key = None
            if output.rounds_randomly(leaf):
                key = path_key(context.require("key", name), path)
            job = LeafJob(leaf, leaves, axes[path], stacks[path], key, output.dtype_of(leaf))
            merged = merge_leaf(job)
            if merged.odd is not None:
                odd[path] = merged.odd
            return merged.value, merged.finite

        new = merge_leaves(name, flat, models, context, output, names, one)
        if report is not None and not any(isinstance(x, Tracer) for x in odd.values()):
            found = [path for path, flag in odd.items() if flag]
            if found:
                report(found)
        return unflatten(structure, everything | new)

    scope = scope if output.rounding == "nearest" else "leaf"
    return stateless(update, name=name, scope=scope, settings=settings)


def check_count(name: str, given: int, fewest: int, most: int | None, remedy: str) -> None:
    """Refuses a number of models that a method does not take."""
    if given >= fewest and (most is None or given <= most):
        return
    wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
    raise ValueError(
        f"{name}: {given} model{'s were' if given != 1 else ' was'} given, but it merges {wanted}. "
        f"{remedy}"
    )


def group_axes(
    flat: Flat, layout: Layout, stacks: dict[Path, tuple[int, ...]], group: Group
) -> dict[Path, tuple[int, ...]]:
    """Axes along which one vector runs.

    Args:
      flat: The floating leaves.
      layout: Axes of the matrices.
      stacks: Stack axes of every leaf.
      group: `"leaf"`: all axes but the stack's; `"output"`: the inputs of one output; `"input"`:
        the outputs of one input. Biases and norms, which have no matrix, are one vector each.

    Returns:
      Ascending, non-negative axes by path.
    """
    found = {}
    for path, leaf in flat.items():
        ndim = len(leaf.shape)
        if group == "leaf" or path not in layout:
            found[path] = tuple(a for a in range(ndim) if a not in stacks[path])
        else:
            axes = layout[path]
            named = axes.inputs if group == "output" else axes.outputs
            found[path] = tuple(sorted(a % ndim for a in named))
    return found
