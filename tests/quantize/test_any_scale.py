"""Weights whose squares float32 cannot hold are quantized as the same weights in other units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize._unit import unit_of

Q = jw.quantize
WEIGHT = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
MIX = np.eye(32) + 0.5 * np.random.default_rng(1).normal(size=(32, 32))
INPUTS = (np.random.default_rng(2).normal(size=(64, 32)) @ MIX).astype(np.float32)
GRAM = jnp.asarray(INPUTS.T @ INPUTS)
STATS = {
    "gram": GRAM,
    "count": jnp.asarray(64),
    "abs_sum": jnp.abs(jnp.asarray(INPUTS)).sum(0),
}
HUGE, TINY = 2.0**122, 2.0**-100
PLAIN = Q.round_to_nearest(bits=3)

# Each gave something else than these before, or none, for weights as large or as small as above.
TRANSFORMS = {
    "loftq": Q.loftq(PLAIN, rank=2, iterations=2),
    "low_rank_residual": Q.low_rank_residual(PLAIN, rank=2),
    "joint": Q.joint(PLAIN, rank=2, outliers=0.02),
    "auto_round": Q.auto_round(bits=3, steps=5),
    "learned_clip": Q.learned_clip(bits=3, steps=5),
    "nupes": Q.nupes(bits=3, steps=5),
    "refine": Q.refine(PLAIN, sweeps=2),
    "awq": Q.awq(bits=3, group_size=16),
    "power": Q.power(bits=4),
    "power leaf": Q.power(bits=4, scope="leaf"),
    "lsq": Q.lsq(bits=3),
}


def result(tx, weight, **context):
    stats = jw.Stats({"w": STATS})
    new = jw.apply(tx, {"w": jnp.asarray(weight)}, stats=stats, **context)
    return np.asarray(new["w"].materialize(), np.float64)


@pytest.mark.parametrize("unit", [HUGE, TINY], ids=["huge", "tiny"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_unit_of_weights_does_not_matter(name, unit):
    usual = result(TRANSFORMS[name], WEIGHT)
    scaled = result(TRANSFORMS[name], WEIGHT * np.float32(unit)) / unit
    np.testing.assert_allclose(scaled, usual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", [HUGE, TINY], ids=["huge", "tiny"])
def test_adaround_whose_loss_has_a_unit_learns_all_the_same(unit):
    report = {}
    tx = Q.adaround(bits=3, steps=30, learning_rate=0.1, report=report.__setitem__)
    new = result(tx, WEIGHT * np.float32(unit)) / unit
    assert report["w"].status == "adaround"
    plain = result(Q.round_to_nearest(bits=3, grid="affine"), WEIGHT)
    loss = lambda found: float(Q.output_error(jnp.asarray(WEIGHT), jnp.asarray(found), GRAM))  # noqa: E731
    assert loss(new.astype(np.float32)) < 0.9 * loss(plain.astype(np.float32))


def test_relative_errors_are_those_of_usual_weights():
    report = {}
    tx = Q.gptq(bits=4, report=report.__setitem__)
    errors = []
    for unit in (1.0, HUGE, TINY):
        result(tx, WEIGHT * np.float32(unit))
        errors.append(float(report["w"].error))
    assert 0 < errors[0] < 0.1
    np.testing.assert_allclose(errors, errors[0], rtol=1e-3)


def test_usual_weights_zeros_and_values_that_are_not_finite_have_the_unit_one():
    for value in (0.0, 1.0, -6e-8, 1e7, np.nan, np.inf):
        assert float(unit_of(jnp.array([value, 0.0]))) == 1
    assert float(unit_of(jnp.zeros((0, 3)))) == 1
    for value in (3e38, 2e7, 2e-8, 1.2e-38):
        unit = float(unit_of(jnp.array([value])))
        assert np.log2(unit) % 2 == 0 and 2.0**-27 <= value / unit < 2.0**28
        assert jax.jit(lambda u: 1 / u)(jnp.float32(unit)) > 0


def test_the_cause_is_named_where_squares_are_beyond_float32():
    tx = Q.adadim(bits=3, group_size=2)
    with pytest.raises(ValueError, match=r"'w': .*weights are so large that their squares are not"):
        result(tx, WEIGHT * np.float32(HUGE))
    bad = jw.Stats({"w": STATS | {"gram": GRAM.at[0, 0].set(jnp.inf)}})
    with pytest.raises(ValueError, match=r"'w': .*its Gram matrix is not finite\. Calibrate again"):
        jw.apply(tx, {"w": jnp.asarray(WEIGHT)}, stats=bad)


@pytest.mark.parametrize("setting", [{"outliers": 0.02}, {"rank": 1, "outliers": 0.02}])
def test_outliers_that_overflow_their_dtype_are_refused(setting):
    weight = WEIGHT.copy()
    weight[3, 4] = 1e5
    with pytest.raises(ValueError) as error:
        result(Q.joint(PLAIN, dtype=jnp.float16, **setting), weight)
    message = "'w': holds values up to 100000, too large for outliers in float16. Choose a wider"
    assert message in str(error.value)
    assert np.isfinite(result(Q.joint(PLAIN, **setting), weight)).all()


def test_factors_that_overflow_their_dtype_are_refused():
    weight = WEIGHT * np.float32(2.0**60)
    with pytest.raises(ValueError, match=r"'w': its factors are too large for float16\. Choose a"):
        result(Q.loftq(PLAIN, rank=2, dtype=jnp.float16), weight)
