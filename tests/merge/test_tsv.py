"""TSV-Merge keeps the leading directions of every task."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply, partition
from jaxweights.merge import task_vector, tsv
from jaxweights.weights import Axes
from tests.merge._matrices import (
    LAYOUT,
    SHAPE,
    draw,
    merged,
    spectrum,
    stacked_models,
    truncated,
)
from tests.merge._public import NAMES, results, whole_checkpoint


@pytest.mark.parametrize("case, density", [("tsv_m", None), ("tsv_m_lossless", 1.0)])
def test_it_agrees_with_its_authors(case, density):
    want = results("tsv_iso", ("",))[0][case]
    base = {path: whole_checkpoint("base")[path] for path in want}
    models = [{path: whole_checkpoint(name)[path] for path in want} for name in NAMES]
    matrices = [path for path in want if want[path].ndim == 2]
    layout = dict.fromkeys(matrices, Axes(inputs=(-1,), outputs=(-2,)))
    got = task_vector(apply(tsv(density=density), base, models=models, layout=layout), base)
    assert len(matrices) == 7
    for path, expected in want.items():
        np.testing.assert_allclose(got[path], expected, rtol=0, atol=1e-5, err_msg=path)


def test_one_model_is_its_own_merge():
    delta = draw(0, *SHAPE)
    np.testing.assert_allclose(merged(tsv(), [delta]), delta, rtol=0, atol=1e-5)


def test_copies_of_one_model_give_its_truncation():
    delta = draw(0, *SHAPE)
    for copies, rank in ((2, 2), (4, 1)):
        got = merged(tsv(), [delta.copy() for _ in range(copies)])
        np.testing.assert_allclose(got, truncated(delta, rank), rtol=0, atol=1e-5)
        # The full rank would be off by the size of the delta itself.
        assert np.abs(got - delta).max() > 0.1


def test_deltas_of_low_rank_are_not_disturbed_by_arbitrary_directions():
    left, right = np.linalg.qr(draw(0, 6, 6))[0], np.linalg.qr(draw(1, 4, 4))[0]
    first = 3 * np.outer(left[:, 0], right[0])
    second = 2 * np.outer(left[:, 1], right[1])
    # Rank 1 each where rank 2 is kept: the second directions are rounding.
    np.testing.assert_allclose(merged(tsv(), [first, second]), first + second, rtol=0, atol=1e-5)
    still = np.zeros_like(first)
    np.testing.assert_allclose(merged(tsv(), [first, still]), first, rtol=0, atol=1e-5)


def test_orthogonal_deltas_add_up_and_parallel_ones_do_not():
    left, right = np.linalg.qr(draw(0, 6, 6))[0], np.linalg.qr(draw(1, 4, 4))[0]
    deltas = [
        sum((3 - j) * np.outer(left[:, 2 * i + j], right[2 * i + j]) for j in range(2))
        for i in range(2)
    ]
    np.testing.assert_allclose(merged(tsv(), deltas), sum(deltas), rtol=0, atol=1e-5)
    one = np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(merged(tsv(), [2 * one, 4 * one]), 3 * one, rtol=0, atol=1e-5)


def test_the_rank_and_the_order_are_as_promised():
    deltas = [draw(i, 10, 9) for i in range(4)]
    got = merged(tsv(), deltas)
    assert (spectrum(got) > 1e-4).sum() == 8  # two directions of each of four
    np.testing.assert_allclose(merged(tsv(), deltas[::-1]), got, rtol=0, atol=1e-5)
    scaled = merged(tsv(), [1e-4 * d for d in deltas])
    np.testing.assert_allclose(scaled * 1e4, got, rtol=0, atol=1e-4)


def test_weights_and_scale_multiply_deltas():
    deltas = [draw(i, *SHAPE) for i in range(2)]
    want = merged(tsv(), [2 * deltas[0], -deltas[1]])
    got = merged(tsv(weights=[4, -2], scale=0.5), deltas)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_matrices_too_small_for_all_models_average_their_deltas():
    deltas = [draw(i, 6, 2) for i in range(3)]
    np.testing.assert_allclose(merged(tsv(), deltas), np.mean(deltas, axis=0), atol=1e-6)
    assert np.abs(merged(tsv(density=0.5), deltas) - np.mean(deltas, axis=0)).max() > 0.1


def test_layers_and_heads_are_merged_as_their_matrices_and_the_rest_averaged():
    models = stacked_models()
    base = jax.tree.map(jnp.zeros_like, models[0])
    got = apply(tsv(), base, models=models, layout=LAYOUT)
    for layer in range(2):
        alone = merged(tsv(), [np.asarray(m["layers"]["kernel"][layer]) for m in models])
        np.testing.assert_allclose(got["layers"]["kernel"][layer], alone, rtol=1e-5, atol=1e-5)
    alone = merged(tsv(), [np.asarray(m["heads"]["kernel"]).reshape(6, 4) for m in models])
    heads = np.asarray(got["heads"]["kernel"]).reshape(6, 4)
    np.testing.assert_allclose(heads, alone, rtol=0, atol=1e-5)
    for part, leaf in (("layers", "norm"), ("table", "embedding")):
        want = np.mean([m[part][leaf] for m in models], axis=0)
        np.testing.assert_allclose(got[part][leaf], want, rtol=0, atol=1e-6)


def test_a_table_that_a_rule_names_is_a_matrix():
    models = stacked_models()
    base = jax.tree.map(jnp.zeros_like, models[0])
    tx = partition(("table/.*", tsv()), (..., tsv(scale=0.0)))
    got = apply(tx, base, models=models, layout=LAYOUT)
    want = merged(tsv(), [np.asarray(m["table"]["embedding"]).T for m in models]).T
    np.testing.assert_allclose(got["table"]["embedding"], want, rtol=0, atol=1e-5)


def test_an_ambiguous_leaf_is_refused_by_name():
    models = [{"w/kernel": jnp.asarray(draw(i, 2, 3, 4))} for i in range(2)]
    with pytest.raises(ValueError, match=r"merge.tsv: 'w/kernel': .*\(2, 3, 4\).*Axes\("):
        apply(tsv(), {"w/kernel": jnp.zeros((2, 3, 4))}, models=models)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"density": 0.0}, r"density=0.0 must lie in \(0, 1\]"),
        ({"rank_tol": 1.0}, r"rank_tol=1.0 must lie in \[0, 1\)"),
        ({"scale": float("inf")}, "scale=inf must be finite"),
        ({"weights": [0, 0]}, "sum to 0"),
    ],
)
def test_bad_settings_are_refused_when_built(settings, words):
    with pytest.raises(ValueError, match=words):
        tsv(**settings)


def test_a_model_with_nan_is_named():
    bad = draw(1, *SHAPE)
    bad[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"merge.tsv: 'kernel': 1 of 24 values of models\[1\]"):
        merged(tsv(), [draw(0, *SHAPE), bad])
