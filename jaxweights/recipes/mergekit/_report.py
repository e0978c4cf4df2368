"""The merge report: how the models' deltas relate, in one HTML file with its figures inside."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from jaxweights.checkpoint._atomic import atomic
from jaxweights.checkpoint._check_destination import check_destination
from jaxweights.recipes import _html as html
from jaxweights.recipes._figures import MOST_CURVES, loss_curves
from jaxweights.recipes._report import barrier_sentence
from jaxweights.recipes.mergekit._config import MergeConfig
from jaxweights.recipes.mergekit._depth_sections import (
    conflicts_by_depth,
    cosines_by_depth,
    kept_by_depth,
    sizes_by_depth,
)
from jaxweights.recipes.mergekit._evaluate import Scores
from jaxweights.recipes.mergekit._figures import cosine_heatmaps
from jaxweights.recipes.mergekit._found import Found, pair_cosines, short_names
from jaxweights.recipes.mergekit._methods import METHODS
from jaxweights.stream._delta_stats import DeltaStats, cosines
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
        found = Found.of(stats)
        content = [
            f'<p class="lead">{_lead(config, found, done)}</p>',
            _cards(found),
            html.section("Cosines between the deltas", _cosines(found)),
            html.section("Cosines by depth", cosines_by_depth(found)),
            html.section("Sign conflicts by depth", conflicts_by_depth(found)),
            html.section("Size of the deltas by depth", sizes_by_depth(found)),
            html.section("What the largest entries hold, by depth", kept_by_depth(config, found)),
            html.section("Every tensor", _tensors(found)),
        ]
    else:
        content = [
            '<p class="lead">Nothing was merged with anything: every tensor is a copy of one '
            "model's, so there are no deltas to compare.</p>"
        ]
    body = [
        f"<h1>{html.text(title)}</h1>",
        *content,
        html.section("Perplexity", _scores(scores)),
        html.section("The configuration", f"<pre>{html.text(text)}</pre>"),
        '<footer class="note">Written by jaxweights.</footer>',
    ]
    return html.page(title, body, style=_WIDER)


def _lead(config: MergeConfig, found: Found, done: Streamed) -> str:
    method = config.method
    text = f"{method} made {len(found.stats)} of {done.tensors} tensors out of several models. "
    origin = ", ".join(found.origins)
    if config.base_model is None:
        why = f"{method} has no base" if METHODS[method].merges_base else "No base is named"
        text += f"{why}, so deltas are differences from the first model, {origin}."
    else:
        text += f"Deltas are differences from the base, {origin}."
    return html.text(text)


def _cards(found: Found) -> str:
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
    return html.cards(html.card(label, value, html.text(note)) for label, value, note in cards)


def _scores(scores: Scores | None) -> str:
    if scores is None:
        return ""
    rows = [[html.text(label), f"{value:.2f}"] for label, value in scores.perplexity.items()]
    table = f'<p class="note">{html.text(scores.definition)}</p>' + html.table(
        ["Model", "#Perplexity"], rows
    )
    if not scores.curves:
        return table
    short = short_names(list(scores.curves))
    named = {short[label]: line for label, line in scores.curves.items()}
    shown = dict(list(named.items())[-MOST_CURVES:])
    drawn = loss_curves(scores.alphas, shown, "perplexity")
    first = next(iter(scores.perplexity))
    rises = " ".join(barrier_sentence(name, line, scores.alphas) for name, line in named.items())
    return table + html.figure(drawn, f"On the straight lines from {first} to the others. {rises}")


def _cosines(found: Found) -> str:
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
    return html.figure(cosine_heatmaps(panels, list(found.models.values())), caption)


def _tensors(found: Found) -> str:
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
            f"<code>{html.text(one.name)}</code>",
            html.text("×".join(map(str, one.shape)) or "scalar"),
        ]
        if few:
            row += [_percent(norms[label]) if label in norms else "" for label in labels]
        else:
            row.append(f"{_percent(min(norms.values()))} to {_percent(max(norms.values()))}")
        if found.has_pairs:
            pairs = pair_cosines(one)
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
    return f'<p class="note">{html.text(note)}</p>' + html.table(header, rows)


def _apart(grid: np.ndarray) -> np.ndarray:
    """The finite entries off the diagonal."""
    entries = grid[~np.eye(len(grid), dtype=bool)]
    return entries[np.isfinite(entries)]


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "∞"
    spec = ".2f" if 1e-3 <= share < 0.1 else ".1f" if share >= 0.1 or not share else ".2g"
    return f"{100 * share:{spec}} %"
