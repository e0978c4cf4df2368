"""Tests of nearswap."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import _nearswap, nearswap
from tests.merge._public import assert_merged, checkpoint, results

BASE, OTHER = np.random.default_rng(0).normal(size=(2, 200)).astype(np.float32)


def merge(tx, base=BASE, other=OTHER):
    model = {"w": jnp.asarray(other)}
    return np.asarray(apply(tx, {"w": jnp.asarray(base)}, models=[model])["w"])


def test_it_agrees_with_mergekit():
    merged, _ = results("nearswap")
    got = apply(nearswap(t=0.004), checkpoint("base"), models=[checkpoint("ft2")])
    assert_merged(got, merged["default"], 1e-6)


def test_it_is_the_formula_and_no_entry_moves_further_than_stated():
    share = np.clip(0.5 / np.abs(OTHER - BASE), 0, 1)
    got = merge(nearswap(t=0.5))
    np.testing.assert_allclose(got, share * OTHER + (1 - share) * BASE, atol=1e-6)
    assert np.abs(got - BASE).max() <= 0.5 + 1e-6
    near = np.abs(OTHER - BASE) <= 0.5
    assert 10 < near.sum() < 190
    np.testing.assert_array_equal(got[near], OTHER[near])


def test_a_move_of_zero_leaves_the_base_and_a_large_one_takes_the_model():
    np.testing.assert_array_equal(merge(nearswap(t=0.0)), BASE)
    np.testing.assert_array_equal(merge(nearswap(t=1e3)), OTHER)


def test_tiny_moves_are_exact_where_an_absolute_guard_would_shrink_them():
    got = merge(nearswap(t=1e-8), np.zeros(1, np.float32), np.full(1, 5e-7, np.float32))
    np.testing.assert_allclose(got, 1e-8, rtol=1e-6)


def test_two_hundred_settings_compile_once():
    merge(nearswap(t=1.0))
    before = _nearswap._nearswap_leaf._cache_size()
    for t in np.linspace(0, 1, 200):
        merge(nearswap(t=float(t)))
    assert _nearswap._nearswap_leaf._cache_size() == before


@pytest.mark.parametrize("t", [-1.0, np.inf, np.nan, [0.1, 0.2]])
def test_the_move_is_checked(t):
    with pytest.raises(ValueError, match=r"merge.nearswap: t=.* must be one finite number"):
        nearswap(t=t)
