"""Figures of the report, as SVG that follows the page's colours and fonts."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Drawn in these colours, which are then replaced by the page's variables.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--rule)",
    "#030303": "var(--before)",
    "#040404": "var(--after)",
    "#050505": "var(--card)",
}
_INK, _RULE, _BEFORE, _AFTER, _CARD = _COLOURS
_CURVES = (_AFTER, "#e08a1e", "#2f9e77", "#c65b8f", "#8272c4")
MOST_CURVES = len(_CURVES)

_WIDTH = 9.3  # inches, at which text is as large as the page's small print

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "regular",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


def bars(panels: Sequence[tuple[str, str, float, float, float, float]]) -> str:
    """Before and after, one panel a measure.

    Args:
      panels: (title, format of the numbers, before, after, standard error of either; 0 for none).

    Returns:
      SVG.
    """
    columns = 3
    rows = -(-len(panels) // columns)
    with _figure("bars", _WIDTH, rows * 1.5, rows, columns) as (out, axes):
        for axis, panel in zip(axes, panels, strict=False):
            _bar_panel(axis, *panel)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
    return out[0]


def _bar_panel(axis: Any, title: str, spec: str, *numbers: float) -> None:
    before, after, before_error, after_error = numbers
    errors = [before_error, after_error]
    axis.barh(
        ["before", "after"],
        [before, after],
        xerr=errors if any(errors) else None,
        color=[_BEFORE, _AFTER],
        ecolor=_INK,
        height=0.62,
        error_kw={"elinewidth": 0.9, "capsize": 2.5},
    )
    top = max(before + before_error, after + after_error, 1e-30)
    for row, (value, error) in enumerate(zip((before, after), errors, strict=True)):
        axis.text(value + error + 0.03 * top, row, format(value, spec), va="center")
    axis.set_xlim(0, 1.32 * top)
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)
    axis.set_title(title, loc="left")


def heatmap(errors: Mapping[str, Sequence[float]]) -> str:
    """Error of every matrix: layers down, kinds across.

    Args:
      errors: Errors by layer, by kind; kinds without layers have one entry.

    Returns:
      SVG.
    """
    kinds = list(errors)
    layers = max(len(column) for column in errors.values())
    grid = np.full((layers, len(kinds)), np.nan)
    for i, column in enumerate(errors.values()):
        grid[: len(column), i] = column
    width = min(2.2 + 0.78 * len(kinds), _WIDTH)
    with _figure("heatmap", width, 1.1 + 0.235 * layers, 1, 1) as (out, (axis,)):
        top = float(np.nanmax(grid)) or 1.0
        spec = ".1f" if top >= 0.1 else ".2f" if top >= 0.01 else ".2g"
        mesh = axis.pcolormesh(
            np.ma.masked_invalid(grid), cmap="viridis", vmin=0, vmax=top, edgecolor=_CARD, lw=0.8
        )
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                colour = "white" if value < 0.62 * top else "black"
                axis.text(
                    column + 0.5,
                    row + 0.5,
                    format(100 * value, spec),
                    ha="center",
                    va="center_baseline",
                    color=colour,
                    fontsize=7.5,
                )
        axis.set_xticks(np.arange(len(kinds)) + 0.5, kinds)
        axis.xaxis.tick_top()
        axis.set_yticks(np.arange(layers) + 0.5, [str(i) for i in range(layers)])
        axis.set_ylabel("layer")
        axis.invert_yaxis()
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        bar = axis.figure.colorbar(mesh, ax=axis, pad=0.02, aspect=30, shrink=0.9)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        bar.ax.tick_params(length=0)
        bar.solids.set_edgecolor("face")
    return out[0]


def spectra(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Singular values before and after, one panel a matrix.

    Args:
      panels: Singular values before and after, descending, by the matrix's name.

    Returns:
      SVG.
    """
    columns = 3
    rows = -(-len(panels) // columns)
    with _figure("spectra", _WIDTH, rows * 2.2, rows, columns) as (out, axes):
        for axis, (name, (before, after)) in zip(axes, panels.items(), strict=False):
            for values, colour, label, width in (
                (before, _BEFORE, "before", 2.6),
                (after, _AFTER, "after", 1.2),
            ):
                positive = np.asarray(values)[np.asarray(values) > 0]
                rank = np.arange(1, len(positive) + 1)
                axis.plot(rank, positive, color=colour, label=label, linewidth=width)
            axis.set_yscale("log")
            axis.grid(axis="y")
            axis.set_axisbelow(True)
            axis.minorticks_off()
            axis.tick_params(length=2)
            axis.set_title(name, loc="left")
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        axes[0].legend(loc="lower left", handlelength=1.4, fontsize=8.5)
    return out[0]


def loss_curves(alphas: Sequence[float], curves: Mapping[str, Sequence[float]], loss: str) -> str:
    """A loss along the lines from one model to others.

    Args:
      alphas: Shares of the other model.
      curves: Losses there, by the other model's name.
      loss: What they are called.

    Returns:
      SVG.
    """
    with _figure("curves", 5.0, 2.6, 1, 1) as (out, (axis,)):
        for i, (name, losses) in enumerate(curves.items()):
            colour = _CURVES[i % len(_CURVES)]
            axis.plot(alphas, losses, color=colour, label=name, linewidth=1.8, marker="o", ms=3)
        axis.set_xlabel("share of the other model")
        axis.set_ylabel(loss)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
        axis.tick_params(length=2)
        axis.legend(loc="best", handlelength=1.4, fontsize=8.5)
    return out[0]


@contextlib.contextmanager
def _figure(
    name: str, width: float, height: float, rows: int, columns: int
) -> Iterator[tuple[list[str], Any]]:
    """A figure that becomes SVG text in the list when the body ends."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out: list[str] = []
    # The salt keeps the ids of two figures of one page apart, and the same in every run.
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06, hspace=0.09, wspace=0.04)  # type: ignore
        yield out, figure.subplots(rows, columns, squeeze=False).ravel()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    out.append(_inline(buffer.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Takes what only a file of its own needs away, and hands colours and fonts to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="([^"]*)pt"', rf'\1 class="{name}"', svg, count=1)
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for drawn, variable in _COLOURS.items():
        svg = svg.replace(drawn, variable)
    # Other figures of the page have groups of the same names.
    return re.sub(r'<g id="[^"]*"', "<g", svg)
