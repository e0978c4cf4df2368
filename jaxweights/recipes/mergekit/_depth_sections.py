"""The parts of a merge report that follow the layers: figures by depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.recipes import _html as html
from jaxweights.recipes.mergekit._config import MergeConfig
from jaxweights.recipes.mergekit._figures import MOST_LINES, by_depth
from jaxweights.recipes.mergekit._found import Found, pair_cosines


def cosines_by_depth(found: Found) -> str:
    """How alike the deltas are in each layer."""
    return _kinds_by_depth(
        found,
        "cosines-by-depth",
        "mean cosine",
        lambda one: float(pairs.mean()) if (pairs := pair_cosines(one)).size else math.nan,
        "Mean over the pairs of models, by kind of matrix.",
    )


def conflicts_by_depth(found: Found) -> str:
    """How many entries the models push in both directions, in each layer."""
    return _kinds_by_depth(
        found,
        "conflicts-by-depth",
        "entries in conflict",
        lambda one: one.sign_conflict if len(one.models) > 1 else math.nan,
        "Share of the entries that one model raises and another lowers, by kind of matrix. Of two "
        "unrelated deltas that change every entry it is 50 %, of three 75 %.",
        percent=True,
    )


def _kinds_by_depth(
    found: Found, name: str, label: str, measure: Any, caption: str, *, percent: bool = False
) -> str:
    if not found.has_pairs:
        return ""
    values: dict[str, dict[int, list[float]]] = {}
    sizes: dict[str, int] = {}
    for layer, kind, one in found.layered:
        value = measure(one)
        if math.isfinite(value):
            values.setdefault(kind, {}).setdefault(layer, []).append(value)
            sizes[kind] = sizes.get(kind, 0) + math.prod(one.shape)
    if not values:
        return ""
    largest = sorted(sizes, key=lambda kind: -sizes[kind])[:MOST_LINES]
    if len(values) > len(largest):
        caption += f" The {len(largest)} largest of {len(values)} kinds."
    lines = {
        kind: {layer: float(np.mean(some)) for layer, some in line.items()}
        for kind, line in values.items()
        if kind in largest
    }
    return html.figure(by_depth(name, lines, label, percent=percent), caption)


def sizes_by_depth(found: Found) -> str:
    """How far each model went from the origin, in each layer."""
    sums: dict[str, dict[int, np.ndarray]] = {}
    for layer, _, one in found.layered:
        for model, square in zip(one.models, np.diagonal(one.gram), strict=True):
            at = sums.setdefault(model, {}).setdefault(layer, np.zeros(2))
            at += (square, one.origin_square)
    return _models_by_depth(
        found,
        "sizes-by-depth",
        {
            model: {k: math.sqrt(a / b) for k, (a, b) in line.items() if b > 0}
            for model, line in sums.items()
        },
        "size of the delta",
        "Norm of a model's delta over that of the origin, of all matrices of a layer together.",
    )


def kept_by_depth(config: MergeConfig, found: Found) -> str:
    """What the entries that a density leaves hold of each delta, in each layer."""
    sums: dict[str, dict[int, np.ndarray]] = {}
    for layer, _, one in found.layered:
        for i, model in enumerate(one.models if one.kept is not None else ()):
            assert one.kept is not None
            at = sums.setdefault(model, {}).setdefault(layer, np.zeros(2))
            at += (one.kept[i], one.gram[i, i])
    return _models_by_depth(
        found,
        "kept-by-depth",
        {model: {k: a / b for k, (a, b) in line.items() if b > 0} for model, line in sums.items()},
        "energy held",
        "Share of a delta's sum of squares that its largest entries hold, as many of them as its "
        f"density says. {_what_is_kept(config.method)}",
    )


def _what_is_kept(method: str) -> str:
    if method == "ties":
        return "These are what ties keeps."
    if method.startswith("breadcrumbs"):
        return f"{method} also drops the very largest, so it keeps less."
    if method.startswith("della"):
        return f"{method} draws entries, large ones more often than others, so it keeps less."
    return f"{method} draws entries at random, which hold their density of it on average."


def _models_by_depth(
    found: Found, name: str, lines: Mapping[str, Mapping[int, float]], label: str, caption: str
) -> str:
    shown = {found.models[model]: line for model, line in lines.items() if line}
    if not shown:
        return ""
    if len(shown) > MOST_LINES:
        caption += f" The first {MOST_LINES} of {len(shown)} models."
        shown = dict(list(shown.items())[:MOST_LINES])
    return html.figure(by_depth(name, shown, label, percent=True), caption)
