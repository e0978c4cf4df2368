"""Scales that their dtype can hardly hold: right as far as float32 goes, refused beyond."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw

Q = jw.quantize
WEIGHT = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
INPUTS = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)
STATS = jw.Stats({"w": {"gram": jnp.asarray(INPUTS.T @ INPUTS), "count": jnp.asarray(64)}})
# The least normal float32, for which XLA takes what is smaller for 0; half of it more is lost where
# an offset is rounded, too.
LEAST = 2.0**-126

WIDE = {
    "int8": Q.round_to_nearest(bits=8),
    "signed": Q.round_to_nearest(bits=4, group_size=8),
    "affine": Q.round_to_nearest(bits=4, grid="affine"),
    "bfloat16": Q.round_to_nearest(bits=8, scale_dtype=jnp.bfloat16),
    "nf4": Q.nf4(group_size=16),
    "fp8": Q.fp8(),
    "mx": Q.mx(element="e4m3"),
    "nvfp4": Q.nvfp4(),
    "gptq": Q.gptq(bits=8, grid="narrow"),
    "hqq": Q.hqq(bits=8, group_size=16, steps=2),
}
NARROW = {
    "signed": lambda **kw: Q.round_to_nearest(bits=4, group_size=8, **kw),
    "affine": lambda **kw: Q.round_to_nearest(bits=4, grid="affine", **kw),
    "nf4": lambda **kw: Q.nf4(group_size=16, **kw),
    "fp8": lambda **kw: Q.fp8(**kw),
    "power": lambda **kw: Q.power(bits=4, exponents=[0.5], **kw),
    "hqq": lambda **kw: Q.hqq(bits=4, group_size=16, **kw),
    "gptq": lambda **kw: Q.gptq(bits=4, **kw),
    "gptq nf4": lambda **kw: Q.gptq(bits=4, grid="nf4", **kw),
    "auto_round": lambda **kw: Q.auto_round(bits=4, steps=2, **kw),
    "stochastic": lambda **kw: Q.stochastic_rounding(bits=4, **kw),
}


def result(tx, weight):
    new = jw.apply(tx, {"w": jnp.asarray(weight)}, stats=STATS, key=jax.random.key(0))
    return np.asarray(new["w"].materialize(), np.float64)


@pytest.mark.parametrize("name", WIDE)
def test_weights_whose_steps_float32_has_not_become_zeros_at_worst(name):
    small = WEIGHT * np.float32(2.0**-123)
    largest = np.abs(small).max()
    assert largest / 127 < LEAST
    missed = np.abs(result(WIDE[name], small) - small)
    assert missed.max() <= largest


@pytest.mark.parametrize("name", NARROW)
def test_scales_that_float16_makes_zero_are_refused_by_name(name):
    weight = WEIGHT.copy()
    weight[:, 2] *= 1e-10
    with pytest.raises(ValueError) as error:
        result(NARROW[name](scale_dtype=jnp.float16), weight)
    message = str(error.value)
    assert "'w': " in message and "so small that their scales are 0 in float16" in message
    assert "of output 2. Choose a wider scale_dtype, set weights as small as these to 0" in message
    assert np.isfinite(result(NARROW[name](scale_dtype=jnp.bfloat16), weight)).all()


@pytest.mark.parametrize("name", NARROW)
def test_groups_of_zeros_have_scales_in_float16(name):
    weight = WEIGHT.copy()
    weight[:, 2] = 0
    new = result(NARROW[name](scale_dtype=jnp.float16), weight)
    assert not new[:, 2].any() and new[:, 3].any()


def test_a_compiled_program_which_cannot_refuse_them_rounds_them_to_zero():
    tx = NARROW["signed"](scale_dtype=jnp.float16)
    tiny = jax.jit(lambda w: jw.materialize(jw.apply(tx, {"w": w})))(WEIGHT * 1e-10)["w"]
    assert not np.asarray(tiny).any()


def test_a_range_that_is_lost_in_its_offset_is_no_scale_of_zero():
    tx = NARROW["hqq"](scale_dtype=jnp.float16)
    weight = np.float32(0.5) + WEIGHT * np.float32(6e-8)
    np.testing.assert_allclose(result(tx, weight), 0.5, rtol=1e-6)


def test_offsets_that_overflow_are_refused():
    tx = NARROW["hqq"](scale_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"'w': .*too large for its scales"):
        result(tx, np.full((32, 6), 1e5, np.float32))
