"""Tests of SCE."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import sce
from tests.merge._public import assert_merged, checkpoint, models, results

RNG = np.random.default_rng(0)
DELTAS = RNG.normal(size=(3, 50))


def merge(tx, *deltas):
    trees = [{"w": jnp.asarray(x, jnp.float32)} for x in deltas]
    return np.asarray(apply(tx, {"w": jnp.zeros_like(trees[0]["w"])}, models=trees)["w"])


def oracle(deltas, k):
    """Step by step, in float64."""
    deltas = np.asarray(deltas, np.float64)
    kept = np.zeros_like(deltas)
    chosen = np.argsort(-deltas.var(axis=0), kind="stable")[:k]
    kept[:, chosen] = deltas[:, chosen]
    energy = (kept**2).mean(axis=1)
    weights = energy / energy.sum()
    sign = np.where(kept.sum(axis=0) >= 0, 1, -1)
    part = weights[:, None] * (np.sign(kept) == sign)
    total = part.sum(axis=0)
    return (part * kept).sum(axis=0) / np.where(total > 0, total, 1)


@pytest.mark.parametrize("name", ["default", "select_topk"])
def test_it_agrees_with_mergekit(name):
    merged, cases = results("sce")
    density = cases[name].get("parameters", {}).get("select_topk", 1.0)
    tx = sce(density=density, compat="mergekit")
    got = apply(tx, checkpoint("base"), models=models(cases[name]))
    assert_merged(got, merged[name], 2e-6)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.99, 1.0])
def test_it_selects_calculates_and_erases(density):
    k = max(round(density * 50), 1)
    want = oracle(DELTAS, k)
    got = merge(sce(density=density), *DELTAS)
    assert np.count_nonzero(want) == k
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_density_zero_leaves_the_base():
    assert np.all(merge(sce(density=0.0), *DELTAS) == 0)


def test_deltas_of_equal_energy_and_sign_are_averaged():
    first = np.abs(DELTAS[0])
    second = first[::-1]
    np.testing.assert_allclose(merge(sce(), first, second), (first + second) / 2, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-5])
def test_small_deltas_are_weighted_by_energy_too_where_mergekit_takes_equal_weights(size):
    got = merge(sce(), *(size * DELTAS)) / size
    np.testing.assert_allclose(got, oracle(DELTAS, 50), rtol=1e-4, atol=1e-5)
    theirs = merge(sce(compat="mergekit"), *(size * DELTAS)) / size
    assert np.abs(theirs - oracle(DELTAS, 50)).max() > 0.01


def test_mergekit_counts_a_share_of_what_differs_and_rounds_down():
    deltas = DELTAS.copy()
    deltas[:, :21] = 1.0  # equal in all models: 29 entries differ
    for compat, kept in (("paper", 25), ("mergekit", 14)):
        assert np.count_nonzero(merge(sce(density=0.5, compat=compat), *deltas)) == kept


def test_selection_among_models_that_hardly_differ_is_warned_of():
    same = [DELTAS[0]] * 3
    with pytest.warns(UserWarning, match=r"merge.sce: \['w'\]: the models are equal in over 99 %"):
        got = merge(sce(density=0.5, compat="mergekit"), *same)
    assert np.all(got == 0)
    # Nothing to warn of: nothing is selected away, or nothing has changed.
    np.testing.assert_allclose(merge(sce(), *same), DELTAS[0], rtol=1e-6)
    merge(sce(density=0.5), *(0 * DELTAS))


@pytest.mark.parametrize("density", [-0.1, 1.5, [0.5, 0.5]])
def test_the_density_is_checked(density):
    with pytest.raises(ValueError, match=r"merge.sce: density=.* must be one number in \[0, 1\]"):
        sce(density=density)
