"""The figure of an alignment: singular vectors and distances before and after, matrix by matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxweights.align._singular_vectors import SingularVectorAlignment

_BEFORE, _AFTER, _RULE = "#9aa5b1", "#2563a8", "#d5dae0"
_MOST = 40  # matrices that one figure names; beyond them the names would overlap

SETTINGS: Any = {
    "font.size": 9,
    "axes.edgecolor": _RULE,
    "axes.titlesize": 9.5,
    "axes.titleweight": "regular",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "xtick.labelcolor": "black",
    "legend.frameon": False,
}


def alignment_figure(found: SingularVectorAlignment) -> Any:
    """Draws R before and after for every matrix, and how much closer the matrices came.

    Args:
      found: From `singular_vector_alignment`.

    Returns:
      A `matplotlib.figure.Figure` with one panel a gamma and one for the distance; save it with
      `figure.savefig(path)`.

    Example:
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> spec = jw.align.PermutationSpec.of(params, {"kernel": (None, "units")})
      >>> found = jw.align.singular_vector_alignment(spec, params, params, spec.identity())
      >>> [axes.get_title(loc="left") for axes in jw.align.alignment_figure(found).axes]
      ['R, γ = 0', 'R, γ = 0.3', 'distance']
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, before, after, ratios = _rows(found)
    height = 0.8 + 0.2 * min(len(names), _MOST)
    with matplotlib.rc_context(SETTINGS):
        columns = len(found.gammas) + 1
        figure = Figure(figsize=(2.2 + 2.2 * columns, height), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
        places = np.arange(len(names))
        for i, gamma in enumerate(found.gammas):
            _dumbbells(panels[i], places, before[:, i], after[:, i])
            panels[i].set_title(f"R, γ = {gamma:g}", loc="left")
        _dumbbells(panels[-1], places, np.ones(len(names)), ratios)
        panels[-1].set_title("distance", loc="left")
        panels[-1].set_xlim(left=min(0.0, panels[-1].get_xlim()[0]))
        if len(names) <= _MOST:
            panels[0].set_yticks(places, names)
        else:
            panels[0].set_yticks([])
        panels[0].invert_yaxis()
        panels[0].legend(loc="best", handletextpad=0.2)
    return figure


def _dumbbells(panel: Any, places: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
    panel.hlines(places, before, after, color=_RULE, linewidth=1.6, zorder=1)
    panel.scatter(before, places, s=18, color=_BEFORE, label="before", zorder=2, clip_on=False)
    panel.scatter(after, places, s=18, color=_AFTER, label="after", zorder=3, clip_on=False)
    panel.grid(axis="x")
    panel.set_axisbelow(True)
    panel.tick_params(length=0)


def _rows(
    found: SingularVectorAlignment,
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """One row a matrix: its name, R before and after, and the ratio of the distances."""
    names: list[str] = []
    before, after, ratios = [], [], []
    for path, layer in found.layers.items():
        old, new = np.asarray(layer.distance_before), np.asarray(layer.distance_after)
        for place in np.ndindex(old.shape):
            names.append(path + (f"[{', '.join(map(str, place))}]" if place else ""))
            before.append(np.asarray(layer.before)[place])
            after.append(np.asarray(layer.after)[place])
            ratios.append(new[place] / old[place] if old[place] > 0 else 1.0)
    return names, np.array(before), np.array(after), np.array(ratios)
