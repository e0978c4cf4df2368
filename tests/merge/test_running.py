"""Averages kept while models go by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint import load_tree, save_tree
from jaxweights.core import apply
from jaxweights.merge import average, mean, running_ema, running_mean
from tests.merge._trees import assert_close, assert_same_bits, copy, finetuned, tree

BASE = tree(0)
RUN = [finetuned(BASE, seed, 0.1) for seed in range(1, 5)]


def test_the_running_mean_is_the_weighted_mean():
    running = running_mean()
    state = running.init(BASE)
    for model, weight in zip(RUN, [1, 2, 3, 4]):
        state = running.update(state, model, weight)
    want = apply(mean(weights=[1, 2, 3, 4]), BASE, models=RUN)
    assert_close(running.value(state, BASE), want, ulps=4)


@pytest.mark.parametrize("running", [running_mean(), running_ema(decay=0.9999)])
def test_a_constant_stays_as_it_is_bit_for_bit_at_any_time(running):
    state = running.init(BASE)
    for _ in range(5):
        state = running.update(state, copy(BASE))
        assert_same_bits(running.value(state, BASE), BASE)


def test_an_average_that_starts_at_the_parameters_moves_slowly():
    running = running_ema(decay=0.75, debias=False)
    state = running.update(running.init({"bias": jnp.asarray([4.0])}), {"bias": jnp.asarray([8.0])})
    np.testing.assert_allclose(state.average["bias"], [5.0], rtol=1e-6)


def test_a_training_loop_under_jit_keeps_the_average_and_its_bits_survive_saving(tmp_path):
    running = running_ema(decay=0.9)

    @jax.jit
    def step(params, state):
        params = {"w": params["w"] * 0.5}
        return params, running.update(state, params)

    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = running.init(params)
    for _ in range(3):
        params, state = step(params, state)
    weights = 0.1 * 0.9 ** np.arange(3)[::-1] / (1 - 0.9**3)
    np.testing.assert_allclose(state.average["w"], weights @ [0.5, 0.25, 0.125] * np.ones(3), 1e-6)
    assert state.average["w"].dtype == jnp.float32
    assert running.value(state, params)["w"].dtype == jnp.bfloat16
    save_tree(tmp_path / "state", state.average)
    loaded = load_tree(tmp_path / "state").tree
    np.testing.assert_array_equal(loaded["w"], state.average["w"])


def test_checkpoints_are_averaged_while_they_are_loaded():
    alive = []

    def load():
        for model in RUN:
            alive.append(1)
            yield copy(model)

    got = average(load())
    assert len(alive) == 4
    assert_close(got, apply(mean(), RUN[0], models=RUN))
    assert int(got["step"]) == int(RUN[0]["step"])


def test_models_that_do_not_fit_are_refused_by_name():
    short = {"dense": {"kernel": RUN[0]["dense"]["kernel"][:3]}}
    with pytest.raises(ValueError) as error:
        average([RUN[0], short])
    assert "merge.average: model 1 lacks ['dense/bias']" in str(error.value)
    assert "'dense/kernel': is (3, 5) in model 1 but (7, 5) in the first" in str(error.value)
    with pytest.raises(ValueError, match="there is no model"):
        average([])
    with pytest.raises(ValueError, match=r"decay=-0.1 must lie in \[0, 1\)"):
        running_ema(decay=-0.1)
    running = running_mean()
    with pytest.raises(ValueError, match=r"lacks \['dense/bias'\]"):
        running.update(running.init(BASE), short)
