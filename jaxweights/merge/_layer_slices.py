"""Slices of layers: what is checked before they are stacked, and what each one changes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, Path, check_pattern, fail, matching, nearest
from jaxweights.merge._models import compute_dtype
from jaxweights.weights._weight import is_weight

NAME = "merge.stack_layers"
PREFIX_END = "(?=[/.]|$)"  # of the beginning of a path


class LayerSlice(NamedTuple):
    """Some layers of a model, in their order."""

    model: Params
    """The tree that they are taken of."""
    start: int
    """The first layer that is taken."""
    stop: int
    """The layer before which it ends."""
    scale: Mapping[str, float] | None = None
    """Factors by pattern of a leaf's path; the first pattern that matches a leaf holds."""


def checked_slices(slices: Sequence[Any]) -> list[LayerSlice]:
    """Slices from a user's tuples; what is wrong in itself is refused."""
    if not slices:
        raise ValueError(f"{NAME}: slices is empty. Pass at least one (model, start, stop).")
    parts = []
    for i, given in enumerate(slices):
        if not isinstance(given, tuple) or len(given) not in (3, 4):
            raise TypeError(
                f"{NAME}: slices[{i}] must be (model, start, stop) or (model, start, stop, scale)."
            )
        part = LayerSlice(*given)
        for bound in (part.start, part.stop):
            if isinstance(bound, bool) or not isinstance(bound, int | np.integer):
                raise TypeError(f"{NAME}: slices[{i}]: {bound!r} must be an integer.")
        for pattern, factor in (part.scale or {}).items():
            check_pattern(f"{NAME}: slices[{i}]: scale", pattern)
            if not math.isfinite(factor):
                raise ValueError(
                    f"{NAME}: slices[{i}]: scale={factor} of {pattern!r} must be finite."
                )
        parts.append(part)
    return parts


def check_range(i: int, part: LayerSlice, count: int) -> str | None:
    """Why a range does not fit a model of `count` layers."""
    if 0 <= part.start < part.stop <= count:
        return None
    return (
        f"slices[{i}] takes layers {part.start} to {part.stop} (exclusive), but its model has "
        f"{count}, numbered from 0. Choose 0 <= start < stop <= {count}."
    )


def require_layers(
    stacked: Sequence[Sequence[Path]], flats: list[Flat], prefix: re.Pattern[str]
) -> None:
    """Refuses models without a leaf that `layers` begins."""
    layers = prefix.pattern.removeprefix("(?:").removesuffix(f"){PREFIX_END}")
    fail(
        NAME,
        [
            f"layers={layers!r} begins no path of slices[{i}]. The nearest paths: "
            f"{nearest(layers, flats[i])}."
            for i, paths in enumerate(stacked)
            if not paths
        ],
    )


def require_fitting(layered: Mapping[Any, Flat], shapes: Mapping[Any, Any], dtype: Any) -> None:
    """Refuses layers of different leaves, widths or dtypes."""
    (first, leaves), *rest = layered.items()
    named = lambda label: label if isinstance(label, str) else f"slices[{label}]"  # noqa: E731
    problems = []
    for label, others in rest:
        missing = [path for path in leaves if path not in others]
        extra = [path for path in others if path not in leaves]
        if missing or extra:
            problems.append(
                f"{named(label)} lacks {missing[:5]} and has {extra[:5]} beside what "
                f"{named(first)} has. Layers must be of one architecture."
            )
        for path in (path for path in leaves if path in others):
            wide = shapes[first][path], shapes[label][path]
            kinds = tuple(getattr(x[path], "dtype", type(x[path])) for x in (leaves, others))
            if wide[0] != wide[1]:
                problems.append(
                    f"{path!r}: a layer is {wide[1]} in {named(label)} but {wide[0]} in "
                    f"{named(first)}. Layers can be stacked only where they have the same widths."
                )
            elif kinds[0] != kinds[1] and not (dtype is not None and all(map(_floats, kinds))):
                problems.append(
                    f"{path!r}: is {kinds[1]} in {named(label)} but {kinds[0]} in {named(first)}. "
                    "Pass out_dtype to cast them."
                )
    fail(NAME, problems)


def _floats(dtype: Any) -> bool:
    return not isinstance(dtype, type) and bool(jnp.issubdtype(dtype, jnp.floating))


def outer_leaves(flats: list[Flat], inside: Sequence[set[Path]], after: str, dtype: Any) -> Flat:
    """The leaves that are no layers, each from the model that owns it."""
    first, last = ({p: x for p, x in flats[i].items() if p not in inside[i]} for i in (0, -1))
    if first.keys() != last.keys():
        raise ValueError(
            f"{NAME}: outside of the layers slices[0] has {sorted(first.keys() - last.keys())[:5]}"
            f" and slices[{len(flats) - 1}] {sorted(last.keys() - first.keys())[:5]}, which the "
            "other lacks. Models must be of one architecture; drop what only one has."
        )
    behind = set(matching(after, first))
    return {
        path: scaled(last[path] if path in behind else leaf, 1.0, dtype)
        for path, leaf in first.items()
    }


def leaf_factors(i: int, part: LayerSlice, leaves: Flat) -> dict[Path, float]:
    """The factor of every leaf that has one."""
    found: dict[Path, float] = {}
    problems = []
    for pattern, factor in (part.scale or {}).items():
        matched = matching(pattern, leaves)
        if not matched:
            problems.append(
                f"slices[{i}]: scale: pattern {pattern!r} matches no leaf of its layers. The "
                f"nearest paths: {nearest(pattern, leaves)}."
            )
        for path in matched:
            found.setdefault(path, float(factor))
            if not isinstance(leaves[path], jax.Array | np.ndarray) or not is_float(leaves[path]):
                problems.append(
                    f"{path!r}: is {_kind(leaves[path])} in slices[{i}] and cannot be scaled. Put "
                    "a pattern with factor 1 before this one, or materialize the model."
                )
    fail(NAME, problems)
    return {path: factor for path, factor in found.items() if factor != 1}


def _kind(leaf: Any) -> str:
    return type(leaf).__name__ if is_weight(leaf) else str(getattr(leaf, "dtype", type(leaf)))


def scaled(leaf: Any, factor: float, dtype: Any) -> Any:
    """The leaf itself where nothing changes it."""
    if dtype is not None and is_float(leaf) and leaf.dtype != dtype:
        kept = jnp.dtype(dtype)
    elif factor == 1:
        return leaf
    else:
        kept = leaf.dtype
    wide = leaf if is_weight(leaf) else jnp.asarray(leaf).astype(compute_dtype(leaf))
    return (wide if factor == 1 else wide * jnp.asarray(factor, wide.dtype)).astype(kept)
