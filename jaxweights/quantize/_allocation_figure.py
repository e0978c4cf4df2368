"""The figure of an allocation: the front, what was chosen, and what one method for all costs."""

from __future__ import annotations

from typing import Any

from jaxweights.quantize._allocation import Allocation

_FRONT, _CHOSEN, _UNIFORM, _RULE = "#9aa5b1", "#2563a8", "#b4501e", "#d5dae0"

_SETTINGS: Any = {
    "font.size": 9,
    "axes.edgecolor": _RULE,
    "axes.titlesize": 9.5,
    "axes.titleweight": "regular",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
}


def allocation_figure(allocation: Allocation) -> Any:
    """Draws error against bytes: the front of all allocations, and single candidates for all.

    Args:
      allocation: From `allocate`.

    Returns:
      A `matplotlib.figure.Figure`; save it with `figure.savefig(path)`.

    Example:
      >>> params = {"up": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> rounded = {f"int{b}": jw.quantize.round_to_nearest(bits=b) for b in (2, 4, 8)}
      >>> found = jw.quantize.allocate(params, rounded, budget=3000, measure="weight")
      >>> [text.get_text() for text in jw.quantize.allocation_figure(found).axes[0].texts]
      ['int2', 'int4', 'int8']
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A candidate without error, such as the float weights, has no place on a logarithmic axis.
    points = [point for point in allocation.front if point.error > 0]
    uniform = {name: at for name, at in allocation.uniform.items() if at[1] > 0}
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        sizes = [point.bytes / 1e6 for point in points]
        errors = [point.error for point in points]
        panel.plot(sizes, errors, color=_FRONT, marker=".", markersize=4, label="mixed")
        panel.scatter(
            [size / 1e6 for size, _ in uniform.values()],
            [error for _, error in uniform.values()],
            color=_UNIFORM,
            s=16,
            zorder=3,
            label="one for all leaves",
        )
        for name, (size, error) in uniform.items():
            panel.annotate(
                name, (size / 1e6, error), textcoords="offset points", xytext=(4, 3), fontsize=8
            )
        if allocation.error > 0:
            panel.scatter(
                [allocation.bytes / 1e6],
                [allocation.error],
                color=_CHOSEN,
                zorder=4,
                label="chosen",
            )
        panel.axvline(allocation.budget / 1e6, color=_RULE, linewidth=0.8, zorder=0)
        if points or uniform:
            panel.set_yscale("log")
        panel.set_xlabel("MB")
        panel.set_title("error", loc="left")
        panel.grid(axis="y")
        panel.set_axisbelow(True)
        panel.legend()
    return figure
