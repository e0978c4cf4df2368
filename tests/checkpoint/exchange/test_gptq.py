import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint.exchange._gptq import pack_gptq, unfit_gptq, unpack_gptq
from jaxweights.checkpoint.exchange._module import Part
from jaxweights.weights import Quantized
from tests.checkpoint.exchange._oracles import (
    case_of,
    dense,
    random_matrix,
    stream_along,
    stream_down,
)


def tensors(codes, scales, zero, *, bits, version=1, index=None):
    """What AutoGPTQ would store."""
    groups = len(codes) // len(scales)
    index = np.arange(len(codes)) // groups if index is None else index
    return {
        "qweight": stream_down(codes, bits),
        "qzeros": stream_along(zero - (version == 1), bits),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }


def parts(arrays):
    return {name: Part.of(array) for name, array in arrays.items()}


def written(weight, **settings):
    return {name: tensor() for name, tensor in pack_gptq(weight, **settings).items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_read_stands_for_the_numbers_and_is_written_as_the_same_bytes(bits, version):
    matrix = random_matrix(bits=bits, low_zero=2 - version)
    stored = tensors(*matrix, bits=bits, version=version)
    weight = unpack_gptq(parts(stored), bits=bits, version=version)
    assert weight.shape == (32, 64) and weight.group_index is None
    np.testing.assert_array_equal(weight.astype(np.float32).materialize(), dense(*matrix).T)
    assert not unfit_gptq(weight, version=version)
    assert_same(written(weight, version=version), stored)


def test_symmetric_codes_lose_their_zero_points_and_get_them_back():
    codes, scales, _ = random_matrix(bits=4)
    zero = np.full(scales.shape, 8)
    stored = tensors(codes, scales, zero, bits=4)
    assert np.all(stored["qzeros"] == 0x77777777)
    weight = unpack_gptq(parts(stored), bits=4, symmetric=True)
    assert weight.zero_point is None and weight.codes_matrix().dtype == jnp.int8
    np.testing.assert_array_equal(
        weight.astype(np.float32).materialize(), dense(codes, scales, zero).T
    )
    assert_same(written(weight), stored)


def test_a_file_that_says_symmetric_and_is_not_keeps_its_zero_points():
    codes, scales, zero = random_matrix(bits=4)
    weight = unpack_gptq(parts(tensors(codes, scales, zero, bits=4)), bits=4, symmetric=True)
    np.testing.assert_array_equal(weight.zero_point, zero)


def test_act_order_keeps_the_index_of_groups():
    codes, scales, zero = random_matrix(bits=4, groups=4)
    index = np.random.default_rng(1).permutation(np.arange(64) // 16)
    stored = tensors(codes, scales, zero, bits=4, index=index)
    weight = unpack_gptq(parts(stored), bits=4)
    np.testing.assert_array_equal(
        weight.astype(np.float32).materialize(), dense(codes, scales, zero, index).T
    )
    assert_same(written(weight), stored)


def test_a_last_group_that_is_not_full_is_read_and_written():
    codes, scales, zero = random_matrix(bits=4, groups=3)
    index = np.arange(64) // 24  # 24, 24 and 16 inputs
    stored = tensors(codes, scales, zero, bits=4, index=index)
    weight = unpack_gptq(parts(stored), bits=4)
    np.testing.assert_array_equal(
        weight.astype(np.float32).materialize(), dense(codes, scales, zero, index).T
    )
    assert_same(written(weight), stored)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_modules_packed_by_autogptq_itself(bits):
    case = case_of("quantize/packing.npz", f"autogptq{bits}")
    stored = {name: case[name] for name in ("qweight", "qzeros", "g_idx")}
    scales = case["module_scales"].astype(np.float32)
    weight = unpack_gptq(parts({**stored, "scales": scales}), bits=bits)
    np.testing.assert_allclose(weight.materialize(), case["unpacked_W"], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(weight.zero_point).T, case["zero"])
    ours = written(weight)
    assert_same({name: ours[name] for name in stored}, stored)


def test_three_bits_packed_by_the_authors():
    case = case_of("quantize/packing.npz", "gptq3")
    codes = np.round(case["W"] / case["scale"]) + case["zero"]
    weight = Quantized.from_codes(
        jnp.asarray(np.clip(codes, 0, 7).T, jnp.int32),
        jnp.asarray(case["scale"].T),
        jnp.asarray(case["zero"].T, jnp.uint8),
        bits=3,
    )
    np.testing.assert_array_equal(written(weight)["qweight"], case["qweight"])


BAD = {
    "missing": (lambda t: t.pop("scales"), "'scales' is missing"),
    "dtype": (lambda t: t.update(qweight=t["qweight"].astype(np.int64)), "'qweight' is int64"),
    "shape": (lambda t: t.update(qzeros=t["qzeros"][:1]), r"'qzeros' is int32 \(1, 4\), expected"),
    "index": (lambda t: t["g_idx"].__setitem__(0, 2), "'g_idx' holds 0 to 2, but there are 2 gr"),
    "negative": (lambda t: t["g_idx"].__setitem__(0, -1), "'g_idx' holds -1"),
    "no groups": (
        lambda t: t.update(scales=t["scales"][:0], qzeros=t["qzeros"][:0]),
        "has 64 inputs in 0 groups",
    ),
    "vector": (lambda t: t.update(qweight=t["qweight"][0]), "'qweight' is int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_tensors_are_refused(case):
    change, words = BAD[case]
    stored = tensors(*random_matrix(bits=4), bits=4)
    change(stored)
    with pytest.raises(ValueError, match=words):
        unpack_gptq(parts(stored), bits=4)


def quantized(*, in_dim=64, out_dim=32, rows=2, bits=4, cols=None, zero=None, scale=0.5):
    codes = jnp.ones((in_dim, out_dim), jnp.int32)
    scales = jnp.full((rows, cols or out_dim), scale, jnp.float32)
    zero = None if zero is None else jnp.full(scales.shape, zero, jnp.uint8)
    return Quantized.from_codes(codes, scales, zero, bits=bits)


UNFIT = {
    "bits": (quantized(bits=5), "has 5 bits, but GPTQ has 2, 3, 4 or 8"),
    "inputs": (quantized(in_dim=48), "has 48 inputs, which 32 does not divide"),
    "outputs": (quantized(out_dim=24), "has 24 outputs, which 32 does not divide"),
    "zero": (quantized(zero=0), "zero points of 0, which version 1 cannot hold.*gptq_v2"),
    "large zero": (quantized(zero=16), "zero points up to 16, but 4 bits hold 0 to 15"),
    "across outputs": (quantized(rows=1, cols=4), "groups that span 8 outputs of an input"),
    "every input": (quantized(rows=64, cols=4), "groups that span 8 outputs"),
    "single inputs": (quantized(rows=64), "has a scale for every input"),
    "offset": (
        dataclasses.replace(quantized(), offset=jnp.zeros((2, 32))),
        "has offsets, which are no integer zero points",
    ),
    "wide scale": (quantized(scale=1e6), "64 of 64 scales, such as 1e[+]06, lie beyond float16"),
    "tiny scale": (quantized(scale=1e-9), "lie beyond float16"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_the_format_cannot_hold_is_said(case):
    weight, words = UNFIT[case]
    problems = unfit_gptq(weight)
    assert len(problems) == 1
    with pytest.raises(ValueError, match=words):
        raise ValueError(problems[0])


def test_version_two_holds_a_zero_point_of_zero():
    assert not unfit_gptq(quantized(zero=0), version=2)
    assert np.all(written(quantized(zero=0), version=2)["qzeros"] == 0)
