import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import fp8, fp8_matrix
from jaxweights.weights import Axes, NarrowFloat
from tests._fixtures import fixture
from tests.quantize._normal import error_on_normal_weights

WEIGHT = jax.random.normal(jax.random.key(0), (128, 24))
LARGEST = {"e4m3": np.float32(448), "e5m2": np.float32(57344)}
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def fp8_by_loops(weight, element, rows, columns):
    dense = np.zeros_like(weight)
    for r in range(0, weight.shape[0], rows):
        for c in range(0, weight.shape[1], columns):
            tile = weight[r : r + rows, c : c + columns]
            scale = np.abs(tile).max() / LARGEST[element] or np.float32(1)
            units = np.clip(tile / scale, -LARGEST[element], LARGEST[element])
            dense[r : r + rows, c : c + columns] = units.astype(DTYPES[element]) * scale
    return dense


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize(
    "group, rows, columns",
    [(None, 128, 1), ("tensor", 128, 24), (32, 32, 1), ((64, 8), 64, 8), ((128, 24), 128, 24)],
)
def test_values_are_the_nearest_floats_of_each_block(element, group, rows, columns):
    weight = np.array(WEIGHT)
    weight[:64, :8] = 0
    run = jax.jit(lambda w: fp8_matrix(w, element=element, group_size=group))
    matrix = run(jnp.asarray(weight))
    assert matrix.values.dtype == DTYPES[element]
    assert matrix.scale.shape == (128 // rows, 24 // columns)
    assert np.array_equal(matrix.materialize(), fp8_by_loops(weight, element, rows, columns))


def test_the_bytes_are_those_of_torchao():
    stored = fixture("quantize/torchao.npz")
    matrix = fp8_matrix(jnp.asarray(stored["W"].T))
    np.testing.assert_allclose(matrix.scale.T, stored["float8_e4m3_row/scale"], rtol=1e-6)
    same = np.asarray(matrix.values).T.view(np.uint8) == stored["float8_e4m3_row/qdata_bits"]
    assert same.mean() > 0.999


def test_the_error_on_normal_weights_is_the_known_one():
    assert error_on_normal_weights(fp8_matrix) == pytest.approx(7.0e-4, rel=0.03)
    error = error_on_normal_weights(lambda w: fp8_matrix(w, element="e5m2"))
    assert error == pytest.approx(2.8e-3, rel=0.03)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_no_finite_weight_becomes_nan_or_infinite(element):
    weight = jnp.array([[3.4e38, -3.4e38, 1e-38, 1e-45, 1.0, 0.0]]).T * jnp.ones((1, 8))
    for dtype in (jnp.float32, jnp.bfloat16):
        matrix = fp8_matrix(weight, element=element, scale_dtype=dtype)
        assert np.isfinite(np.asarray(matrix.values).astype(np.float32)).all()
    # A denormal float16 scale may be a third too small: unclipped, the largest entry were NaN.
    amax = 8.9e-8 * LARGEST[element]
    low = fp8_matrix(jnp.full((4, 1), amax), element=element, scale_dtype=jnp.float16)
    assert amax / float(low.scale[0, 0]) > 1.04 * LARGEST[element]
    assert float(low.values[0, 0]) == LARGEST[element]


def test_decoding_and_encoding_again_changes_nothing():
    once = fp8_matrix(WEIGHT, group_size=32)
    again = fp8_matrix(once.materialize(), group_size=32)
    assert np.array_equal(np.asarray(once.values), np.asarray(again.values))


def test_tiles_of_a_stack_of_heads_are_those_of_the_matrix():
    stack = jnp.stack([WEIGHT, -WEIGHT]).reshape(2, 128, 4, 6)
    layout = {"w": Axes(inputs=(-3,), outputs=(-2, -1))}
    leaf = jw.apply(fp8(group_size=(64, 12)), {"w": stack}, layout=layout)["w"]
    assert isinstance(leaf, NarrowFloat)
    assert leaf.scale.shape == (2, 2, 2)
    expected = fp8_by_loops(np.asarray(WEIGHT), "e4m3", 64, 12).reshape(128, 4, 6)
    assert np.array_equal(leaf.materialize(), np.stack([expected, -expected]))


def test_float16_scales_that_underflow_are_zero_and_give_zeros():
    weight = jnp.full((4, 2), 1e-6).at[:, 1].set(1.0)  # 1e-6 / 448 is below half of 6e-8
    matrix = fp8_matrix(weight, scale_dtype=jnp.float16)
    assert float(matrix.scale[0, 0]) == 0  # which the transform refuses
    assert matrix.materialize()[:, 0].tolist() == [0.0] * 4


def test_settings_are_checked_when_built():
    with pytest.raises(ValueError, match=r"quantize\.fp8: element='e3m2' is unknown. Choose 'e4m3"):
        fp8(element="e3m2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size=\\(128, 0\\) must be at least 1"):
        fp8(group_size=(128, 0))


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError) as error:
        jw.apply(fp8(group_size=(128, 128)), {"kernel": jnp.ones((256, 192))})
    assert (
        "quantize.fp8: 'kernel': group_size=(128, 128) does not divide the output axis, which has "
        "length 192. Choose one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, or leave this"
    ) in str(error.value)


def test_a_leaf_with_nan_is_refused_by_its_tile():
    weight = jnp.ones((2, 128, 8)).at[1, 100, 5].set(jnp.nan)
    with pytest.raises(ValueError) as error:
        jw.apply(fp8(group_size=(64, 4)), {"w": weight}, layout={"w": Axes()})
    assert (
        "'w': 1 of 8 blocks hold values that are not finite, or too large for their scales, the "
        "first being inputs 64 to 127 of outputs 4 to 7 of matrix [1] in the stack."
    ) in str(error.value)
