"""Tests of DARE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import dare_linear, dare_ties, task_arithmetic
from tests.merge._trees import assert_close, assert_same_bits, finetuned, tree

KEY = jax.random.key(0)
BASE = tree(0)
MODELS = [finetuned(BASE, seed) for seed in (1, 2)]


def merge(tx, *deltas, key=KEY):
    models = [{"w": jnp.asarray(delta, jnp.float32)} for delta in deltas]
    return apply(tx, {"w": jnp.zeros_like(models[0]["w"])}, models=models, key=key)["w"]


def test_every_entry_is_dropped_or_divided_by_the_density():
    delta = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    got = np.asarray(merge(dare_linear(density=0.25), delta))
    kept = got != 0
    np.testing.assert_array_equal(got[kept], (delta / np.float32(0.25))[kept])
    assert abs(kept.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)  # five standard deviations


def test_the_mean_over_keys_is_the_delta():
    delta = np.random.default_rng(1).normal(size=30).astype(np.float32)
    density, keys = 0.3, jax.random.split(KEY, 2000)
    got = jax.vmap(lambda key: merge(dare_linear(density=density), delta, key=key))(keys)
    deviation = np.abs(delta) * np.sqrt((1 - density) / density / len(keys))
    assert np.all(np.abs(np.asarray(got).mean(axis=0) - delta) < 5 * deviation)
    # Without rescaling the same test fails: a mean of 0.3 of the delta is far away.
    raw = jax.vmap(lambda k: merge(dare_linear(density=density, rescale="none"), delta, key=k))(
        keys
    )
    assert np.all(np.abs(np.asarray(raw).mean(axis=0) - delta) > 5 * deviation)


@pytest.mark.parametrize("norm, order", [("l1", 1), ("l2", 2), ("linf", np.inf)])
def test_rescaling_may_restore_a_norm_instead(norm, order):
    delta = np.random.default_rng(2).normal(size=100).astype(np.float32)
    got = np.asarray(merge(dare_linear(density=0.5, rescale=norm), delta))
    np.testing.assert_allclose(np.linalg.norm(got, order), np.linalg.norm(delta, order), rtol=1e-5)
    if norm == "l1":
        mergekit = merge(dare_linear(density=0.5, compat="mergekit"), delta)
        np.testing.assert_array_equal(mergekit, got)


def test_density_one_is_task_arithmetic_and_needs_no_key():
    got = apply(dare_linear(density=1.0), BASE, models=MODELS)
    assert_close(got, apply(task_arithmetic(), BASE, models=MODELS))
    with pytest.raises(ValueError, match=r"merge.dare_linear: 'key' is missing"):
        apply(dare_linear(density=[1.0, 0.5]), BASE, models=MODELS)


def test_a_mask_depends_on_key_path_and_name_and_on_nothing_else():
    ones, both = np.ones(64), {"names": ["math", "code"]}
    first, second = ([1.0, 0.0], [0.0, 1.0])
    mask = lambda weights, key=KEY, **k: np.asarray(  # noqa: E731
        merge(dare_linear(density=0.5, weights=weights, **k), ones, ones, key=key)
    )
    math = mask(first, **both)
    np.testing.assert_array_equal(math, mask(first, **both))
    np.testing.assert_array_equal(math, mask(second, names=["code", "math"]))
    assert np.any(math != mask(second, **both))
    assert np.any(math != mask(first, jax.random.key(1), **both))
    # Another leaf in the tree changes nothing.
    tx = dare_linear(density=0.5, names=["math"])
    model = {"w": jnp.ones(64), "v": jnp.ones(64)}
    wide = apply(tx, jax.tree.map(jnp.zeros_like, model), models=[model], key=KEY)
    np.testing.assert_array_equal(wide["w"], math)
    assert np.any(wide["v"] != wide["w"])


def test_the_same_key_gives_the_same_bits():
    tx = dare_ties(density=0.5, trim=0.5)
    first, second = (apply(tx, BASE, models=MODELS, key=KEY) for _ in range(2))
    assert_same_bits(first, second)


def test_signs_are_elected_among_what_is_left():
    ones = np.ones(400)
    got = np.asarray(merge(dare_ties(density=0.5), ones, -2 * ones))
    # Kept: 2 alone, -4 alone, or both, where the larger wins; or neither.
    assert set(got.tolist()) == {0.0, 2.0, -4.0}
    total = np.asarray(merge(dare_ties(density=0.5, compat="mergekit", rescale="none"), ones, ones))
    assert set(total.tolist()) == {0.0, 1.0, 2.0}


def test_what_is_left_may_be_trimmed_as_well():
    delta = np.arange(1.0, 101.0)
    kept = np.asarray(merge(dare_ties(density=0.8, scope="leaf"), delta))
    got = np.asarray(merge(dare_ties(density=0.8, trim=0.2, scope="leaf"), delta))
    np.testing.assert_array_equal(np.flatnonzero(got), np.sort(np.argsort(-kept)[:20]))


def test_densities_may_differ_by_model():
    ones = np.ones(2000)
    got = np.asarray(merge(dare_linear(density=[1.0, 0.1], rescale="none"), ones, ones))
    assert set(got.tolist()) == {1.0, 2.0}
    assert abs(np.mean(got == 2) - 0.1) < 5 * np.sqrt(0.09 / 2000)
