"""Stochastic rounding is right on average."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import stochastic_rounding


@pytest.mark.parametrize("grid", ["narrow", "full"])
def test_the_mean_over_keys_is_the_weight_within_four_standard_errors(grid):
    weight = jax.random.normal(jax.random.key(0), (16, 3))
    tx, draws = stochastic_rounding(bits=3, grid=grid, group_size=8), 4000
    one = jw.apply(tx, {"w": weight}, key=jax.random.key(1))["w"]
    step = np.repeat(np.asarray(one.scale), 8, axis=0)

    @jax.jit
    def rounded(keys):
        return jax.lax.map(lambda k: jw.materialize(jw.apply(tx, {"w": weight}, key=k))["w"], keys)

    values = np.asarray(rounded(jax.random.split(jax.random.key(2), draws)), np.float64)
    position = np.asarray(weight, np.float64) / step
    up = position - np.floor(position)
    error = step * np.sqrt(up * (1 - up) / draws)
    assert np.all(np.abs(values.mean(0) - weight) <= 4 * error + 1e-5 * step)
    # And it is random: what rounding to the nearest would give is off by far more.
    nearest = np.round(position) * step
    assert np.any(np.abs(nearest - weight) > 40 * error)
    # Only the two neighbours are ever drawn.
    assert np.all(np.abs(values - np.asarray(weight)) <= step * 1.0001)


def test_entries_on_a_level_stay_there_whatever_is_drawn():
    weight = jnp.array([[3.0], [-3.0], [1.0], [0.0], [-2.0]])
    for seed in range(20):
        new = jw.apply(stochastic_rounding(bits=3), {"w": weight}, key=jax.random.key(seed))
        np.testing.assert_array_equal(new["w"].materialize(), weight)


def test_draws_depend_on_the_path_and_not_on_other_leaves():
    weight = jax.random.normal(jax.random.key(0), (16, 8))
    tx, key = stochastic_rounding(bits=4), jax.random.key(1)
    alone = jw.apply(tx, {"b": weight}, key=key)["b"]
    both = jw.apply(tx, {"a": jnp.copy(weight), "b": weight}, key=key)
    np.testing.assert_array_equal(both["b"].codes, alone.codes)
    assert not np.array_equal(both["a"].codes, alone.codes)


def test_settings_are_refused():
    with pytest.raises(ValueError, match=r"quantize.stochastic_rounding: bits=9 must lie"):
        stochastic_rounding(bits=9)
    with pytest.raises(ValueError, match=r"'w': group_size=5 does not divide the input axis"):
        tx = stochastic_rounding(bits=4, group_size=5)
        jw.apply(tx, {"w": jnp.ones((16, 2))}, key=jax.random.key(0))
