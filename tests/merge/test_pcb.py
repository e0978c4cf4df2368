"""Tests of PCB-Merging."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, apply
from jaxweights.merge import pcb
from jaxweights.merge._pcb import _kth_of_rows, _pcb_leaf, _scores
from jaxweights.weights import Axes
from tests.merge._public import NAMES, results, whole_checkpoint

RNG = np.random.default_rng(0)
DELTAS = 0.3 * RNG.normal(size=(3, 60))


def merge(tx, *deltas, **context):
    trees = [{"w": jnp.asarray(x, jnp.float32)} for x in deltas]
    base = {"w": jnp.zeros_like(trees[0]["w"])}
    return np.asarray(apply(tx, base, models=trees, **context)["w"])


def oracle(deltas, density, clip=False):
    """The authors' steps, in float64 and with sorting."""
    deltas = np.asarray(deltas, np.float64)
    n, d = deltas.shape
    sizes = np.abs(deltas)
    ranked = np.sort(sizes, axis=1)
    low, high = ranked[:, [0]], ranked[:, [-1]]
    if clip:
        low, high = ranked[:, [int(d * 1e-4)]], ranked[:, [int(d * (1 - 1e-4) - 1)]]
    sizes = np.clip(sizes, low, high)
    score = np.exp(n * ((sizes - low) / (high - low)) ** 2) * np.tanh(deltas * deltas.sum(axis=0))
    cut = np.sort(score, axis=1)[:, [min(int(d * (1 - density)), d - 1)]]
    share = np.maximum(score - cut, 0) / (score.max(axis=1, keepdims=True) - cut)
    total = share.sum(axis=0)
    return (share * np.sign(deltas) * sizes).sum(axis=0) / np.where(total > 0, total, 1)


@pytest.mark.parametrize("name", ["ratio0.1", "ratio0.3"])
def test_it_agrees_with_its_authors_who_rank_the_whole_tree(name):
    want, cases = results("pcb_merging", ("",))
    # The whole model as one vector ranks as the tree does, and compiles once.
    joined = lambda tree: np.concatenate(  # noqa: E731
        [np.ravel(tree[p]) for p in sorted(tree) if p in want[name]]
    )
    base = joined(whole_checkpoint("base"))
    models = [{"all": joined(whole_checkpoint(n))} for n in NAMES]
    got = apply(pcb(density=cases[name]["pcb_ratio"]), {"all": base}, models=models)["all"]
    off = np.abs(np.asarray(got) - base - joined(want[name])) > 1e-5
    assert off.mean() < 1e-3


def test_leaves_are_ranked_together_or_one_by_one():
    pieces = [{"a": d[:20], "b": d[20:].reshape(5, 8)} for d in DELTAS]
    trees = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), piece) for piece in pieces]
    base = jax.tree.map(jnp.zeros_like, trees[0])
    join = lambda tree: np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])])  # noqa: E731
    got = join(apply(pcb(density=0.3), base, models=trees))
    np.testing.assert_allclose(got, oracle(DELTAS, 0.3), rtol=1e-4, atol=1e-6)
    apart = join(apply(pcb(density=0.3, scope="leaf"), base, models=trees))
    want = np.concatenate([oracle(DELTAS[:, :20], 0.3), oracle(DELTAS[:, 20:], 0.3)])
    np.testing.assert_allclose(apart, want, rtol=1e-4, atol=1e-6)
    assert np.abs(got - apart).max() > 0.01


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9, 1.0])
def test_scores_below_zero_are_ranked_as_well(density):
    # At 0.9 the cut is among the scores of entries against the sum of all.
    got = merge(pcb(density=density), *DELTAS)
    np.testing.assert_allclose(got, oracle(DELTAS, density), rtol=1e-4, atol=1e-6)


def test_large_trees_are_clipped_at_both_ends():
    deltas = RNG.normal(size=(2, 20_000))
    deltas[0, 7] = 50.0
    got = merge(pcb(density=0.1), *deltas)
    np.testing.assert_allclose(got, oracle(deltas, 0.1, clip=True), rtol=1e-3, atol=1e-5)
    assert abs(got[7]) < 6


def test_layers_are_ranked_by_themselves():
    layout = Layout.of({"w": Axes()}, traced=True)
    stacked = DELTAS.reshape(3, 2, 5, 6) * np.array([1, 1e-2]).reshape(2, 1, 1)
    got = merge(pcb(density=0.3, scope="leaf"), *stacked, layout=layout)
    for i in range(2):
        want = oracle(stacked[:, i].reshape(3, -1), 0.3).reshape(5, 6)
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-6)


def test_it_runs_under_jit():
    tx = pcb(density=0.9)
    trees = [{"w": jnp.asarray(x, jnp.float32)} for x in DELTAS]
    compiled = jax.jit(lambda models: apply(tx, {"w": jnp.zeros(60)}, models=models)["w"])
    np.testing.assert_allclose(compiled(trees), merge(tx, *DELTAS), rtol=1e-5, atol=1e-7)


def test_weights_and_scale_multiply_deltas_but_not_their_scores():
    once = merge(pcb(density=0.3), *DELTAS)
    np.testing.assert_allclose(merge(pcb(density=0.3, scale=0.5), *DELTAS), once / 2, rtol=1e-6)
    np.testing.assert_allclose(merge(pcb(density=0.3, weights=[2] * 3), *DELTAS), 2 * once)
    programs = [_pcb_leaf, _scores, _kth_of_rows]
    merge(pcb(density=0.3, scope="leaf"), *DELTAS)
    before = [f._cache_size() for f in programs]
    for x in np.linspace(0.1, 1, 50):
        merge(pcb(density=float(x), scale=float(x), scope="leaf"), *DELTAS)
    assert [f._cache_size() for f in programs] == before


def test_models_that_did_not_change_leave_the_base():
    assert np.all(merge(pcb(), 0 * DELTAS[0], 0 * DELTAS[1]) == 0)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"merge.pcb: density=0 must be one number in \(0, 1\]"):
        pcb(density=0)
    with pytest.raises(ValueError, match=r"merge.pcb: scope='row' is not one of 'leaf', 'tree'"):
        pcb(scope="row")
