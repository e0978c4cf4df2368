"""Convolutions of integers with integers, against NumPy's windows."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import fake_quant, int8_dynamic, int8_static, round_to_nearest
from jaxweights.weights import CONV_HWIO, CONV_OIHW, QuantizedProduct

LAYOUT = {"kernel": CONV_HWIO}


def convolve(params, x, *, strides=(1, 1), padding="SAME", names=("NHWC", "HWIO", "NHWC"), **rest):
    return jax.lax.conv_general_dilated(
        x, params["kernel"], strides, padding, dimension_numbers=names, **rest
    )


def lifted(**options):
    return jax.jit(jw.lift(lambda p, x: convolve(p, x, **options), on_materialize="error"))


def integers(x, step=None):
    x = np.asarray(x, np.float32)
    if step is None:
        step = np.abs(x).max(axis=(1, 2, 3), keepdims=True) / np.float32(127)
    return np.clip(np.round(x / step), -127, 127).astype(np.int64), step


def oracle(x, kernel, *, stride=1):
    """VALID windows of NHWC integers with HWIO integers."""
    height, width, _, out = kernel.shape
    rows = range(0, x.shape[1] - height + 1, stride)
    columns = range(0, x.shape[2] - width + 1, stride)
    y = np.zeros((len(x), len(rows), len(columns), out), np.int64)
    for (i, r), (j, c) in itertools.product(enumerate(rows), enumerate(columns)):
        window = x[:, r : r + height, c : c + width].reshape(len(x), -1)
        y[:, i, j] = window @ kernel.reshape(-1, out)
    return y


@pytest.fixture
def kernel():
    return jax.random.normal(jax.random.key(0), (3, 3, 4, 6))


@pytest.fixture
def x():
    sizes = jnp.array([1.0, 5.0])[:, None, None, None]  # examples whose steps differ
    return jax.random.normal(jax.random.key(1), (2, 7, 8, 4)) * sizes


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_that_of_the_integers(kernel, x, stride):
    params = jw.apply(int8_dynamic(), {"kernel": kernel}, layout=LAYOUT)
    same = jw.apply(round_to_nearest(bits=8), {"kernel": kernel}, layout=LAYOUT)["kernel"]
    leaf = params["kernel"]
    assert isinstance(leaf, QuantizedProduct)
    np.testing.assert_array_equal(leaf.materialize(), same.materialize())
    codes = np.asarray(same.codes_matrix()).astype(np.int64).reshape(kernel.shape)
    rounded, step = integers(x)
    assert step[1] / step[0] > 2
    expected = oracle(rounded, codes, stride=stride) * step * np.asarray(same.scale)[0]
    y = lifted(strides=(stride, stride), padding="VALID")(params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    # Which is not the convolution of floats.
    floats = convolve({"kernel": leaf.materialize()}, x, strides=(stride,) * 2, padding="VALID")
    assert np.abs(y - floats).max() > 1e-3 * np.abs(floats).max()


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": ((2, 0), (1, 3)), "rhs_dilation": (2, 1)},
        {"padding": ((1, 1), (0, 2)), "lhs_dilation": (1, 2)},
    ],
)
def test_padding_and_dilation_are_those_of_floats(kernel, x, options):
    """Float sums of small integers are exact, too."""
    params = jw.apply(int8_dynamic(), {"kernel": kernel}, layout=LAYOUT)
    leaf = params["kernel"]
    codes = np.asarray(leaf.weight_only().codes_matrix()).reshape(kernel.shape)
    rounded, step = integers(x)
    sums = convolve({"kernel": jnp.float32(codes)}, jnp.float32(rounded), **options)
    expected = np.asarray(sums) * step * np.asarray(leaf.scale)[0]
    np.testing.assert_allclose(lifted(**options)(params, x), expected, rtol=1e-6, atol=1e-6)


def test_channels_may_come_first_and_in_groups(kernel, x):
    """As torch has them, and depthwise."""
    plain = jw.apply(int8_dynamic(), {"kernel": kernel}, layout=LAYOUT)
    turned = jw.apply(
        int8_dynamic(), {"kernel": kernel.transpose(3, 2, 0, 1)}, layout={"kernel": CONV_OIHW}
    )
    first = lifted(names=("NCHW", "OIHW", "NCHW"))(turned, x.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(
        first.transpose(0, 2, 3, 1), lifted()(plain, x), rtol=1e-6, atol=1e-6
    )
    depthwise = jax.random.normal(jax.random.key(2), (3, 3, 1, 4))
    params = jw.apply(int8_dynamic(), {"kernel": depthwise}, layout=LAYOUT)
    y = lifted(feature_group_count=4)(params, x)
    codes = np.asarray(params["kernel"].weight_only().codes_matrix()).reshape(3, 3, 1, 4)
    rounded, step = integers(x)
    sums = convolve({"kernel": jnp.float32(codes)}, jnp.float32(rounded), feature_group_count=4)
    np.testing.assert_allclose(
        y, np.asarray(sums) * step * np.asarray(params["kernel"].scale)[0], rtol=1e-6, atol=1e-6
    )


def test_static_steps_serve_all_examples_and_scans_slice_a_stack(x):
    kernels = jax.random.normal(jax.random.key(3), (2, 3, 3, 4, 4))
    params, layout = {"kernel": kernels}, {"kernel": CONV_HWIO}

    def scan(p, x):
        return jax.lax.scan(lambda h, k: (convolve({"kernel": k}, h), None), x, p["kernel"])[0]

    tx = int8_static()
    stats = jw.calibrate(scan, params, [x], needs=tx.needs(params))
    leaf = jw.apply(tx, params, stats=stats)["kernel"]
    assert leaf.input_scale.shape == (2, 1, 1)
    y = jax.jit(jw.lift(scan, on_materialize="error"))({"kernel": leaf}, x)
    expected = np.asarray(x)
    for layer in range(2):
        part = jax.tree.map(lambda field, i=layer: field[i], leaf)
        step = np.asarray(part.input_scale).reshape(1, 1, 1, 1)
        codes = np.asarray(part.weight_only().codes_matrix()).astype(np.int64)
        padded = np.pad(expected, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rounded, _ = integers(padded, step)
        expected = oracle(rounded, codes.reshape(3, 3, 4, 4)) * step * np.asarray(part.scale)[0]
        expected = expected.astype(np.float32)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    dynamic = jw.apply(int8_dynamic(), params, layout=layout)
    jax.jit(jw.lift(scan, on_materialize="error"))(dynamic, x)


def test_an_example_of_zeros_is_zero_and_bfloat16_stays(kernel, x):
    low = jw.apply(int8_dynamic(), {"kernel": kernel.astype(jnp.bfloat16)}, layout=LAYOUT)
    y = lifted()(low, x.astype(jnp.bfloat16).at[0].set(0))
    assert y.dtype == jnp.bfloat16 and np.all(y[0] == 0) and np.all(np.isfinite(y))


def test_gradients_pass_straight_through(kernel, x):
    tx = int8_dynamic(bits=4)
    layout = jw.core.Layout((("kernel", CONV_HWIO),))
    leaf = jw.apply(tx, {"kernel": kernel}, layout=LAYOUT)["kernel"]
    run = lambda p, x: jw.lift(convolve)(p, x)  # noqa: E731
    y, pull = jax.vjp(lambda x: run({"kernel": leaf}, x), x)
    probe = jax.random.normal(jax.random.key(4), y.shape)
    dense = lambda k, x: convolve({"kernel": k}, x)  # noqa: E731
    _, dense_pull = jax.vjp(lambda x: dense(leaf.materialize(), x), x)
    np.testing.assert_allclose(pull(probe)[0], dense_pull(probe)[0], rtol=1e-5, atol=1e-5)
    loss = lambda p: jnp.sum(run(p, x) * probe)  # noqa: E731
    d_scale = jax.grad(loss, allow_int=True)({"kernel": leaf})["kernel"].scale
    expected = jnp.sum(y * probe, axis=(0, 1, 2)) / leaf.scale[0]
    np.testing.assert_allclose(d_scale[0], expected, rtol=1e-4, atol=1e-4)
    train = lambda p: run(fake_quant(p, tx, layout=layout), x)  # noqa: E731
    np.testing.assert_array_equal(train({"kernel": kernel}), y)
    d_kernel = jax.grad(lambda p: jnp.sum(train(p) * probe))({"kernel": kernel})["kernel"]
    rounded, step = integers(x)
    _, pull_kernel = jax.vjp(lambda k: dense(k, jnp.float32(rounded * step)), kernel)
    np.testing.assert_allclose(d_kernel, pull_kernel(probe)[0], rtol=1e-4, atol=1e-4)


def test_groups_of_inputs_are_refused(kernel):
    words = r"int8_dynamic: 'kernel': group_size=12: the sums of a convolution's window can only be"
    with pytest.raises(ValueError, match=words):
        jw.apply(int8_dynamic(group_size=12), {"kernel": kernel}, layout=LAYOUT)
    grouped = jw.apply(round_to_nearest(bits=8, group_size=12), {"kernel": kernel}, layout=LAYOUT)
    words = r"'kernel': the weight has 3 scales for the inputs of one output, but the sums of"
    with pytest.raises(ValueError, match=words):
        jw.apply(int8_dynamic(), grouped, layout=LAYOUT)
