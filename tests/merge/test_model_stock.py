"""Tests of Model Stock."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import model_stock
from jaxweights.weights import Axes
from tests.merge._public import assert_merged, checkpoint, models, results

RNG = np.random.default_rng(0)


def merge(tx, *deltas, base=0.0):
    trees = [{"w": jnp.asarray(base + x, jnp.float32)} for x in deltas]
    start = jnp.full_like(trees[0]["w"], base)
    return np.asarray(apply(tx, {"w": start}, models=trees)["w"], np.float64) - base


def ratio(deltas):
    """The paper's t, from all pairs."""
    units = [d / np.linalg.norm(d) for d in deltas]
    n = len(units)
    cosine = np.mean([units[i] @ units[j] for i in range(n) for j in range(i)])
    return n * cosine / (1 + (n - 1) * cosine)


@pytest.mark.parametrize("name, compat", [("default", "paper"), ("default", "mergekit"),
                                          ("filter_wise", "mergekit")])  # fmt: skip
def test_it_agrees_with_mergekit(name, compat):
    merged, cases = results("model_stock")
    base = checkpoint("base")
    layout = {p: Axes(inputs=(-1,), outputs=(-2,)) for p, x in base.items() if x.ndim == 2}
    tx = model_stock(group="output" if name == "filter_wise" else "leaf", compat=compat)
    assert_merged(apply(tx, base, models=models(cases[name]), layout=layout), merged[name], 2e-6)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_it_is_the_formula(n):
    deltas = 0.5 + RNG.normal(size=(n, 40))
    want = ratio(deltas) * deltas.mean(axis=0)
    assert 0.1 < ratio(deltas) < 0.9
    np.testing.assert_allclose(merge(model_stock(), *deltas), want, rtol=1e-5, atol=1e-6)


def test_orthogonal_deltas_leave_the_base():
    np.testing.assert_array_equal(merge(model_stock(), np.eye(4)[0], 3 * np.eye(4)[1]), np.zeros(4))


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e3])
def test_the_ratio_does_not_depend_on_the_size_of_the_deltas(size):
    deltas = size * (0.5 + RNG.normal(size=(2, 40)))
    want = ratio(deltas) * deltas.mean(axis=0)
    got = merge(model_stock(), *deltas)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    if size == 1e-6:  # mergekit takes norms for larger than they are, and stays near the base
        guarded = merge(model_stock(compat="mergekit"), *deltas)
        assert np.linalg.norm(guarded) < 1e-3 * np.linalg.norm(want)


def test_the_ratio_is_clipped_where_it_has_a_pole():
    angles = np.radians([0, 119.5, 240.5])
    deltas = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert ratio(deltas) < -50
    assert np.all(merge(model_stock(), *deltas) == 0)
    free = merge(model_stock(clip=False), *deltas)
    np.testing.assert_allclose(free, ratio(deltas) * deltas.mean(axis=0), rtol=1e-3, atol=1e-6)


def test_a_delta_of_zero_counts_as_orthogonal():
    delta = RNG.normal(size=40)
    got = merge(model_stock(), delta, delta, 0 * delta)
    # Of three pairs one has cosine 1: t = 3/3 / (1 + 2/3).
    np.testing.assert_allclose(got, 0.6 * delta * 2 / 3, rtol=1e-5)
    assert np.all(merge(model_stock(), 0 * delta, 0 * delta) == 0)


def test_every_output_may_have_a_ratio_of_its_own():
    deltas = 0.5 + RNG.normal(size=(2, 7, 3))
    got = merge(model_stock(group="output"), *deltas)
    for column in range(3):
        own = deltas[:, :, column]
        want = max(ratio(own), 0) * own.mean(axis=0)
        np.testing.assert_allclose(got[:, column], want, rtol=1e-5, atol=1e-6)


def test_one_model_is_refused():
    words = r"merge.model_stock: 1 model was given, but it merges at least 2\. One delta has no"
    with pytest.raises(ValueError, match=words):
        merge(model_stock(), np.ones(3))
