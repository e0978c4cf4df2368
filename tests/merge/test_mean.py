"""Tests of mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import mean
from tests.merge._trees import assert_same_bits, copy, tree


def kernels(*values):
    return [{"w": jnp.asarray(v)} for v in values]


def merged(tx, models, base=None, **options):
    return np.asarray(apply(tx, models[0] if base is None else base, models=models, **options)["w"])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 72])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_mean_of_equal_models_is_the_model_bit_for_bit(count, dtype):
    model = tree(0, dtype=dtype)
    assert_same_bits(apply(mean(), model, models=[copy(model) for _ in range(count)]), model)


def test_uneven_weights_keep_equal_models_too():
    model = tree(0)
    tx = mean(weights=[0.1, 0.7, 1 / 3])
    assert_same_bits(apply(tx, model, models=[copy(model) for _ in range(3)]), model)


@pytest.mark.parametrize("weights", [[2, 1, 1], [1, -0.5, 3], [0, 0, 5]])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_weighted_mean_of_the_models_and_not_of_the_base(weights, normalize):
    draws = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    want = np.tensordot(np.array(weights, float), draws.astype(float), axes=1)
    want = want / np.sum(weights) if normalize else want
    tx = mean(weights=weights, normalize=normalize)
    got = merged(tx, kernels(*draws), base={"w": jnp.full(6, 99.0)})
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_model_of_all_the_weight_is_returned_bit_for_bit():
    # As differences to another model this would round: 1e8 + (1 - 1e8) is 0 in float32.
    models = kernels(jnp.full(3, 1e8), jnp.ones(3))
    np.testing.assert_array_equal(merged(mean(weights=[0, 1]), models), 1)


def test_the_mean_lies_between_the_models():
    draws = np.random.default_rng(1).normal(size=(5, 1000)).astype(np.float32)
    got = merged(mean(weights=[1, 2, 3, 4, 5]), kernels(*draws))
    step = np.spacing(np.abs(draws).max(axis=0))
    assert np.all(got <= draws.max(axis=0) + 2 * step)
    assert np.all(got >= draws.min(axis=0) - 2 * step)


def test_weights_may_be_traced_and_are_differentiable():
    models = kernels(jnp.array([1.0, 2.0]), jnp.array([3.0, 7.0]))

    def total(weights):
        return apply(mean(weights=weights), models[0], models=models)["w"].sum()

    # d/dw of sum(w_i s_i) / sum(w_i) is (s_i - mean) / sum(w_i), with s = (3, 10).
    slope = jax.jit(jax.grad(total))(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(slope, [(3 - 8.25) / 4, (10 - 8.25) / 4], rtol=1e-6)


def test_the_base_gives_dtypes_and_leaves_that_are_not_floating():
    base = {"w": jnp.zeros(2, jnp.bfloat16), "step": jnp.asarray(7)}
    models = [{"w": jnp.full(2, x), "step": jnp.asarray(i)} for i, x in enumerate((1.0, 2.0))]
    got = apply(mean(), base, models=models)
    assert got["w"].dtype == jnp.bfloat16 and int(got["step"]) == 7
    assert apply(mean(out_dtype="float32"), base, models=models)["w"].dtype == jnp.float32


def test_leaves_that_are_not_floating_follow_the_policy():
    base = {"w": jnp.zeros(2), "step": jnp.asarray(7), "key": jax.random.key(0)}
    models = [{**base, "w": jnp.ones(2), "step": jnp.asarray(i)} for i in (7, 8)]
    assert int(apply(mean(nonfloat="first"), base, models=models[::-1])["step"]) == 8
    with pytest.raises(ValueError, match=r"'step': is int32 and differs in models\[1\]"):
        apply(mean(nonfloat="require_equal"), base, models=models)
    assert int(apply(mean(nonfloat="require_equal"), base, models=models[:1])["step"]) == 7
    with pytest.raises(ValueError, match="'step': is int32, which has no mean"):
        apply(mean(nonfloat="error"), base, models=models)
    with pytest.raises(ValueError, match="not there under jit"):
        jax.jit(lambda b, m: apply(mean(nonfloat="require_equal"), b, models=m))(base, models)


def test_stochastic_rounding_keeps_small_changes_on_average():
    # Half way is rare; a quarter of a bfloat16 step above 1 would always be rounded away.
    base = {"w": jnp.ones(4000, jnp.bfloat16)}
    model = {"w": jnp.full(4000, 1 + 2.0**-9)}
    assert np.all(merged(mean(), [model], base=base) == 1)
    tx = mean(rounding="stochastic")
    got = merged(tx, [model], base=base, key=jax.random.key(0)).astype(np.float32)
    assert set(got.tolist()) == {1.0, 1 + 2.0**-7}
    share = np.mean(got > 1)
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)  # five standard deviations
    with pytest.raises(ValueError, match="'key' is missing"):
        merged(tx, [model], base=base)


def test_stochastic_rounding_leaves_exact_and_wide_values_alone():
    model = {"w": jnp.array([1.0, -0.5, 0.0, 300.0])}
    base = {"w": jnp.zeros(4, jnp.bfloat16)}
    tx = mean(rounding="stochastic")
    got = merged(tx, [model], base=base, key=jax.random.key(1))
    np.testing.assert_array_equal(got.astype(np.float32), model["w"])
    assert_same_bits(apply(tx, model, models=[model]), model)  # float32 draws nothing


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"weights": [1, -1]}, ValueError, r"weights=\[1.0, -1.0\] sum to 0"),
        ({"weights": [0, 0]}, ValueError, "cannot be normalised"),
        ({"weights": [1, np.nan]}, ValueError, "must be finite"),
        ({"weights": "ab"}, TypeError, "must be one number per model"),
        ({"weights": []}, ValueError, "must be one number per model"),
        ({"nonfloat": "mean"}, ValueError, "nonfloat='mean' is not one of 'base'"),
        ({"rounding": "up"}, ValueError, "rounding='up' is not one of"),
        ({"out_dtype": "int8"}, ValueError, "out_dtype=int8 is no floating dtype"),
        ({"names": ["a", "a"]}, ValueError, r"names=\['a', 'a'\] must differ"),
    ],
)
def test_settings_are_checked_when_built(options, error, words):
    with pytest.raises(error, match=words):
        mean(**options)


def test_weights_that_sum_to_zero_are_fine_without_normalising():
    models = kernels(jnp.array([3.0]), jnp.array([1.0]))
    np.testing.assert_array_equal(merged(mean(weights=[1, -1], normalize=False), models), [2.0])


def test_progress_is_told_after_each_leaf():
    seen = []
    model = tree(0)
    apply(mean(), model, models=[model], progress=lambda *args: seen.append(args))
    assert seen == [("dense/bias", 1, 2), ("dense/kernel", 2, 2)]
