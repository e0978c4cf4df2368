"""Tests of DELLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, apply
from jaxweights.merge import dare_linear, della, della_linear
from jaxweights.merge._delta_leaf import (
    LeafInputs,
    LeafPlan,
    Row,
    _rescaled,
    merge_delta_leaf,
    rank_shares,
)
from jaxweights.weights import Axes
from tests._fixtures import fixture
from tests.merge._public import assert_merged, checkpoint, models, results, settings

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def merge(tx, *deltas, key=KEY, **context):
    trees = [{"w": jnp.asarray(x, jnp.float32)} for x in deltas]
    base = {"w": jnp.zeros_like(trees[0]["w"])}
    return apply(tx, base, models=trees, key=key, **context)["w"]


@pytest.mark.parametrize("preset", [della, della_linear])
def test_at_density_one_it_agrees_with_mergekit(preset):
    merged, cases = results(preset.__name__)
    case = cases["density1"]
    tx = preset(density=1.0, weights=settings(case, "weight")["weight"], compat="mergekit")
    got = apply(tx, checkpoint("base"), models=models(case))
    assert_merged(got, merged["density1"], 1e-6)


@pytest.mark.parametrize("case, rescale", [("della_none", "none"), ("della_l1", "l1")])
def test_chances_and_rescaling_agree_with_mergekit(case, rescale):
    arrays = fixture("merge/sparsify_functions.npz")
    delta = jnp.asarray(arrays["delta"])
    chances = 0.5 - 0.2 + 2 * 0.2 * rank_shares(delta, (1,))
    np.testing.assert_allclose(chances, arrays[f"{case}/probs"], rtol=0, atol=1e-6)
    row = Row("ranked", rescale, "none", "sum", "none", "positive", "leaf", "mergekit")
    kept = jnp.where(arrays[f"{case}/mask"] > 0, delta, 0)
    got = _rescaled(kept, delta, chances, row, LeafPlan((), (True,)))
    np.testing.assert_allclose(got, arrays[f"{case}/out"], rtol=0, atol=1e-6)


def test_ranks_are_counted_along_the_inputs_and_shared_by_equal_entries():
    x = jnp.asarray([[1.0, -5.0], [-3.0, 2.0], [3.0, 2.0], [0.0, 2.0], [9.0, 0.0]])
    got = np.asarray(rank_shares(x, (0,))) * 4
    np.testing.assert_allclose(got.T, [[1, 2.5, 2.5, 0, 4], [4, 2, 2, 2, 0]])
    np.testing.assert_allclose(np.asarray(rank_shares(x, (0,))).mean(axis=0), 0.5)
    assert rank_shares(jnp.ones((1, 3)), (0,)).tolist() == [[0.5] * 3]  # one entry: no 0 / 0


@pytest.mark.parametrize("axes", [(0, 1, 2), (3,), (1,), (0, 2)])
def test_ranks_of_any_axes_are_those_of_sorting(axes):
    x = RNG.normal(size=(2, 3, 4, 5))
    got = np.asarray(rank_shares(jnp.asarray(x, jnp.float32), axes))
    others = [a for a in range(4) if a not in axes]
    flat = np.moveaxis(np.abs(x), others, range(len(others)))
    flat = flat.reshape(*flat.shape[: len(others)], -1)
    ranks = flat.argsort(-1).argsort(-1) / (flat.shape[-1] - 1)
    ours = np.moveaxis(got, others, range(len(others))).reshape(flat.shape)
    np.testing.assert_allclose(ours, ranks, rtol=1e-6)


def test_without_a_range_it_is_dare_with_the_same_key():
    delta = RNG.normal(size=(30, 4))
    got = merge(della_linear(density=0.6, epsilon=0.0), delta)
    np.testing.assert_array_equal(got, merge(dare_linear(density=0.6), delta))
    assert np.any(np.asarray(got) == 0)


def test_every_entry_is_dropped_or_divided_by_its_chance():
    delta = RNG.normal(size=(40, 5)).astype(np.float32)
    got = np.asarray(merge(della_linear(density=0.6, epsilon=0.3), delta))
    chance = 0.3 + 0.6 * np.abs(delta).argsort(0).argsort(0) / 39
    kept = got != 0
    np.testing.assert_allclose(got[kept], (delta / chance)[kept], rtol=1e-5)


def test_the_mean_over_keys_is_the_delta_and_larger_entries_stay_more_often():
    delta = np.concatenate([np.arange(1.0, 11.0), [30.0]]).reshape(-1, 1)
    keys = jax.random.split(KEY, 4000)
    draw = lambda key: merge(della_linear(density=0.5, epsilon=0.4), delta, key=key)  # noqa: E731
    got = np.asarray(jax.vmap(draw)(keys))[:, :, 0]
    chance = np.linspace(0.1, 0.9, 11)
    share = (got != 0).mean(axis=0)
    assert np.all(np.abs(share - chance) < 5 * np.sqrt(chance * (1 - chance) / 4000))
    deviation = delta[:, 0] * np.sqrt((1 / chance - 1) / 4000)
    assert np.all(np.abs(got.mean(axis=0) - delta[:, 0]) < 5 * deviation)


def test_layers_and_vectors_are_ranked_by_themselves():
    layout = Layout.of({"up/kernel": Axes()}, traced=True)
    # Of two layers one moves a thousand times as much: ranked together, it would stay whole.
    size = np.array([1.0, 1e3])
    model = {
        "up": {
            "kernel": jnp.asarray(RNG.normal(size=(2, 300, 4)) * size[:, None, None], jnp.float32),
            "bias": jnp.asarray(RNG.normal(size=(2, 300)) * size[:, None], jnp.float32),
        }
    }
    base = jax.tree.map(jnp.zeros_like, model)
    tx = della_linear(density=0.5, epsilon=0.45)
    got = apply(tx, base, models=[model], layout=layout, key=KEY)["up"]
    for leaf, n in (("kernel", 1200), ("bias", 300)):
        for layer in range(2):
            share = float((got[leaf][layer] != 0).mean())
            assert abs(share - 0.5) < 5 * np.sqrt(0.25 / n), (leaf, layer)


def test_mergekit_restores_the_sum_of_magnitudes():
    delta = RNG.normal(size=(40, 5))
    got = np.asarray(merge(della_linear(compat="mergekit"), delta))
    np.testing.assert_allclose(np.abs(got).sum(), np.abs(delta).sum(), rtol=1e-5)


def test_signs_are_elected_among_what_is_left():
    ones = np.ones((20, 20))
    got = np.asarray(merge(della(density=0.5, epsilon=0.2), ones, -2 * ones))
    assert set(got.ravel().tolist()) == {0.0, 2.0, -4.0}


@pytest.mark.parametrize("density, epsilon", [(0.1, 0.2), (0.5, 0.5), (0.95, 0.07), (0.0, 0.0)])
def test_chances_outside_of_zero_and_one_are_refused_with_both_bounds(density, epsilon):
    words = rf"merge.della: density={density:g} and epsilon={epsilon:g} give chances from .* to .*,"
    with pytest.raises(ValueError, match=words):
        della(density=density, epsilon=epsilon)
    della(density=[1.0, 0.5], epsilon=0.2)  # a density of one draws nothing


def test_settings_may_differ_by_model_and_compile_once():
    deltas = RNG.normal(size=(2, 9, 4))
    merge(della(density=[0.5, 0.6], epsilon=[0.2, 0.1]), *deltas)
    before = merge_delta_leaf._cache_size()
    for density in np.linspace(0.4, 0.6, 50):
        merge(della(density=[0.5, float(density)], epsilon=0.2), *deltas)
    assert merge_delta_leaf._cache_size() == before
    with pytest.raises(ValueError, match=r"merge.della: epsilon has 3 entries, but 2 models"):
        merge(della(epsilon=[0.1, 0.1, 0.1]), *deltas)


def test_inputs_without_a_range_are_those_of_dare():
    assert LeafInputs._field_defaults == {"epsilon": None}
