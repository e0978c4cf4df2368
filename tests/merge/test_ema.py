"""Averages over a run, from its checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import ema, lawa, mean, running_ema
from tests.merge._trees import assert_close, assert_same_bits, copy, finetuned, tree

BASE = tree(0)
RUN = [finetuned(BASE, seed, 0.1) for seed in range(1, 7)]


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_checkpoints_give_what_the_running_average_gave(debias, decay):
    running = running_ema(decay=decay, debias=debias)
    state = running.init(BASE)
    for model in RUN:
        state = running.update(state, model)
    online = running.value(state, BASE)
    offline = apply(ema(decay=decay, debias=debias), BASE, models=RUN)
    assert_close(offline, online, ulps=4)  # six roundings of numbers up to 4 on one side


def test_weights_fall_by_the_decay():
    trees = [{"bias": jnp.asarray([float(i == j) for j in range(3)])} for i in range(3)]
    got = apply(ema(decay=0.5), trees[0], models=trees)["bias"]
    np.testing.assert_allclose(got, np.array([1, 2, 4]) / 7, rtol=1e-6)
    zero = {"bias": jnp.full(3, 8.0)}
    got = apply(ema(decay=0.5, debias=False), zero, models=trees)["bias"]
    np.testing.assert_allclose(got, 1 + np.array([1, 2, 4]) / 8, rtol=1e-6)


@pytest.mark.parametrize("tx", [ema(decay=0.9), ema(decay=0.9, debias=False), lawa(last=3)])
def test_a_constant_run_stays_as_it_is_bit_for_bit(tx):
    assert_same_bits(apply(tx, copy(BASE), models=[copy(BASE) for _ in range(5)]), BASE)


def test_the_latest_checkpoints_are_averaged_at_their_spacing():
    newest = apply(lawa(last=1), BASE, models=RUN)
    assert_same_bits(newest["dense"], RUN[-1]["dense"])
    got = apply(lawa(last=3, every=2), BASE, models=RUN)
    assert_close(got, apply(mean(), BASE, models=[RUN[5], RUN[3], RUN[1]]))


def test_errors_number_the_models_as_they_were_given():
    bad = [copy(model) for model in RUN]
    bad[4]["dense"]["bias"] = bad[4]["dense"]["bias"].at[1].set(jnp.nan)
    message = r"'dense/bias': 1 of 5 values of models\[4\] \('e'\) are not finite"
    for tx in (lawa(last=3, names=list("abcdef")), ema(decay=0.5, debias=False, names=[*"abcdef"])):
        with pytest.raises(ValueError, match=message):
            apply(tx, BASE, models=bad)
    with pytest.raises(ValueError, match="last=4, every=2 needs 7 checkpoints, but 6 were given"):
        apply(lawa(last=4, every=2), BASE, models=RUN)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: ema(decay=1.0), r"merge.ema: decay=1.0 must lie in \[0, 1\)"),
        (lambda: lawa(last=0), "merge.lawa: last=0 must be a positive integer"),
        (lambda: lawa(last=2, every=0), "merge.lawa: every=0 must be a positive integer"),
    ],
)
def test_bad_settings_are_refused_when_built(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_narrow_checkpoints_are_averaged_in_float32():
    # 256 + 1/2 and so on are no bfloat16 numbers: a narrow running sum would lose the halves.
    models = [{"bias": jnp.asarray([256.0 + i], jnp.bfloat16)} for i in (0, 2, 4, 2)]
    got = apply(lawa(last=4, out_dtype=jnp.float32), models[0], models=models)["bias"]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got), 258.0)
    assert jax.tree.leaves(apply(lawa(last=4), models[0], models=models))[0].dtype == jnp.bfloat16
