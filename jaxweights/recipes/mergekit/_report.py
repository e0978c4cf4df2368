"""The merge report: how the models' deltas relate, in one HTML file with its figures inside."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._atomic import atomic
from jaxweights.checkpoint._check_destination import check_destination
from jaxweights.recipes._figures import MOST_CURVES, loss_curves
from jaxweights.recipes._report import (
    _STYLE,
    _figure,
    _section,
    _table,
    _text,
    barrier_sentence,
)
from jaxweights.recipes.mergekit._config import MergeConfig
from jaxweights.recipes.mergekit._evaluate import Scores
from jaxweights.recipes.mergekit._figures import MOST_LINES, by_depth, cosine_heatmaps
from jaxweights.recipes.mergekit._methods import METHODS
from jaxweights.recipes.mergekit._model_ref import ModelRef
from jaxweights.recipes.mergekit._models import LayerName, Model
from jaxweights.recipes.mergekit._plan import PlannedTensor
from jaxweights.stream._delta_stats import DeltaRequest, DeltaStats, cosines
from jaxweights.stream._jobs import Operand
from jaxweights.stream._run import Streamed

_NAME = "jaxweights merge"
_WIDER = "main { max-width: 70rem; }\n"  # for the table of tensors
_FEW = 4  # models that get columns of their own


def check_report(
    report: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    config: str | os.PathLike[str],
    *,
    overwrite: bool,
) -> None:
    """Refuses, before any work, a report that could not be written at the end.

    Args:
      report: The file to make.
      destination: The merged checkpoint.
      config: The configuration.
      overwrite: Whether an existing file may be replaced.

    Raises:
      FileExistsError: If it exists.
      ValueError: If it is one of the other files of the run.
      ImportError: If there is nothing to draw with.
    """
    check_destination(_NAME, report, overwrite=overwrite, directory=False)
    places = {"destination": destination, "configuration": config}
    for what, place in places.items():
        if os.path.realpath(place) == os.path.realpath(report):
            raise ValueError(
                f"{_NAME}: the report '{report}' would replace the {what}. Give it a name of its "
                "own, such as report.html."
            )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            f"{_NAME}: the report's figures need matplotlib. Install it, or merge without --report."
        ) from None


def delta_requests(
    config: MergeConfig,
    models: Mapping[ModelRef, Model],
    tensors: Sequence[PlannedTensor],
) -> list[DeltaRequest]:
    """What is compared: every merged tensor of the models with that of the base.

    Where the method merges models rather than deltas, the origin is the configuration's base if it
    names one, and the first model if not.

    Args:
      config: The document.
      models: Its models.
      tensors: What it makes.

    Returns:
      One for each tensor that more than one model takes part in.
    """
    base = None
    if METHODS[config.method].merges_base and config.base_model is not None:
        base = models[config.base_model]
    requests = []
    for tensor in tensors:
        if tensor.method == "copy" or not tensor.job.entries:
            continue
        origin, *_ = operands = tensor.job.operands
        if base is not None and base.label in tensor.inputs:
            origin = Operand(base.tensors, tensor.inputs[base.label], base.label)
        # A model that an average names twice has one delta.
        others = dict.fromkeys(operand for operand in operands if operand != origin)
        if others:
            kept = _kept(tensor, len(others))
            requests.append(DeltaRequest(tensor.job.name, (origin, *others), kept))
    return requests


def _kept(tensor: PlannedTensor, n: int) -> tuple[int, ...] | None:
    """How many entries the densities leave, as the methods count them."""
    density = tensor.parameters.get("density")
    if tensor.method == "task_arithmetic" or not isinstance(density, dict) or len(density) != n:
        return None
    if all(share >= 1 for share in density.values()):
        return None
    entries = tensor.job.entries
    return tuple(
        min(max(int(share * entries), 1), entries) if share > 0 else 0 for share in density.values()
    )


def write_report(
    report: str | os.PathLike[str],
    config: MergeConfig,
    text: str,
    stats: Sequence[DeltaStats],
    done: Streamed,
    scores: Scores | None = None,
    *,
    overwrite: bool,
) -> None:
    """Writes the page, whole or not at all.

    Args:
      report: The file to make.
      config: The document that was merged.
      text: The configuration as it was written.
      stats: What was found about every tensor that was merged.
      done: What the merge did.
      scores: Perplexities, where they were measured.
      overwrite: Whether an existing file may be replaced.
    """
    page = render_report(config, text, stats, done, scores)
    with atomic(_NAME, report, directory=False, overwrite=overwrite) as partial:
        partial.write_text(page, encoding="utf-8")


def render_report(
    config: MergeConfig,
    text: str,
    stats: Sequence[DeltaStats],
    done: Streamed,
    scores: Scores | None = None,
) -> str:
    """Writes the report of a merge.

    Args:
      config: The document that was merged.
      text: The configuration as it was written.
      stats: What was found about every tensor that was merged.
      done: What the merge did.
      scores: Perplexities, where they were measured.

    Returns:
      HTML that needs no other file and no network, with every text escaped.
    """
    title = f"{config.method}: how the models' deltas relate"
    if stats:
        found = _Found.of(stats)
        content = [
            f'<p class="lead">{_lead(config, found, done)}</p>',
            _cards(found),
            _section("Cosines between the deltas", _cosines(found)),
            _section("Cosines by depth", _cosines_by_depth(found)),
            _section("Sign conflicts by depth", _conflicts_by_depth(found)),
            _section("Size of the deltas by depth", _sizes_by_depth(found)),
            _section("What the largest entries hold, by depth", _kept_by_depth(config, found)),
            _section("Every tensor", _tensors(found)),
        ]
    else:
        content = [
            '<p class="lead">Nothing was merged with anything: every tensor is a copy of one '
            "model's, so there are no deltas to compare.</p>"
        ]
    body = [
        f"<h1>{_text(title)}</h1>",
        *content,
        _section("Perplexity", _scores(scores)),
        _section("The configuration", f"<pre>{_text(text)}</pre>"),
        '<footer class="note">Written by jaxweights.</footer>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}{_WIDER}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    """The numbers with what tensors and models are called on the page."""

    stats: Sequence[DeltaStats]
    models: dict[str, str]  # short names by label, of those that are not the origin
    origins: tuple[str, ...]
    layered: tuple[tuple[int, str, DeltaStats], ...]  # layer, kind and numbers of matrices

    @classmethod
    def of(cls, stats: Sequence[DeltaStats]) -> _Found:
        labels = list(dict.fromkeys(label for one in stats for label in one.models))
        layered = []
        stacks = {p.before for one in stats if (p := LayerName.of(one.name)) is not None}
        for one in stats:
            parts = LayerName.of(one.name)
            if parts is None or len(one.shape) < 2:
                continue
            kind = re.sub(r"\.?weight$", "", re.sub(r"\.\d+\.", ".*.", parts.behind).lstrip("."))
            where = f"{parts.before.rstrip('.')}: " if len(stacks) > 1 else ""
            layered.append((parts.layer, where + (kind or "weight"), one))
        origins = tuple(dict.fromkeys(one.origin for one in stats))
        return cls(stats, _short(labels), origins, tuple(layered))

    @property
    def has_pairs(self) -> bool:
        """Whether any tensor has two deltas."""
        return any(len(one.models) > 1 for one in self.stats)

    def grams(self, stats: Sequence[DeltaStats]) -> np.ndarray:
        """`(models, models)`, sums of products of whole deltas."""
        total = np.zeros((len(self.models),) * 2)
        for one in stats:
            places = self._places(one)
            np.add.at(total, np.ix_(places, places), one.gram)
        return total

    def mean_cosine(self, stats: Sequence[DeltaStats]) -> np.ndarray:
        """`(models, models)`, mean over tensors that both models change; NaN where none is."""
        total, count = np.zeros((2, len(self.models), len(self.models)))
        for one in stats:
            places = np.ix_(self._places(one), self._places(one))
            norms = np.diagonal(one.gram) > 0
            np.add.at(total, places, one.cosine)
            np.add.at(count, places, np.outer(norms, norms))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def _places(self, one: DeltaStats) -> list[int]:
        order = list(self.models)
        return [order.index(label) for label in one.models]


def _short(labels: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, as many as tell them apart."""
    for parts in range(1, 5):
        short = ["/".join(Path(label).parts[-parts:]) or label for label in labels]
        if len(set(short)) == len(labels):
            return {a: _clipped(b) for a, b in zip(labels, short, strict=True)}
    return {label: label for label in labels}


def _clipped(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:12]}…{name[-15:]}"


def _pairs(one: DeltaStats) -> np.ndarray:
    """Cosines of the pairs of models that both change a tensor."""
    changed = np.flatnonzero(np.diagonal(one.gram) > 0)
    i, j = np.triu_indices(changed.size, 1)
    return one.cosine[changed[i], changed[j]]


def _lead(config: MergeConfig, found: _Found, done: Streamed) -> str:
    method = config.method
    text = f"{method} made {len(found.stats)} of {done.tensors} tensors out of several models. "
    origin = ", ".join(found.origins)
    if config.base_model is None:
        why = f"{method} has no base" if METHODS[method].merges_base else "No base is named"
        text += f"{why}, so deltas are differences from the first model, {origin}."
    else:
        text += f"Deltas are differences from the base, {origin}."
    return _text(text)


def _cards(found: _Found) -> str:
    total = found.grams(found.stats)
    cards = []
    if found.has_pairs:
        means = _apart(found.mean_cosine([one for *_, one in found.layered] or found.stats))
        whole = _apart(cosines(total))
        if means.size:
            cards.append(("Mean cosine of two deltas", f"{means.mean():+.3f}",
                          f"of whole models {whole.mean():+.3f}"))  # fmt: skip
        entries = sum(math.prod(one.shape) for one in found.stats)
        share = sum(one.conflicts for one in found.stats) / entries
        cards.append(("Signs in conflict", f"{100 * share:.1f} %", "of all entries"))
    whole = math.sqrt(sum(one.origin_square for one in found.stats))
    norms = np.sqrt(np.diagonal(total)) / whole if whole else np.zeros(len(total))
    names = list(found.models.values())
    largest = int(np.argmax(norms))
    label = "Largest delta" if len(names) > 1 else "Size of the delta"
    cards.append((label, _percent(norms[largest]), f"of the origin, {names[largest]}"))
    if len(names) > 1:
        least = int(np.argmin(norms))
        cards.append(("Smallest delta", _percent(norms[least]), f"of the origin, {names[least]}"))
    items = (
        f'<li><div class="label">{_text(label)}</div><div class="value">{_text(value)}</div>'
        f'<div class="was">{_text(note)}</div></li>'
        for label, value, note in cards
    )
    return f'<ul class="cards">{"".join(items)}</ul>'


def _scores(scores: Scores | None) -> str:
    if scores is None:
        return ""
    rows = [[_text(label), f"{value:.2f}"] for label, value in scores.perplexity.items()]
    table = f'<p class="note">{_text(scores.definition)}</p>' + _table(
        ["Model", "#Perplexity"], rows
    )
    if not scores.curves:
        return table
    short = _short(list(scores.curves))
    named = {short[label]: line for label, line in scores.curves.items()}
    shown = dict(list(named.items())[-MOST_CURVES:])
    drawn = loss_curves(scores.alphas, shown, "perplexity")
    first = next(iter(scores.perplexity))
    rises = " ".join(barrier_sentence(name, line, scores.alphas) for name, line in named.items())
    return table + _figure(drawn, f"On the straight lines from {first} to the others. {rises}")


def _cosines(found: _Found) -> str:
    if not found.has_pairs:
        return (
            '<p class="note">Every tensor has one delta, so there is no pair to compare, and no '
            "signs conflict.</p>"
        )
    matrices = [one for *_, one in found.layered]
    panels = {"Of all entries at once": cosines(found.grams(found.stats))}
    never = np.isnan(found.mean_cosine(found.stats))
    panels["Of all entries at once"][never] = np.nan
    if matrices:
        panels = {"Mean over the layers' matrices": found.mean_cosine(matrices)} | panels
    caption = (
        "0: the models changed the weights in unrelated directions, which add up without loss. "
        "Towards 1: they learned the same, and a sum counts it twice. Below 0: they undo each "
        "other."
    )
    return _figure(cosine_heatmaps(panels, list(found.models.values())), caption)


def _cosines_by_depth(found: _Found) -> str:
    return _kinds_by_depth(
        found,
        "cosines-by-depth",
        "mean cosine",
        lambda one: float(pairs.mean()) if (pairs := _pairs(one)).size else math.nan,
        "Mean over the pairs of models, by kind of matrix.",
    )


def _conflicts_by_depth(found: _Found) -> str:
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
    found: _Found, name: str, label: str, measure: Any, caption: str, *, percent: bool = False
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
    return _figure(by_depth(name, lines, label, percent=percent), caption)


def _sizes_by_depth(found: _Found) -> str:
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


def _kept_by_depth(config: MergeConfig, found: _Found) -> str:
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
    found: _Found, name: str, lines: Mapping[str, Mapping[int, float]], label: str, caption: str
) -> str:
    shown = {found.models[model]: line for model, line in lines.items() if line}
    if not shown:
        return ""
    if len(shown) > MOST_LINES:
        caption += f" The first {MOST_LINES} of {len(shown)} models."
        shown = dict(list(shown.items())[:MOST_LINES])
    return _figure(by_depth(name, shown, label, percent=True), caption)


def _tensors(found: _Found) -> str:
    labels = list(found.models)
    few, many = len(labels) <= _FEW, len(labels) > 2
    keeps = any(one.kept is not None for one in found.stats)
    header = ["Tensor", "Shape"]
    header += [f"#{found.models[label]}" for label in labels] if few else ["#Sizes"]
    if found.has_pairs:
        header += ["#Cosine", *(["#Lowest"] if many else []), "#Conflicts"]
    if keeps:
        header.append("#Held")
    rows = []
    for one in found.stats:
        norms = dict(zip(one.models, one.relative_norm, strict=True))
        row = [
            f"<code>{_text(one.name)}</code>",
            _text("×".join(map(str, one.shape)) or "scalar"),
        ]
        if few:
            row += [_percent(norms[label]) if label in norms else "" for label in labels]
        else:
            row.append(f"{_percent(min(norms.values()))} to {_percent(max(norms.values()))}")
        if found.has_pairs:
            pairs = _pairs(one)
            row.append(f"{pairs.mean():+.3f}" if pairs.size else "")
            if many:
                row.append(f"{pairs.min():+.3f}" if pairs.size else "")
            row.append(f"{100 * one.sign_conflict:.1f} %" if len(one.models) > 1 else "")
        if keeps:
            row.append("" if one.kept_energy is None else _percent(one.kept_energy.mean()))
        rows.append(row)
    note = "Sizes are norms of deltas over the origin's."
    if found.has_pairs:
        note += " Cosines are the mean over pairs of models" + (" and the lowest." if many else ".")
    if keeps:
        note += " Held is the share of energy in the largest entries, the mean over models."
    return f'<p class="note">{_text(note)}</p>' + _table(header, rows)


def _apart(grid: np.ndarray) -> np.ndarray:
    """The finite entries off the diagonal."""
    entries = grid[~np.eye(len(grid), dtype=bool)]
    return entries[np.isfinite(entries)]


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "∞"
    spec = ".2f" if 1e-3 <= share < 0.1 else ".1f" if share >= 0.1 or not share else ".2g"
    return f"{100 * share:{spec}} %"
