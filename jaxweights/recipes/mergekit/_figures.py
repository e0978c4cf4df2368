"""Figures of the merge report, as SVG that follows the page's colours and fonts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxweights.recipes._figures import _CARD, _INK, _RULE, _WIDTH, _figure

# Told apart on light and on dark paper, and by those who see no red or no green.
_LINES = (
    "#2a8fb8",
    "#e08a1e",
    "#2f9e77",
    "#c65b8f",
    "#8272c4",
    "#b5a136",
    "#c9553d",
    "#7d8a99",
    "#5aa5d6",
    "#996b45",
)
MOST_LINES = len(_LINES)

Line = Mapping[int, float]  # value by layer


def cosine_heatmaps(panels: Mapping[str, np.ndarray], models: Sequence[str]) -> str:
    """Cosines of all pairs of models, one panel a mean.

    Args:
      panels: `(models, models)` by title; NaN where a pair has none.
      models: What the models are called.

    Returns:
      SVG.
    """
    n = len(models)
    apart = [grid[~np.eye(n, dtype=bool)] for grid in panels.values()]
    # Small cosines look small: the colours span a quarter at least.
    top = max(float(np.nanmax(np.abs(np.concatenate(apart)), initial=0.0)), 0.25)
    spec = ".2f" if n <= 12 else ".1f"
    size = min(max(0.62 * n, 2.0), 4.0)
    width = min(len(panels) * (size + 1.4) + 0.6, _WIDTH)
    with _plain("cosines", width, size + 0.75, 1, len(panels)) as (out, axes):
        mesh = None
        for axis, (title, grid) in zip(axes, panels.items(), strict=True):
            shown = np.where(np.eye(n, dtype=bool), np.nan, grid)
            mesh = axis.pcolormesh(
                np.ma.masked_invalid(shown),
                cmap="RdBu_r",
                vmin=-top,
                vmax=top,
                edgecolor=_CARD,
                lw=0.8,
            )
            for (row, column), value in np.ndenumerate(shown):
                if np.isfinite(value) and n <= 16:
                    colour = "white" if abs(value) > 0.62 * top else "black"
                    axis.text(
                        column + 0.5,
                        row + 0.5,
                        format(value, spec),
                        ha="center",
                        va="center_baseline",
                        color=colour,
                        fontsize=8,
                    )
            turned = 0 if 0.085 * max(map(len, models)) < size / n else 40  # inches
            axis.set_xticks(np.arange(n) + 0.5, models)
            for tick in axis.get_xticklabels():
                tick.set(
                    rotation=turned, rotation_mode="anchor", ha="right" if turned else "center"
                )
            axis.set_yticks(np.arange(n) + 0.5, models)
            axis.invert_yaxis()
            axis.set_aspect("equal")
            axis.tick_params(length=0)
            axis.set_title(title, loc="left")
            for spine in axis.spines.values():
                spine.set_visible(False)
        bar = axes[0].figure.colorbar(mesh, ax=list(axes), pad=0.02, aspect=24, shrink=0.9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.solids.set_edgecolor("face")
    return out[0]


def by_depth(name: str, lines: Mapping[str, Line], label: str, *, percent: bool = False) -> str:
    """One line a kind of matrix or a model, over the layers.

    Args:
      name: Of the figure, another one for each of a page.
      lines: Values by layer, by what the legend calls them.
      label: What is measured.
      percent: Whether values are shares.

    Returns:
      SVG.
    """
    layers = sorted({layer for line in lines.values() for layer in line})
    with _plain(name, _WIDTH, 3.3, 1, 1) as (out, (axis,)):
        handles = []
        for line, colour in zip(lines.values(), _LINES, strict=False):
            values = [line.get(layer, np.nan) for layer in layers]
            marker = "o" if len(layers) <= 40 else ""
            handles += axis.plot(
                layers, values, color=colour, marker=marker, markersize=3.2, linewidth=1.5
            )
        low, high = axis.get_ylim()
        if low < 0 < high:
            axis.axhline(0, color=_INK, linewidth=0.7)
        elif low > 0 and percent:
            axis.set_ylim(0, high)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
        axis.set_xlabel("layer")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(layers) == 1:
            axis.set_xticks(layers)
        axis.tick_params(length=2, color=_RULE)
        if percent:
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        # A name that begins with an underscore would be left out.
        names = [f"\u200b{key}" if key.startswith("_") else key for key in lines]
        axis.figure.legend(
            handles,
            names[: len(handles)],
            loc="outside right upper",
            handlelength=1.4,
            fontsize=8.5,
        )
    return out[0]


@contextlib.contextmanager
def _plain(
    name: str, width: float, height: float, rows: int, columns: int
) -> Iterator[tuple[list[str], Any]]:
    """A figure whose texts are taken as they are: a dollar sign in a path is no formula."""
    import matplotlib

    with (
        matplotlib.rc_context({"text.parse_math": False}),
        _figure(name, width, height, rows, columns) as made,
    ):
        yield made
