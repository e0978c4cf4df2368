"""The parts that pages of HTML are made of; a page needs no other file and no network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

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


def page(title: str, body: Iterable[str], *, style: str = "") -> str:
    """A whole document.

    Args:
      title: Plain text.
      body: Parts that are HTML already; empty ones fall away.
      style: Rules that only this page needs.

    Returns:
      HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, content: str) -> str:
    return f"<section><h2>{text(heading)}</h2>\n{content}</section>" if content else ""


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; `#` marks a column of numbers."""
    numeric = [name.startswith("#") for name in header]
    css = [' class="n"' if is_number else "" for is_number in numeric]
    head = "".join(
        f"<th{c}>{text(name.lstrip('#'))}</th>" for name, c in zip(header, css, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, css, strict=True)) + "</tr>"
        for row in rows
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{whole}</div>'


def text(value: object) -> str:
    return html.escape(str(value))


def card(label: str, value: str, note: str) -> str:
    """One figure of a list of class "cards"; `note` is HTML already."""
    return (
        f'<li><div class="label">{text(label)}</div><div class="value">{text(value)}</div>'
        f'<div class="was">{note}</div></li>'
    )


def cards(items: Iterable[str]) -> str:
    """The list that holds them."""
    return f'<ul class="cards">{"".join(items)}</ul>'


def megabytes(count: float) -> str:
    """Bytes in the unit that suits them, decimal, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} bytes"
