"""Masks leave padding out of every statistic."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.calibrate import calibrate
from tests.calibrate._calibrate import (
    ALL,
    assert_statistics,
    batches_of,
    stacked,
)
from tests.calibrate._models import MODELS, draw

MASK = np.array([[True, True, False], [True, False, False]])


def masked_run(fn, params, batch, mask, names=ALL):
    needs = dict.fromkeys(params, names)
    return calibrate(fn, params, [batch], needs=needs, mask=lambda batch: mask)


@pytest.mark.parametrize("flattened", [False, True])
def test_padding_is_left_out_of_every_statistic(flattened):
    params = {"w": draw(0, 4, 5), "v": draw(1, 5, 2)}

    def fn(p, x):
        x = x.reshape(-1, 4) if flattened else x
        return jnp.tanh(x @ p["w"]) @ p["v"]

    x = draw(2, 2, 3, 4)
    stats = masked_run(fn, params, x, MASK)
    kept = x[MASK]
    expected = {"w": stacked(kept), "v": stacked(np.tanh(kept @ params["w"]))}
    assert_statistics(stats, expected)
    assert int(stats.get("w", "count")) == 3


def test_padding_of_one_example_leaves_its_pooled_row_out():
    params = {"w": draw(0, 4, 5)}
    mask = np.array([[True, False, False], [False, False, False]])
    x = draw(2, 2, 3, 4)
    stats = masked_run(lambda p, x: jnp.mean(x, axis=1) @ p["w"], params, x, mask)
    assert_statistics(stats, {"w": stacked(x.mean(1)[:1])})


def test_padding_under_scan_and_heads():
    model = MODELS["attention"]
    x = draw(2, 2, 3, 4)
    stats = masked_run(model.fn, model.params, x, MASK)
    rows = {path: r[MASK.reshape(-1)] for path, r in model.rows(model.params, x).items()}
    assert_statistics(stats, {path: stacked(r) for path, r in rows.items()})


def test_an_image_mask_of_examples_leaves_out_their_windows():
    model = MODELS["conv"]
    x = draw(2, 2, 6, 5, 2)
    stats = masked_run(model.fn, model.params, x, np.array([True, False]))
    assert_statistics(stats, {p: stacked(r) for p, r in model.rows(model.params, x[:1]).items()})


@pytest.mark.parametrize("axes", ["time first", "another length"])
def test_a_mask_that_does_not_fit_is_refused(axes):
    def fn(p, x):
        x = jnp.swapaxes(x, 0, 1) if axes == "time first" else x[:, :2]
        return x @ p["w"]

    shape = r"\(3, 2\)" if axes == "time first" else r"\(2, 2\)"
    words = rf"calibrate: 'w': its activations have free axes {shape}, so the mask \(2, 3\)"
    with pytest.raises(ValueError, match=words):
        masked_run(fn, {"w": draw(0, 4, 5)}, draw(2, 2, 3, 4), MASK)


def test_a_mask_with_tokens_sorted_by_expert_is_refused():
    model = MODELS["experts by ragged_dot"]
    batch = batches_of(model, count=1)[0]
    with pytest.raises(ValueError, match=r"calibrate: 'w': its tokens are sorted by expert"):
        masked_run(model.fn, model.params, batch, np.ones(6, bool))


def test_nan_in_padding_does_not_reach_the_statistics():
    x = draw(2, 2, 3, 4)
    x[~MASK] = np.nan
    stats = masked_run(lambda p, x: x @ p["w"], {"w": draw(0, 4, 5)}, x, MASK)
    assert_statistics(stats, {"w": stacked(x[MASK])})
