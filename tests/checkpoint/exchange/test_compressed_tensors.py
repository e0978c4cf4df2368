import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxweights.checkpoint.exchange._compressed_tensors import (
    pack_int_quantized,
    pack_pack_quantized,
    unpack_int_quantized,
    unpack_pack_quantized,
)
from jaxweights.checkpoint.exchange._module import Part
from jaxweights.weights import Quantized
from tests.checkpoint.exchange._oracles import dense, random_matrix, stream_along, stream_down


def parts(arrays):
    return {name: Part.of(array) for name, array in arrays.items()}


def made(tensors):
    return {name: tensor() for name, tensor in tensors.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def packed(codes, scales, zero, *, bits, symmetric):
    stored = {
        "weight_packed": stream_along(codes.T, bits),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array(codes.T.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = stream_down(zero.T, bits)
    return stored


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("in_dim, out_dim, groups", [(64, 32, 2), (20, 7, 1)])
def test_packed_words_stand_for_the_numbers_and_come_back(bits, symmetric, in_dim, out_dim, groups):
    codes, scales, zero = random_matrix(
        bits=bits, in_dim=in_dim, out_dim=out_dim, groups=groups, scale=ml_dtypes.bfloat16
    )
    if symmetric:
        zero = np.full_like(zero, 2 ** (bits - 1))
    stored = packed(codes, scales, zero, bits=bits, symmetric=symmetric)
    weight = unpack_pack_quantized(parts(stored), bits=bits, symmetric=symmetric)
    assert weight.signed is symmetric and weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        weight.astype(np.float32).materialize(), dense(codes, scales, zero).T
    )
    assert_same(made(pack_pack_quantized(weight)), stored)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_weights_come_back(symmetric):
    codes, scales, zero = random_matrix(bits=8, groups=1)
    zero = np.full_like(zero, 128) if symmetric else zero
    stored = {
        "weight": (codes.T - 128).astype(np.int8),
        "weight_scale": np.ascontiguousarray(scales.T),
    }
    if not symmetric:
        stored["weight_zero_point"] = (zero.T - 128).astype(np.int8)
    weight = unpack_int_quantized(parts(stored), symmetric=symmetric)
    np.testing.assert_array_equal(
        weight.astype(np.float32).materialize(), dense(codes, scales, zero).T
    )
    assert_same(made(pack_int_quantized(weight)), stored)


def test_one_scale_for_a_tensor_comes_back_as_one():
    stored = {
        "weight": np.arange(12, dtype=np.int8).reshape(3, 4),
        "weight_scale": np.array([0.5], np.float32),
    }
    weight = unpack_int_quantized(parts(stored), symmetric=True)
    np.testing.assert_array_equal(weight.materialize(), stored["weight"] * np.float32(0.5))
    assert_same(made(pack_int_quantized(weight)), stored)


def test_moved_groups_keep_their_index_and_an_unfilled_one_means_none():
    codes, scales, zero = random_matrix(bits=4, groups=4)
    index = np.random.default_rng(1).permutation(np.arange(64, dtype=np.int32) // 16)
    stored = packed(codes, scales, zero, bits=4, symmetric=False) | {"weight_g_idx": index}
    weight = unpack_pack_quantized(parts(stored), bits=4, symmetric=False)
    np.testing.assert_array_equal(
        weight.astype(np.float32).materialize(), dense(codes, scales, zero, index).T
    )
    assert_same(made(pack_pack_quantized(weight)), stored)
    stored["weight_g_idx"] = np.full(64, -1, np.int32)
    assert unpack_pack_quantized(parts(stored), bits=4, symmetric=False).group_index is None


BAD = {
    "lie": (lambda t: t.update(weight_shape=np.array([32, 10**9])), "'weight_shape' is"),
    "outputs": (lambda t: t.update(weight_shape=np.array([31, 64])), "'weight_shape' is"),
    "bits": (lambda t: t.update(weight_shape=np.array([32, 100])), r"expected int32 \(32, 13\)"),
    "scale": (lambda t: t.update(weight_scale=t["weight_scale"][:5]), "'weight_scale' is"),
    "groups": (
        lambda t: t.update(weight_scale=np.ones((32, 3), np.float16)),
        "no 3 equal groups, and no .weight_g_idx",
    ),
    "empty": (lambda t: t.update(weight_scale=np.ones((32, 0), np.float16)), "is empty"),
    "missing": (lambda t: t.pop("weight_packed"), "'weight_packed' is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_tensors_are_refused(case):
    change, words = BAD[case]
    codes, scales, zero = random_matrix(bits=4)
    stored = packed(codes, scales, zero, bits=4, symmetric=True)
    change(stored)
    with pytest.raises(ValueError, match=words):
        unpack_pack_quantized(parts(stored), bits=4, symmetric=True)


def test_the_package_itself_packs_and_unpacks_the_same():
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in (2, 3, 4, 5, 8):
        codes, scales, _ = random_matrix(bits=bits, in_dim=40, out_dim=6, groups=1)
        signed = (codes - 2 ** (bits - 1)).astype(np.int8)
        weight = Quantized.from_codes(jnp.asarray(signed), jnp.asarray(scales), bits=bits)
        theirs = helpers.pack_to_int32(torch.from_numpy(signed.T.copy()), bits).numpy()
        np.testing.assert_array_equal(made(pack_pack_quantized(weight))["weight_packed"], theirs)
