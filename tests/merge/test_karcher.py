"""Tests of the Karcher mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import _karcher, _sphere, karcher, multislerp, slerp
from tests.merge._public import assert_merged, checkpoint, models, results

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(4, 30))


def merge(tx, *vectors, base=None):
    trees = [{"w": jnp.asarray(x, jnp.float32)} for x in vectors]
    start = jnp.zeros_like(trees[0]["w"]) if base is None else jnp.asarray(base, jnp.float32)
    return np.asarray(apply(tx, {"w": start}, models=trees)["w"], np.float64)


def oracle(vectors, weights):
    """Gradient descent on the sphere in float64, point by point."""
    weights = np.asarray(weights) / np.sum(weights)
    sizes = np.linalg.norm(vectors, axis=1)
    units = vectors / sizes[:, None]
    mean = weights @ units
    mean /= np.linalg.norm(mean)
    for _ in range(500):
        cosines = units @ mean
        angles = np.arccos(np.clip(cosines, -1, 1))
        ratio = np.where(angles > 1e-12, angles / np.maximum(np.sin(angles), 1e-12), 1)
        step = (weights * ratio) @ (units - cosines[:, None] * mean)
        length = np.linalg.norm(step)
        if length < 1e-14:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
    return weights @ sizes * mean


def at_angle(degrees):
    """Two vectors of different length."""
    omega = np.radians(degrees)
    first, other = np.linalg.qr(POINTS.T)[0].T[:2]
    return 2 * first, 3 * (np.cos(omega) * first + np.sin(omega) * other)


@pytest.mark.parametrize("name", ["default", "few_iters"])
def test_it_agrees_with_mergekit(name):
    merged, cases = results("karcher")
    extra = cases[name].get("parameters", {})
    tx = karcher(steps=extra.get("max_iter"), tolerance=extra.get("tol"), compat="mergekit")
    got = apply(tx, checkpoint("base"), models=models(cases[name]))
    assert_merged(got, merged[name], 5e-6)


@pytest.mark.parametrize("degrees", [1e-3, 1.0, 30.0, 90.0, 149.0])
@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_of_two_models_it_is_slerp(degrees, t):
    first, second = at_angle(degrees)
    want = merge(slerp(t=t, norm="interpolate"), second, base=first)
    got = merge(karcher(weights=[1 - t, t]), first, second)
    # A few last bits of float32, of vectors of length 2 to 3.
    assert np.linalg.norm(got - want) < 2e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
def test_it_is_the_minimum_that_descent_finds(spread):
    points = np.ones(30) + spread * POINTS
    weights = [0.1, 0.4, 0.3, 0.2]
    got, want = merge(karcher(weights=weights), *points), oracle(points, weights)
    assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want)
    if spread == 1.0:  # where the normalised mean is another point
        other = merge(multislerp(weights=weights), *points)
        assert np.linalg.norm(other - want) > 1e-3 * np.linalg.norm(want)


def test_it_turns_with_the_models_and_keeps_the_mean_of_their_norms():
    turn = np.linalg.qr(RNG.normal(size=(30, 30)))[0]
    got, turned = merge(karcher(), *POINTS), merge(karcher(), *(POINTS @ turn))
    np.testing.assert_allclose(turned, got @ turn, atol=5e-6)
    size = np.linalg.norm(POINTS, axis=1).mean()
    np.testing.assert_allclose(np.linalg.norm(got), size, rtol=1e-6)


def test_a_zero_vector_takes_part_in_the_norm_only():
    got = merge(karcher(), POINTS[0], np.zeros(30), POINTS[1])
    want = merge(karcher(), POINTS[0], POINTS[1]) * 2 / 3
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.all(merge(karcher(), np.zeros(30), np.zeros(30)) == 0)


def test_deltas_are_averaged_on_the_sphere_and_added_to_the_base():
    base = POINTS[3]
    got = merge(karcher(deltas=True), *(base + POINTS[:3]), base=base)
    np.testing.assert_allclose(got, base + merge(karcher(), *POINTS[:3]), atol=3e-6)


def test_directions_that_cancel_are_refused_by_name():
    with pytest.raises(ValueError, match=r"merge.karcher: 'w': the weighted directions .* cancel"):
        merge(karcher(), POINTS[0], -2 * POINTS[0])


def test_weights_are_checked_and_may_be_traced():
    with pytest.raises(ValueError, match=r"weights=\[1.0, -0.5\] must not be negative"):
        karcher(weights=[1, -0.5])
    with pytest.raises(ValueError, match="cannot be normalised"):
        karcher(weights=[0, 0])
    slope = jax.grad(
        lambda t: jnp.sum(
            apply(
                karcher(weights=jnp.stack([1 - t, t])),
                {"w": jnp.zeros(30)},
                models=[{"w": jnp.asarray(x, jnp.float32)} for x in POINTS[:2]],
            )["w"]
            ** 3
        )
    )(0.3)
    value = lambda t: np.sum(oracle(POINTS[:2], [1 - t, t]) ** 3)  # noqa: E731
    np.testing.assert_allclose(slope, (value(0.3 + 1e-4) - value(0.3 - 1e-4)) / 2e-4, rtol=1e-3)


def test_two_hundred_weights_compile_once():
    merge(karcher(weights=[1, 2]), *POINTS[:2])
    programs = [_sphere.squared_length, _karcher._factors, _sphere.weighted_sum]
    before = [f._cache_size() for f in programs]
    for w in np.linspace(0.1, 2, 200):
        merge(karcher(weights=[1, float(w)]), *POINTS[:2])
    assert [f._cache_size() for f in programs] == before
