"""The report: one HTML file with its figures inside, which needs nothing else to be read."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxweights.recipes._evaluate import PerplexityScore, relative_change
from jaxweights.recipes._figures import bars, heatmap, loss_curves, spectra
from jaxweights.recipes._leaves import LeafResult, error_grid

_STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #22252a; --soft: #646a73; --rule: #dcdad5;
  --before: #a3a9b3; --after: #1f6f8b; --good: #2c7a4b; --bad: #b3432b; --code: #f3f1ec; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181c; --card: #1e2126; --ink: #e4e2dd; --soft: #9aa0aa; --rule: #343941;
  --before: #6d7583; --after: #5ab5d1; --good: #6cc08b; --bad: #e58a72; --code: #23272d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 "Inter", "Segoe UI", system-ui, -apple-system, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em;
  margin: 0 0 0.4rem; }
h2 { font-size: 1.2rem; font-weight: 620; margin: 3rem 0 0.5rem; }
p { margin: 0.4rem 0 0.9rem; max-width: 46rem; }
.lead { font-size: 1.08rem; color: var(--soft); }
.note, figcaption, caption { color: var(--soft); font-size: 0.9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0.9rem;
  margin: 1.8rem 0 0; padding: 0; list-style: none; }
.cards li { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 0.9rem 1.1rem 1rem; }
.cards .label { color: var(--soft); font-size: 0.85rem; }
.cards .value { font-size: 1.55rem; font-weight: 620; letter-spacing: -0.01em; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.cards .was { color: var(--soft); font-size: 0.9rem; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0 0; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: 1.1rem 1.1rem 0.9rem; }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto;
  font-family: inherit; }
figcaption { margin-top: 0.7rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--rule);
  padding: 0.35rem 0.9rem 0.35rem 0; }
td { border-bottom: 1px solid var(--rule); padding: 0.35rem 0.9rem 0.35rem 0;
  vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
code, pre { font: 0.86rem/1.5 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, "DejaVu Sans Mono",
  monospace; }
pre { background: var(--code); border: 1px solid var(--rule); border-radius: 10px;
  padding: 1rem 1.1rem; overflow-x: auto; tab-size: 4; }
.worse { color: var(--bad); } .better { color: var(--good); }
footer { margin-top: 3.5rem; border-top: 1px solid var(--rule); padding-top: 0.9rem; }
@media print { figure, .cards li { break-inside: avoid; } body { font-size: 11pt; } }
"""


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
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">{_summary(result)}</p>',
        _cards(result),
        _section("Before and after", _before_after(result)),
        _section("On the way to the other models", _curves(result)),
        _section("What was done", _steps(result)),
        _section("Error of every matrix", _errors(leaves)),
        _section("Spectra", _spectra(result.get("spectra", {}))),
        _section("Every weight that was changed", _changed_table(leaves)),
        _section("Left as it was, and why", _left_table(leaves)),
        _section("The recipe", f"<pre>{_text(result['recipe'])}</pre>"),
        _section("Where this comes from", _origin(result)),
        '<footer class="note">Written by jaxweights. Everything in this page is also in '
        "<code>result.json</code> beside it.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def megabytes(count: float) -> str:
    """Bytes in the unit that suits them, decimal, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} bytes"


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
    return _figure(drawn, f"Perplexity on the straight lines between models. {rises}")


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
        f"{megabytes(size['before'])} became {megabytes(size['after'])}."
    )
    return _text(text)


def _cards(result: Mapping[str, Any]) -> str:
    size = result["size"]
    ratio = size["before"] / max(size["after"], 1)
    smaller = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    sizes = megabytes(size["after"]), megabytes(size["before"])
    cards = [_card("Size of the weights", *sizes, smaller, ratio >= 1)]
    for label, spec, before, after, *_, less in measured(result):
        change = (after - before) / before if before else 0.0
        better = change <= 0 if less else change >= 0
        words = f"{100 * change:+.1f} %"
        if label == "Perplexity":
            words = _perplexity_change(result)
        cards.append(_card(label, format(after, spec), format(before, spec), words, better))
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _perplexity_change(result: Mapping[str, Any]) -> str:
    scores = result["evaluation"]["perplexity"]
    change, error = relative_change(*(PerplexityScore(**scores[k]) for k in ("before", "after")))
    return f"{100 * change:+.1f} %" + (f" ± {100 * error:.1f}" if error else "")


def _card(label: str, value: str, was: str, change: str, better: bool) -> str:
    return (
        f'<li><div class="label">{_text(label)}</div><div class="value">{_text(value)}</div>'
        f'<div class="was">was {_text(was)}, <span class="{"better" if better else "worse"}">'
        f"{_text(change)}</span></div></li>"
    )


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
    on_disk = [f"{form} {megabytes(count)}" for form, count in size["on_disk"].items()]
    if on_disk:
        notes.append(f"On the disk: {', '.join(on_disk)}.")
    if any(panel[4] for panel in panels):
        notes.append(
            "Bars of error are one standard error over windows. Both saw the same windows, so the "
            "difference is surer than the bars."
        )
    return _figure(bars(panels), " ".join(notes))


def _steps(result: Mapping[str, Any]) -> str:
    rows = []
    for step in result["steps"]:
        settings = ", ".join(f"{key}={value}" for key, value in step["settings"].items())
        where = ", ".join(step["match"]) or "what the method takes by default"
        if step["except"]:
            where += f"; except {', '.join(step['except'])}"
        rows.append((f"<code>{_text(step['method'])}</code>", _text(settings), _text(where)))
    table = _table(("Method", "Settings", "On"), rows)
    if result.get("calibration"):
        table += f'<p class="note">{_text(result["calibration"]["definition"])}</p>'
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
    return _figure(
        heatmap(grid),
        "Relative error of the weights, in percent: the Frobenius norm of what changed over that "
        "of the weight before. Layers down, kinds of matrix across.",
    )


def _spectra(panels: Mapping[str, Any]) -> str:
    if not panels:
        return ""
    return _figure(
        spectra(panels),
        "Singular values by rank, on a logarithmic scale. Rounding and pruning lift or lower the "
        "tail; what a matrix does is mostly in its first values.",
    )


def _changed_table(leaves: Sequence[LeafResult]) -> str:
    rows = [
        (
            f"<code>{_text(leaf.path)}</code>",
            _text(" × ".join(map(str, leaf.shape))),
            _text(leaf.representation),
            f"{8 * leaf.bytes_after / max(leaf.parameters, 1):.2f}",
            f"{100 * leaf.zeros:.1f} %",
            f"{100 * leaf.error:.2f} %",
        )
        for leaf in leaves
        if leaf.changed
    ]
    if not rows:
        return '<p class="note">None.</p>'
    return _table(
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
            f"<code>{_text(leaf.path)}</code>",
            _text(" × ".join(map(str, leaf.shape))),
            megabytes(leaf.bytes_after),
            re.sub(r"`([^`]*)`", r"<code>\1</code>", _text(leaf.why)),
        )
        for leaf in sorted(left, key=lambda leaf: -leaf.bytes_after)
    ]
    return f"<p>{100 * share:.1f} % of the parameters.</p>" + _table(
        ("Weight", "Shape", "#Size", "Why"), rows
    )


def _origin(result: Mapping[str, Any]) -> str:
    rows = [("Source", result["model"]["source"]), ("Fingerprint", result["model"]["fingerprint"])]
    rows += [(name, version) for name, version in result["versions"].items()]
    rows.append(("Made", result["timestamp"]))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    rows.append(("Time", seconds))
    return _table(("What", "Which"), [(_text(a), f"<code>{_text(b)}</code>") for a, b in rows])


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{_text(heading)}</h2>\n{content}</section>" if content else ""


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; `#` marks a column of numbers."""
    numeric = [name.startswith("#") for name in header]
    css = [' class="n"' if is_number else "" for is_number in numeric]
    head = "".join(
        f"<th{c}>{_text(name.lstrip('#'))}</th>" for name, c in zip(header, css, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, css, strict=True)) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _text(value: object) -> str:
    return html.escape(str(value))
