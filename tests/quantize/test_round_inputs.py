"""Products with inputs in microscaling formats against NumPy's, and what becomes of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import gptq, mx, nvfp4, round_inputs
from jaxweights.weights import Codebook, RoundedInputs
from jaxweights.weights._microscaling import round_to_blocks
from jaxweights.weights._minifloat import ELEMENTS, nearest_minifloat

dense_model = lambda params, x: x @ params["w"]  # noqa: E731
model = jax.jit(jw.lift(dense_model, on_materialize="error"))

DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
OF_FORM = {"mxfp4": "e2m1", "mxfp6": "e2m3", "mxfp8": "e4m3", "nvfp4": "e2m1"}


def draw(number, *shape):
    return jax.random.normal(jax.random.key(number), shape)


def nearest(x, element):
    top = ELEMENTS[element].largest
    return np.clip(x, -top, top).astype(DTYPES[element]).astype(np.float32)


def rounded(x, form, largest=None):
    """Activations as the product sees them, in NumPy's own narrow floats, block after block."""
    x, out = np.asarray(x, np.float32), np.zeros(x.shape, np.float32)
    size = 16 if form == "nvfp4" else 32
    kind = ELEMENTS[OF_FORM[form]]
    outer = np.float32(448 * 6) / np.float32(largest or 1)
    for at in np.ndindex(*x.shape[:-1]):
        for i in range(0, x.shape[-1], size):
            block = x[at][i : i + size]
            amax = np.abs(block).max()
            if form == "nvfp4":
                step = nearest(min(amax / np.float32(6) * outer, np.float32(448)), "e4m3")
                scale = (step if step else np.float32(1)) / outer
            else:
                power = np.frexp(amax)[1] - 1 - kind.largest_exponent if amax else -127
                scale = np.float32(2.0**power)
            out[at][i : i + size] = nearest(block / scale, OF_FORM[form]) * scale
    return out


@pytest.mark.parametrize("element", DTYPES)
def test_numbers_are_the_nearest_floats_halves_to_even(element):
    bits = ELEMENTS[element].bits
    codes = np.arange(2 ** (bits - 1), dtype=np.uint8).view(DTYPES[element]).astype(np.float32)
    levels = np.unique(codes[np.isfinite(codes)])
    middle = (levels[1:] + levels[:-1]) / 2
    near = [levels, middle, np.nextafter(middle, 0), np.nextafter(middle, np.float32(1e9))]
    x = np.concatenate([*near, [levels[-1] * 1.04, 1e30], np.asarray(draw(0, 500))])
    x = np.concatenate([x, -x]).astype(np.float32)
    ours = jax.jit(nearest_minifloat, static_argnums=1)(x, ELEMENTS[element])
    np.testing.assert_array_equal(ours, nearest(x, element))
    assert np.isnan(nearest_minifloat(jnp.array([jnp.nan]), ELEMENTS[element])[0])


@pytest.mark.parametrize("form", OF_FORM)
def test_the_product_is_that_of_rounded_inputs_and_the_weight(form):
    x, weight = np.array(draw(0, 5, 64)), draw(1, 64, 8)
    x[1] *= 1e3  # loud tokens and blocks leave the others alone
    x[3, 32:] *= 1e-3
    x[4, :32] = 0
    largest = np.abs(x).max()
    tx = jw.chain(nvfp4() if form == "nvfp4" else mx(element="e2m1"), round_inputs(form=form))
    params = {"w": weight}
    stats = jw.calibrate(dense_model, params, [jnp.asarray(x)], needs=tx.needs(params))
    leaf = jw.apply(tx, params, stats=stats)["w"]
    assert isinstance(leaf, RoundedInputs) and isinstance(leaf.base, Codebook)
    y = model({"w": leaf}, x)
    exact = rounded(x, form, largest).astype(np.float64) @ np.asarray(leaf.materialize(), float)
    size = np.abs(exact).max(1, keepdims=True)
    np.testing.assert_allclose(y / size, exact / size, atol=1e-5)
    plain = x @ np.asarray(leaf.materialize())
    assert np.all(np.abs(y - plain).max(1) > 1e-3 * np.abs(plain).max(1))  # rounded indeed


@pytest.mark.parametrize("rule", ["ceil", "rceil", "even", "oas"])
def test_scales_follow_the_rules_of_mx(rule):
    x = draw(0, 64, 6) * 2.0 ** jnp.arange(6.0)[None]
    for element, form in (("e2m1", "mxfp4"), ("e4m3", "mxfp8"), ("e2m3", "mxfp6")):
        matrix = jw.quantize.mx_matrix(x, element=element, scale_rule=rule)
        ours = round_to_blocks(x.T, form, rule=rule).T
        np.testing.assert_array_equal(ours, matrix.materialize())


def test_blocks_of_nvfp4_are_those_of_its_weights():
    x = draw(0, 64, 6)
    matrix = jw.quantize.nvfp4_matrix(x)
    ours = round_to_blocks(x.T, "nvfp4", overall=jnp.asarray(matrix.scale.scale)).T
    np.testing.assert_array_equal(ours, matrix.materialize())


def test_what_exceeds_the_calibration_saturates_and_infinity_shows():
    overall = jnp.full((1, 1), 2688.0)  # of inputs up to 1
    x = jnp.ones((3, 16)).at[1].set(100.0).at[2, 3].set(jnp.inf)
    y = round_to_blocks(x, "nvfp4", overall=overall)
    assert y[0].tolist() == [1.0] * 16 and y[1].tolist() == [1.0] * 16
    assert np.all(np.isnan(y[2]))
    z = round_to_blocks(jnp.ones((2, 32)).at[1, 3].set(-jnp.inf), "mxfp8")
    assert z[0].tolist() == [1.0] * 32 and np.all(np.isnan(z[1]))
    tiny = jnp.full((1, 32), 1e-39)
    for form in ("mxfp4", "mxfp8"):
        assert np.all(np.abs(round_to_blocks(tiny, form)) < 1e-38)


def test_gradients_pass_straight_through():
    x, probe = draw(0, 6, 32), draw(2, 6, 4)
    for form in ("mxfp4", "nvfp4"):
        overall = jnp.full((1, 1), 500.0) if form == "nvfp4" else None
        leaf = RoundedInputs.of(draw(1, 32, 4), overall, form=form)
        loss = lambda x, leaf=leaf: jnp.sum(jw.lift(dense_model)({"w": leaf}, x) * probe)  # noqa: E731
        expected = probe @ leaf.materialize().T
        np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-5, atol=1e-5)


def test_stacks_experts_and_bfloat16():
    x, weight = draw(0, 3, 5, 32), draw(1, 3, 32, 4)
    layout = {"w": jw.Axes()}
    leaf = jw.apply(round_inputs(form="mxfp4"), {"w": weight}, layout=layout)["w"]
    y = jax.jit(jw.lift(lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"])))({"w": leaf}, x)
    each = [rounded(x[i], "mxfp4") @ np.asarray(weight[i]) for i in range(3)]
    np.testing.assert_allclose(y, np.stack(each), rtol=1e-5, atol=1e-5)
    overall = jnp.array([100.0, 500.0, 900.0]).reshape(3, 1, 1)
    leaf = RoundedInputs.of(weight, overall, form="nvfp4")
    sizes = jnp.array([2, 0, 3], jnp.int32)
    rows = x.reshape(15, 32)[:5]
    ragged = jw.lift(lambda w, x: jax.lax.ragged_dot(x, w, sizes))(leaf, rows)
    for i, group in ((0, slice(0, 2)), (2, slice(2, 5))):
        wanted = rounded(rows[group], "nvfp4", 2688 / float(overall[i, 0, 0])) @ weight[i]
        np.testing.assert_allclose(ragged[group], wanted, rtol=1e-5, atol=1e-5)
    narrow = jw.apply(round_inputs(form="mxfp4"), {"w": weight[0].astype(jnp.bfloat16)})
    y = model(narrow, x[0].astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    seen = rounded(x[0].astype(jnp.bfloat16), "mxfp4")
    wide = seen @ np.asarray(weight[0].astype(jnp.bfloat16), np.float32)
    np.testing.assert_allclose(np.asarray(y, np.float32), wide, rtol=1e-2, atol=1e-2)


def test_weights_keep_what_quantized_them():
    params = {"w": draw(1, 64, 8)}
    x = draw(0, 100, 64)
    rounding = gptq(bits=4, group_size=32)
    tx = jw.chain(rounding, round_inputs(form="mxfp8"))
    stats = jw.calibrate(dense_model, params, [x], needs=tx.needs(params))
    leaf = jw.apply(tx, params, stats=stats)["w"]
    alone = jw.apply(rounding, params, stats=stats)["w"]
    np.testing.assert_array_equal(leaf.base.codes, alone.codes)
    back = leaf.weight_only()
    np.testing.assert_array_equal(back.materialize(), alone.materialize())


def test_refusals():
    with pytest.raises(ValueError, match=r"round_inputs: form='e2m1' is unknown. Choose one of"):
        round_inputs(form="e2m1")
    with pytest.raises(ValueError, match=r"scale_rule='up' is unknown. Choose one of"):
        round_inputs(form="mxfp4", scale_rule="up")
    words = r"'w': blocks of 32 inputs, which mxfp4 has, do not divide the input axis.* length 48"
    with pytest.raises(ValueError, match=words):
        jw.apply(round_inputs(form="mxfp4"), {"w": draw(0, 48, 4)})
    with pytest.raises(ValueError, match=r"form='nvfp4' needs G as input_scale"):
        RoundedInputs.of(draw(0, 48, 4), form="nvfp4")
    with pytest.raises(ValueError, match=r"group_size=16, but form='mxfp4' has blocks"):
        RoundedInputs.of(draw(0, 32, 4), form="mxfp4", group_size=16)
    params = {"w": draw(0, 32, 4)}
    tx = round_inputs(form="nvfp4")
    with pytest.raises(ValueError, match=r"round_inputs: 'stats' is missing: pass stats=calibrate"):
        jw.apply(tx, params)
    stats = jw.calibrate(dense_model, params, [jnp.zeros((0, 32))], needs=tx.needs(params))
    with pytest.raises(ValueError, match=r"'w': the largest magnitude of its inputs is not finite"):
        jw.apply(tx, params, stats=stats)
