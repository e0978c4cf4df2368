"""The figure of a loss along the lines between models."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.align import loss_barrier, loss_curve_figure
from jaxweights.merge import interpolate_path


def _double_well(params):
    return (params["x"] ** 2 - 1) ** 2


def test_barriers_and_paths_are_drawn_where_they_lie():
    ends = {"x": jnp.float32(-1.0)}, {"x": jnp.float32(1.0)}
    found = loss_barrier(_double_well, *ends, points=5)
    alphas = [0.0, 0.25, 1.0]
    path = interpolate_path({"x": jnp.ones(1)}, {"x": 2 * jnp.ones(1)}, alphas)
    losses = [float(_double_well({"x": x[0]})) for x in path["x"]]
    figure = loss_curve_figure({"trained": found, "merged": (alphas, losses)}, loss="MSE")
    [axes] = figure.axes
    assert axes.get_ylabel() == "MSE"
    assert axes.get_legend_handles_labels()[1] == ["trained, barrier 1", "merged"]
    first, second = axes.get_lines()
    np.testing.assert_allclose(first.get_xdata(), found.alphas)
    np.testing.assert_allclose(first.get_ydata(), found.losses)
    np.testing.assert_allclose(second.get_ydata(), losses)
    [height] = axes.collections
    np.testing.assert_allclose(height.get_segments()[0], [[0.5, 0.0], [0.5, 1.0]], atol=1e-6)


@pytest.mark.parametrize(
    "curves, words",
    [
        ({}, "curves is empty"),
        ({"a": 0.5}, r"curves\['a'\] is a float. Pass a Barrier, or a pair"),
        ({"a": ([0.0, 1.0], [1.0])}, r"curves\['a'\] has shares of shape \(2,\) and losses of"),
        ({"a": ([0.0, 1.0], [1.0, np.nan])}, r"curves\['a'\] is not finite"),
    ],
)
def test_what_is_no_curve_is_refused(curves, words):
    with pytest.raises(ValueError, match=f"align.loss_curve_figure: {words}"):
        loss_curve_figure(curves)
