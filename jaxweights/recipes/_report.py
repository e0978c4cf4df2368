"""The report: one HTML file with its figures inside, which needs nothing else to be read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxweights.recipes import _html as html
from jaxweights.recipes._figures import bars, heatmap, loss_curves, spectra
from jaxweights.recipes._leaves import LeafResult, error_grid
from jaxweights.recipes._perplexity import PerplexityScore, relative_change


def render_report(result: Mapping[str, Any], leaves: Sequence[LeafResult]) -> str:
    """Writes the report of a run.

    Args:
      result: The run's result, as `result.json` holds it, with `spectra`.
      leaves: What became of each leaf.

    Returns:
      HTML that needs no other file and no network, with every text of the recipe escaped.
    """
    title = f"{result['model']['name']}: what changed and what it cost"
    body = [
        f"<h1>{html.text(title)}</h1>",
        f'<p class="lead">{_summary(result)}</p>',
        _cards(result),
        html.section("Before and after", _before_after(result)),
        html.section("On the way to the other models", _curves(result)),
        html.section("What was done", _steps(result)),
        html.section("Error of every matrix", _errors(leaves)),
        html.section("Spectra", _spectra(result.get("spectra", {}))),
        html.section("Every weight that was changed", _changed_table(leaves)),
        html.section("Left as it was, and why", _left_table(leaves)),
        html.section("The recipe", f"<pre>{html.text(result['recipe'])}</pre>"),
        html.section("Where this comes from", _origin(result)),
        '<footer class="note">Written by jaxweights. Everything in this page is also in '
        "<code>result.json</code> beside it.</footer>",
    ]
    return html.page(title, body)


# One row a measure: (section, field, label, format, whether less is better).
MEASURES = (
    ("perplexity", "perplexity", "Perplexity", ".2f", True),
    ("retrieval", "recall_at_1", "Recall at 1", ".3f", False),
    ("retrieval", "mrr", "Mean reciprocal rank", ".3f", False),
    ("retrieval", "cosine", "Cosine to the dense embedding", ".4f", False),
)


def measured(
    result: Mapping[str, Any],
) -> Iterable[tuple[str, str, float, float, float, float, bool]]:
    """What was measured: label, format, before, after, both standard errors, less is better."""
    for section, field, label, spec, less in MEASURES:
        scores = result["evaluation"].get(section)
        if scores is None:
            continue
        before, after = scores["before"], scores["after"]
        errors = [0.0, 0.0]
        if field == "perplexity":  # the delta method carries the error of the mean through exp
            errors = [s["perplexity"] * s["error"] for s in (before, after)]
        yield label, spec, before[field], after[field], errors[0], errors[1], less


def _curves(result: Mapping[str, Any]) -> str:
    found = result.get("curves")
    if found is None:
        return ""
    lines = found["perplexity"].items()
    rises = " ".join(barrier_sentence(name, line, found["alphas"]) for name, line in lines)
    drawn = loss_curves(found["alphas"], found["perplexity"], "perplexity")
    return html.figure(drawn, f"Perplexity on the straight lines between models. {rises}")


def barrier_sentence(name: str, perplexities: Sequence[float], alphas: Sequence[float]) -> str:
    """Says how far the loss, the logarithm of perplexity, rises between two models."""
    logs, shares = np.log(perplexities), np.asarray(alphas)
    heights = logs - ((1 - shares) * logs[0] + shares * logs[-1])
    top = int(np.argmax(heights))
    if heights[top] <= 0:
        return f"{name}: the loss rises nowhere above the straight line between its ends."
    return (
        f"{name}: the loss rises {heights[top]:.3g} above the straight line between its ends, "
        f"at {shares[top]:.2g}."
    )


def _summary(result: Mapping[str, Any]) -> str:
    size = result["size"]
    methods = ", then ".join(step["method"] for step in result["steps"])
    text = (
        f"{result['model']['parameters'] / 1e6:.1f} million parameters, changed by {methods}: "
        f"{html.megabytes(size['before'])} became {html.megabytes(size['after'])}."
    )
    return html.text(text)


def _cards(result: Mapping[str, Any]) -> str:
    size = result["size"]
    ratio = size["before"] / max(size["after"], 1)
    smaller = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    sizes = html.megabytes(size["after"]), html.megabytes(size["before"])
    cards = [_card("Size of the weights", *sizes, smaller, ratio >= 1)]
    for label, spec, before, after, *_, less in measured(result):
        change = (after - before) / before if before else 0.0
        better = change <= 0 if less else change >= 0
        words = f"{100 * change:+.1f} %"
        if label == "Perplexity":
            words = _perplexity_change(result)
        cards.append(_card(label, format(after, spec), format(before, spec), words, better))
    return html.cards(cards)


def _perplexity_change(result: Mapping[str, Any]) -> str:
    scores = result["evaluation"]["perplexity"]
    change, error = relative_change(*(PerplexityScore(**scores[k]) for k in ("before", "after")))
    return f"{100 * change:+.1f} %" + (f" ± {100 * error:.1f}" if error else "")


def _card(label: str, value: str, was: str, change: str, better: bool) -> str:
    css = "better" if better else "worse"
    note = f'was {html.text(was)}, <span class="{css}">{html.text(change)}</span>'
    return html.card(label, value, note)


def _before_after(result: Mapping[str, Any]) -> str:
    size = result["size"]
    panels: list[Any] = [
        ("Weights, MB", ".1f", size["before"] / 1e6, size["after"] / 1e6, 0.0, 0.0)
    ]
    panels += [panel[:6] for panel in measured(result)]
    notes = [scores["definition"] for scores in result["evaluation"].values()]
    notes.append(
        "Size counts the arrays that stand for the weights, scales and masks included, as they lie "
        "in memory."
    )
    on_disk = [f"{form} {html.megabytes(count)}" for form, count in size["on_disk"].items()]
    if on_disk:
        notes.append(f"On the disk: {', '.join(on_disk)}.")
    if any(panel[4] for panel in panels):
        notes.append(
            "Bars of error are one standard error over windows. Both saw the same windows, so the "
            "difference is surer than the bars."
        )
    return html.figure(bars(panels), " ".join(notes))


def _steps(result: Mapping[str, Any]) -> str:
    rows = []
    for step in result["steps"]:
        settings = ", ".join(f"{key}={value}" for key, value in step["settings"].items())
        where = ", ".join(step["match"]) or "what the method takes by default"
        if step["except"]:
            where += f"; except {', '.join(step['except'])}"
        rows.append(
            (f"<code>{html.text(step['method'])}</code>", html.text(settings), html.text(where))
        )
    table = html.table(("Method", "Settings", "On"), rows)
    if result.get("calibration"):
        table += f'<p class="note">{html.text(result["calibration"]["definition"])}</p>'
    if result.get("distill"):
        losses = result["distill"]["losses"]
        table += (
            f'<p class="note">Trained afterwards for {len(losses)} steps to give the outputs of '
            f"the original: the loss went from {losses[0]:.3g} to {losses[-1]:.3g}.</p>"
        )
    return table


def _errors(leaves: Sequence[LeafResult]) -> str:
    grid = error_grid(tuple(leaves))
    if not grid:
        return '<p class="note">No matrix was changed in value.</p>'
    return html.figure(
        heatmap(grid),
        "Relative error of the weights, in percent: the Frobenius norm of what changed over that "
        "of the weight before. Layers down, kinds of matrix across.",
    )


def _spectra(panels: Mapping[str, Any]) -> str:
    if not panels:
        return ""
    return html.figure(
        spectra(panels),
        "Singular values by rank, on a logarithmic scale. Rounding and pruning lift or lower the "
        "tail; what a matrix does is mostly in its first values.",
    )


def _changed_table(leaves: Sequence[LeafResult]) -> str:
    rows = [
        (
            f"<code>{html.text(leaf.path)}</code>",
            html.text(" × ".join(map(str, leaf.shape))),
            html.text(leaf.representation),
            f"{8 * leaf.bytes_after / max(leaf.parameters, 1):.2f}",
            f"{100 * leaf.zeros:.1f} %",
            f"{100 * leaf.error:.2f} %",
        )
        for leaf in leaves
        if leaf.changed
    ]
    if not rows:
        return '<p class="note">None.</p>'
    return html.table(
        ("Weight", "Shape", "Now", "#Bits each", "#Zeros", "#Error"),
        rows,
    )


def _left_table(leaves: Sequence[LeafResult]) -> str:
    left = [leaf for leaf in leaves if not leaf.changed]
    if not left:
        return '<p class="note">Nothing: every weight was changed.</p>'
    total = sum(leaf.parameters for leaf in leaves)
    share = sum(leaf.parameters for leaf in left) / max(total, 1)
    rows = [
        (
            f"<code>{html.text(leaf.path)}</code>",
            html.text(" × ".join(map(str, leaf.shape))),
            html.megabytes(leaf.bytes_after),
            re.sub(r"`([^`]*)`", r"<code>\1</code>", html.text(leaf.why)),
        )
        for leaf in sorted(left, key=lambda leaf: -leaf.bytes_after)
    ]
    return f"<p>{100 * share:.1f} % of the parameters.</p>" + html.table(
        ("Weight", "Shape", "#Size", "Why"), rows
    )


def _origin(result: Mapping[str, Any]) -> str:
    rows = [("Source", result["model"]["source"]), ("Fingerprint", result["model"]["fingerprint"])]
    rows += [(name, version) for name, version in result["versions"].items()]
    rows.append(("Made", result["timestamp"]))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    rows.append(("Time", seconds))
    return html.table(
        ("What", "Which"), [(html.text(a), f"<code>{html.text(b)}</code>") for a, b in rows]
    )
