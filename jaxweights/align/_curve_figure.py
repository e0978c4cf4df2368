"""The figure of a loss along the lines between models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.align._barrier import Barrier
from jaxweights.align._figure import SETTINGS

_COLOURS = ("#2563a8", "#e08a1e", "#2f9e77", "#c65b8f", "#8272c4", "#7d8a99")
_NAME = "align.loss_curve_figure"
Curve = Barrier | tuple[Any, Any]


def loss_curve_figure(curves: Mapping[str, Curve], *, loss: str = "loss") -> Any:
    """Draws the loss from one model to another, such as before and after an alignment.

    Args:
      curves: By name, what `loss_barrier` found; or a pair of shares of the second model and the
        losses there, such as those of the models on `merge.interpolate_path`. The barrier of the
        former is drawn where it is highest, above the straight line between the losses of the ends.
      loss: What the losses are called.

    Returns:
      A `matplotlib.figure.Figure`; save it with `figure.savefig(path)`.

    Raises:
      ValueError: If there is no curve, or one is no curve.

    Example:
      >>> found = jw.align.loss_barrier(lambda p: (p["x"] ** 2 - 1) ** 2, {"x": -1.0}, {"x": 1.0})
      >>> [axes] = loss_curve_figure({"as trained": found}).axes
      >>> axes.get_legend_handles_labels()[1]
      ['as trained, barrier 1']
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not curves:
        raise ValueError(f"{_NAME}: curves is empty. Pass at least one.")
    drawn = {name: _points(name, curve) for name, curve in curves.items()}
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        for i, (name, curve) in enumerate(curves.items()):
            alphas, losses = drawn[name]
            colour = _COLOURS[i % len(_COLOURS)]
            label = name
            if isinstance(curve, Barrier):
                label = f"{name}, barrier {curve.barrier:.3g}"
                top = float(np.interp(curve.at, alphas, losses))
                panel.vlines(curve.at, top - curve.barrier, top, color=colour, linewidth=0.9)
            panel.plot(alphas, losses, color=colour, label=label, linewidth=1.8, marker="o", ms=2.5)
        panel.set_xlabel("share of the second model")
        panel.set_ylabel(loss)
        panel.grid(axis="y")
        panel.set_axisbelow(True)
        panel.legend(loc="best", handlelength=1.4)
    return figure


def _points(name: str, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    pair = (curve.alphas, curve.losses) if isinstance(curve, Barrier) else curve
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(
            f"{_NAME}: curves[{name!r}] is a {type(curve).__name__}. Pass a Barrier, or a pair of "
            "shares and losses."
        )
    alphas, losses = (np.asarray(x, np.float64) for x in pair)
    if alphas.ndim != 1 or alphas.shape != losses.shape or not alphas.size:
        raise ValueError(
            f"{_NAME}: curves[{name!r}] has shares of shape {alphas.shape} and losses of shape "
            f"{losses.shape}. Give one loss for each share."
        )
    if not (np.isfinite(alphas).all() and np.isfinite(losses).all()):
        raise ValueError(f"{_NAME}: curves[{name!r}] is not finite. Leave such points out.")
    return alphas, losses
