"""Tests of NuSLERP."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import nuslerp, slerp
from jaxweights.weights import Axes
from tests.merge._public import assert_merged, checkpoint, models, results, settings

RNG = np.random.default_rng(0)
BASE, A, B = RNG.normal(size=(3, 6, 8)).astype(np.float32)
# Torch's orientation: the last axis holds the inputs of one output.
TORCH = Axes(inputs=(-1,), outputs=(-2,))


def merge(tx, *arrays, base=BASE):
    trees = [{"w": jnp.asarray(x)} for x in arrays]
    return np.asarray(apply(tx, {"w": jnp.asarray(base)}, models=trees)["w"])


@pytest.mark.parametrize("name", ["flat_no_base", "flat_with_base", "first_axis", "last_axis"])
def test_it_agrees_with_mergekit(name):
    merged, cases = results("nuslerp")
    case = cases[name]
    extra = case.get("parameters", {})
    vector = "input" if extra.get("nuslerp_row_wise") else "output"
    tx = nuslerp(
        weights=settings(case, "weight")["weight"],
        deltas="base_model" in case,
        group="leaf" if extra.get("nuslerp_flatten", True) else vector,
    )
    base = checkpoint("base")
    layout = {path: TORCH for path, x in base.items() if x.ndim == 2}
    assert_merged(apply(tx, base, models=models(case), layout=layout), merged[name], 2e-6)


def test_without_deltas_it_is_slerp_of_the_models():
    got = merge(nuslerp(weights=[3, 1]), A, B)
    np.testing.assert_allclose(got, merge(slerp(t=0.25), B, base=A), rtol=1e-6)


def test_deltas_are_interpolated_between_and_added_to_the_base():
    got = merge(nuslerp(weights=[3, 1], deltas=True), A, B)
    deltas = merge(nuslerp(weights=[3, 1]), A - BASE, B - BASE)
    np.testing.assert_allclose(got, BASE + deltas, rtol=1e-5, atol=1e-6)
    assert np.abs(got - merge(nuslerp(weights=[3, 1]), A, B)).max() > 0.1


@pytest.mark.parametrize("group, axis", [("output", 1), ("input", 0)])
def test_vectors_may_be_the_inputs_of_an_output_or_the_reverse(group, axis):
    got = merge(nuslerp(group=group), A, B)
    for i in range(A.shape[axis]):
        own = [np.take(x, i, axis) for x in (BASE, A, B)]
        want = merge(nuslerp(), own[1], own[2], base=own[0])
        np.testing.assert_allclose(np.take(got, i, axis), want, rtol=1e-5, atol=1e-6)


def test_weights_that_sum_to_zero_are_refused_unless_mergekit_is_wanted():
    with pytest.raises(ValueError, match=r"merge.nuslerp: weights=\[1.0, -1.0\] sum to 0"):
        nuslerp(weights=[1, -1])
    got = merge(nuslerp(weights=[1, -1], compat="mergekit"), A, B)
    np.testing.assert_array_equal(got, merge(nuslerp(), A, B))


def test_opposite_deltas_are_refused_by_name_or_interpolated_linearly():
    with pytest.raises(ValueError, match="'w': the two vectors point in opposite directions"):
        merge(nuslerp(deltas=True), BASE + 1, BASE - 1)
    got = merge(nuslerp(deltas=True, antipodal="lerp"), BASE + 1, BASE - 1)
    np.testing.assert_allclose(got, BASE, atol=1e-6)


def test_it_takes_exactly_two_models():
    with pytest.raises(ValueError, match=r"3 models were given, but it merges exactly 2"):
        merge(nuslerp(), A, B, A)
    with pytest.raises(ValueError, match=r"merge.nuslerp: weights has 3 entries, but 2 models"):
        merge(nuslerp(weights=[1, 2, 3]), A, B)
