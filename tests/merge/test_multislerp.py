"""Tests of the normalised mean."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import multislerp, slerp
from tests.merge._public import assert_merged, checkpoint, models, results, settings

POINTS = np.random.default_rng(0).normal(size=(3, 30))


def merge(tx, *vectors, base=None):
    trees = [{"w": jnp.asarray(x, jnp.float32)} for x in vectors]
    start = jnp.zeros_like(trees[0]["w"]) if base is None else jnp.asarray(base, jnp.float32)
    return np.asarray(apply(tx, {"w": start}, models=trees)["w"], np.float64)


@pytest.mark.parametrize("name", ["no_base", "with_base", "raw_weights"])
def test_it_agrees_with_mergekit(name):
    merged, cases = results("multislerp")
    case = cases[name]
    tx = multislerp(
        weights=settings(case, "weight")["weight"],
        deltas="base_model" in case,
        normalize=case.get("parameters", {}).get("normalize_weights", True),
    )
    assert_merged(apply(tx, checkpoint("base"), models=models(case)), merged[name], 2e-6)


def test_it_is_the_mean_of_directions_with_the_mean_norm():
    weights = np.array([0.2, 0.5, 0.3])
    sizes = np.linalg.norm(POINTS, axis=1)
    mean = weights @ (POINTS / sizes[:, None])
    want = weights @ sizes * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(merge(multislerp(weights=weights), *POINTS), want, atol=2e-6)
    np.testing.assert_allclose(
        merge(multislerp(weights=2 * weights, normalize=False), *POINTS), 2 * want, atol=4e-6
    )


@pytest.mark.parametrize("degrees", [90, 149])
@pytest.mark.parametrize("t", [0.25, 0.5])
def test_of_two_models_it_is_slerp_only_halfway(degrees, t):
    omega = np.radians(degrees)
    first, second = np.array([1.0, 0.0]), np.array([np.cos(omega), np.sin(omega)])
    ours = merge(multislerp(weights=[1 - t, t]), first, second)
    theirs = merge(slerp(t=t, norm="interpolate"), second, base=first)
    # The straight line seen from the centre, beside the arc: 4 and 23 degrees at a quarter.
    want = t * omega - np.arctan2(t * second[1], 1 - t + t * second[0])
    got = np.arctan2(theirs[1], theirs[0]) - np.arctan2(ours[1], ours[0])
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (abs(np.degrees(want)) > 3) == (t != 0.5)


def test_directions_that_cancel_are_refused_by_name():
    with pytest.raises(ValueError, match=r"merge.multislerp: 'w': the weighted directions"):
        merge(multislerp(), POINTS[0], -2 * POINTS[0])
    with pytest.raises(ValueError, match="cannot be normalised"):
        multislerp(weights=[1, -1])
