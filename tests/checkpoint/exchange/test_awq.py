import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint.exchange._awq import pack_awq, unfit_awq, unpack_awq
from jaxweights.checkpoint.exchange._module import Part
from jaxweights.weights import Quantized
from tests.checkpoint.exchange._oracles import awq_words, case_of, dense, random_matrix


def parts(arrays):
    return {name: Part.of(array) for name, array in arrays.items()}


def written(weight):
    return {name: tensor() for name, tensor in pack_awq(weight).items()}


def test_what_is_read_stands_for_the_numbers_and_is_written_as_the_same_bytes():
    codes, scales, zero = random_matrix(bits=4, low_zero=0)
    stored = {"qweight": awq_words(codes), "qzeros": awq_words(zero), "scales": scales}
    weight = unpack_awq(parts(stored))
    np.testing.assert_array_equal(
        weight.astype(np.float32).materialize(), dense(codes, scales, zero).T
    )
    assert not unfit_awq(weight)
    for name, array in written(weight).items():
        assert array.dtype == stored[name].dtype
        np.testing.assert_array_equal(array, stored[name])


def test_a_module_packed_by_autoawq_itself():
    case = case_of("quantize/packing.npz", "autoawq_gemm")
    stored = {name: case[name] for name in ("qweight", "qzeros")}
    weight = unpack_awq(parts({**stored, "scales": case["scales"].astype(np.float16)}))
    np.testing.assert_allclose(weight.materialize(), case["dequant"].T, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(weight.zero_point).T, case["zero"])
    ours = written(weight)
    for name, array in stored.items():
        np.testing.assert_array_equal(ours[name], array)


def test_symmetric_weights_get_the_zero_point_eight():
    weight = Quantized.from_codes(jnp.full((8, 8), -8), jnp.ones((1, 8)), bits=4)
    ours = written(weight)
    assert np.all(ours["qzeros"].view(np.uint32) == 0x88888888) and np.all(ours["qweight"] == 0)
    again = unpack_awq(parts(ours))
    np.testing.assert_array_equal(again.materialize(), weight.materialize().T)


def test_what_the_format_cannot_hold_is_said():
    scale = jnp.ones((1, 12))
    problems = unfit_awq(Quantized.from_codes(jnp.ones((8, 12), jnp.int32), scale, bits=8))
    assert [p.split(",")[0] for p in problems] == ["has 8 bits", "has 12 outputs"]
    index = jnp.array([0, 1] * 4, jnp.int32)
    moved = Quantized.from_codes(jnp.ones((8, 8), jnp.int32), jnp.ones((2, 8)), None, index, bits=4)
    assert "groups in another order than its inputs" in unfit_awq(moved)[0]


def test_damaged_tensors_are_refused():
    codes, scales, zero = random_matrix(bits=4)
    stored = {"qweight": awq_words(codes), "qzeros": awq_words(zero)[:, :3], "scales": scales}
    with pytest.raises(ValueError, match=r"'qzeros' is int32 \(2, 3\), expected int32 \(2, 4\)"):
        unpack_awq(parts(stored))
