"""Which leaves of a tree a method acts on, and what is wrong with those that it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxweights.core._context import Context
from jaxweights.core._feature_groups import FeatureGroups
from jaxweights.core._layout import is_default_target, is_float, is_vector
from jaxweights.core._paths import Flat, Path, fail
from jaxweights.core._stats import GRADIENT_STATISTICS, MATRIX_STATISTICS, Statistic
from jaxweights.weights._axes import View
from jaxweights.weights._input_changes import InputChange
from jaxweights.weights._weight import Weight, is_weight

Check = Callable[[Path, Any, View], str | None]
Grouped = Literal["refuse", "pool", "split"]


def inner_weight(leaf: Any) -> Any:
    """What a method acts on: behind a change of the inputs, which the statistics have seen too."""
    while isinstance(leaf, InputChange):
        leaf = leaf.base
    return leaf


def with_inner_weight(leaf: Any, inner: Any) -> Any:
    """The leaf with another weight behind its changes of the inputs."""
    if not isinstance(leaf, InputChange):
        return inner
    return dataclasses.replace(leaf, base=with_inner_weight(leaf.base, inner))  # type: ignore[type-var]


def may_be_target(path: Path, leaf: Any, named: bool) -> bool:
    """Whether a leaf is a matrix that a method acts on, as far as its name and rank say."""
    if not is_float(leaf) or len(leaf.shape) < 2:
        return False
    return named or is_default_target(path)


def targets_of(
    flat: Flat,
    context: Context,
    name: str,
    accepts: tuple[type[Weight], ...],
    refusal: str,
    check: Check | None,
    wanted: frozenset[Statistic],
    grouped: Grouped = "refuse",
) -> dict[Path, View]:
    """The leaves to transform with their views; every leaf that cannot be is one error.

    Args:
      flat: Leaves by path.
      context: What the transform was given.
      name: What errors call the transform.
      accepts: Representations that may be transformed.
      refusal: What to do instead, for other representations.
      check: What is wrong with a leaf, from its shape; of feature groups that are split, from the
        view of one with its groups as a stack axis.
      wanted: Statistics that are read.
      grouped: What becomes of the feature groups of convolutions, as in `leafwise`.
    """
    targets: dict[Path, View] = {}
    problems: list[str] = []
    for path, leaf in flat.items():
        if context.only is not None and path not in context.only:
            continue
        axes = context.layout.get(path)
        if not context.named and not _is_target(path, leaf, context):
            continue
        problem = _unfit(path, leaf, axes, accepts, refusal, context)
        if problem is None and axes is not None:
            view = View.of(leaf.shape, axes)
            groups = FeatureGroups.of(context.stats, path, leaf, view) if wanted else None
            checked = groups.view if groups is not None and grouped == "split" else view
            problem = check(path, inner_weight(leaf), checked) if check is not None else None
            problem = problem or _unfit_statistics(path, leaf, view, context, wanted, name, grouped)
            targets[path] = view
        if problem is not None:
            problems.append(problem)
    fail(name, problems)
    return targets


def _is_target(path: Path, leaf: Any, context: Context) -> bool:
    if not may_be_target(path, leaf, named=False):
        return False
    axes = context.layout.get(path)
    if context.layout.traced:  # the trace proves what is a matrix, whatever it is called
        known = axes is not None or path in dict(context.layout.unclear)
    else:
        known = not is_vector(path, leaf)
    return known and (axes is None or axes.kind != "embedding")


def _unfit(
    path: Path,
    leaf: Any,
    axes: Any,
    accepts: tuple[type[Weight], ...],
    refusal: str,
    context: Context,
) -> str | None:
    if not is_float(leaf):
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        return f"{path!r}: is {kind}, not a floating array. Leave it out with `partition`."
    inner = inner_weight(leaf)
    if is_weight(inner) and not isinstance(inner, accepts):
        return f"{path!r}: is already a {type(inner).__name__}. {refusal}"
    if axes is None:
        shape = tuple(leaf.shape)
        if len(shape) < 2:
            return (
                f"{path!r}: has shape {shape}, which is no matrix. Leave it out with `partition`."
            )
        if reason := dict(context.layout.unclear).get(path):
            return (
                f"{path!r}: {reason}. State which axes are inputs with layout={{{path!r}: "
                "Axes(inputs=..., outputs=...)}, or leave it out with `partition`."
            )
        if context.layout.traced:
            return (
                f"{path!r}: the traced model never multiplies this leaf {shape} with activations, "
                "so it has no input and output axes. Leave it out with `partition`, or state its "
                "axes with layout={pattern: Axes(inputs=..., outputs=...)}."
            )
        return (
            f"{path!r}: has shape {shape}; which of its axes are inputs and outputs is ambiguous. "
            f"Pass layout=infer_layout(fn, params, *inputs), or state it, for example "
            f"layout={{{path!r}: Axes(inputs=(-2,), outputs=(-1,))}} where other axes are stacked."
        )
    return None


def _unfit_statistics(
    path: Path,
    leaf: Any,
    view: View,
    context: Context,
    wanted: frozenset[Statistic],
    name: str,
    grouped: Grouped,
) -> str | None:
    if not wanted:
        return None
    stats = context.require("stats", name)
    problem = stats.why_other_axes(path, view.axes.inputs)
    of_inputs = wanted - frozenset(GRADIENT_STATISTICS)  # those are of any axes
    if problem is not None and of_inputs:
        return problem
    stack = stack_sizes(leaf, view)
    groups = FeatureGroups.of(stats, path, leaf, view)
    if groups is not None and of_inputs:
        if grouped == "refuse":
            return stats.why_grouped(path, stack)
        if grouped == "split" and (problem := groups.unfit(path, inner_weight(leaf))):
            return problem
        stack = (*stack, groups.count)
    for statistic in sorted(wanted):
        value = stats.get(path, statistic)
        if value is None:
            return stats.why_missing(path, statistic)
        expected = {
            "count": stack,
            **dict.fromkeys(MATRIX_STATISTICS, (*stack, view.in_dim, view.in_dim)),
            **dict.fromkeys(GRADIENT_STATISTICS, tuple(leaf.shape)),
        }.get(statistic, (*stack, view.in_dim))
        if tuple(value.shape) != expected:
            return (
                f"{path!r}: the statistic {statistic!r} has shape {tuple(value.shape)}, but a "
                f"weight of shape {tuple(leaf.shape)} needs {expected}. These statistics belong "
                "to another model or layout; calibrate this one."
            )
    return None


def stack_sizes(leaf: Any, view: View) -> tuple[int, ...]:
    """Lengths of the stack axes of a leaf."""
    return tuple(leaf.shape[a] for a in view.stack_axes(len(leaf.shape)))
