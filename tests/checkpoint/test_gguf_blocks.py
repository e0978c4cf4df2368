"""Every block type stands for exactly the numbers that ggml's own package says."""

import numpy as np
import pytest

from jaxweights.checkpoint._gguf_blocks import BLOCK_TYPES, OTHER_TYPES, dequantize

DECODED = {t.name: (number, t) for number, t in BLOCK_TYPES.items() if t.decode}
ONLY_OURS = {"Q8_K"}  # the package cannot decode it


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    # A NaN's payload may differ; every other value must not.
    equal = got.view(np.uint32) == np.asarray(want, np.float32).view(np.uint32)
    return bool(np.all(equal | (np.isnan(got) & np.isnan(want))))


@pytest.mark.parametrize("name", sorted(set(DECODED) - ONLY_OURS))
def test_random_bytes_decode_to_the_same_bits_as_in_the_reference(name):
    gguf = pytest.importorskip("gguf")
    number, block_type = DECODED[name]
    raw = np.random.default_rng(number).integers(0, 256, (600, block_type.nbytes), np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.dequantize(raw, gguf.GGMLQuantizationType(number))
    assert same_bits(dequantize(block_type, raw), want.reshape(600, -1))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_what_the_reference_quantizes_is_read_back(name):
    gguf = pytest.importorskip("gguf")
    number, block_type = DECODED[name]
    values = np.random.default_rng(0).normal(size=(8, 96)).astype(np.float32)
    raw = gguf.quantize(values, gguf.GGMLQuantizationType(number))
    got = dequantize(block_type, raw.reshape(-1, block_type.nbytes)).reshape(8, 96)
    assert same_bits(got, gguf.dequantize(raw, gguf.GGMLQuantizationType(number)))
    # The coarsest: MXFP4 holds values of up to 8 steps as 6.
    assert 0 < np.abs(got - values).max() <= np.abs(values).max() / 4


def test_sizes_and_names_are_those_of_the_reference():
    gguf = pytest.importorskip("gguf")
    for number, block_type in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == block_type.name
        assert gguf.GGML_QUANT_SIZES[kind] == (block_type.values, block_type.nbytes)
    for kind in gguf.GGMLQuantizationType:
        assert kind.value in BLOCK_TYPES or OTHER_TYPES[kind.value].startswith(kind.name)


def test_q8_k_is_a_float_scale_times_bytes():
    raw = np.zeros((1, 292), np.uint8)
    raw[0, :4] = np.frombuffer(np.float32(0.5).tobytes(), np.uint8)
    raw[0, 4:260] = np.arange(-128, 128).astype(np.int8).view(np.uint8)
    got = dequantize(DECODED["Q8_K"][1], raw)
    np.testing.assert_array_equal(got[0], np.arange(-128, 128) * 0.5)


def test_q4_k_by_hand():
    # One super-block with d=1, dmin=1, scale j+1 and minimum j for run j, all codes j.
    scales, minima = np.arange(1, 9), np.arange(8)
    packed = np.zeros(12, np.uint8)
    packed[:4], packed[4:8] = scales[:4], minima[:4]
    packed[8:] = scales[4:] & 15 | (minima[4:] & 15) << 4
    codes = np.repeat(np.arange(8, dtype=np.uint8), 32).reshape(4, 2, 32)
    one = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    raw = np.concatenate([one, one, packed, (codes[:, 0] | codes[:, 1] << 4).ravel()])
    got = dequantize(DECODED["Q4_K"][1], raw[None])[0].reshape(8, 32)
    np.testing.assert_array_equal(got, np.repeat((np.arange(8) * scales - minima)[:, None], 32, 1))


def test_chunks_join_without_a_seam():
    _, block_type = DECODED["Q4_1"]
    raw = np.random.default_rng(0).integers(0, 60, (9000, 20), np.uint8)
    halves = [dequantize(block_type, raw[:4500]), dequantize(block_type, raw[4500:])]
    np.testing.assert_array_equal(dequantize(block_type, raw), np.concatenate(halves))
    assert dequantize(block_type, raw[:0]).shape == (0, 32)
