import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint._gguf_blocks import BLOCK_TYPES, dequantize
from jaxweights.checkpoint.exchange._gguf_codes import (
    INTEGER_TYPES,
    gguf_type,
    pack_gguf,
    unfit_gguf,
    unpack_gguf,
)
from jaxweights.weights import Quantized

HALVES = {  # where a block has its float16 numbers
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
TYPES = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.name in INTEGER_TYPES}


def random_blocks(name, rows=6):
    """Two blocks a row: any bytes, but numbers for scales."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (2 * rows, TYPES[name].nbytes), dtype=np.uint8)
    for start in HALVES[name]:
        data[:, start : start + 2] = rng.normal(size=(2 * rows, 1)).astype("<f2").view(np.uint8)
    return data, (rows, 2 * TYPES[name].values)


@pytest.mark.parametrize("name", HALVES)
def test_integers_stand_for_the_same_numbers_to_the_last_bit(name):
    data, shape = random_blocks(name)
    weight = unpack_gguf(name, data, shape)
    assert weight.shape == shape
    got = np.asarray(weight.materialize())
    np.testing.assert_array_equal(got, dequantize(TYPES[name], data).reshape(shape))
    assert len(np.unique(weight.codes_matrix())) > 2


@pytest.mark.parametrize("name", HALVES)
def test_the_gguf_package_reads_the_same_numbers(name):
    gguf = pytest.importorskip("gguf")
    data, shape = random_blocks(name)
    theirs = gguf.quants.dequantize(data.reshape(6, -1), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(unpack_gguf(name, data, shape).materialize(), theirs)


@pytest.mark.parametrize("name", [name for name in HALVES if not name.endswith("K")])
def test_blocks_come_back_byte_for_byte(name):
    data, shape = random_blocks(name)
    weight = unpack_gguf(name, data, shape)
    assert gguf_type(weight) == name and not unfit_gguf(weight)
    np.testing.assert_array_equal(pack_gguf(weight), data)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_the_gguf_package_packs_the_same_blocks(name):
    gguf = pytest.importorskip("gguf")
    values = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    data = theirs.reshape(-1, TYPES[name].nbytes)
    np.testing.assert_array_equal(pack_gguf(unpack_gguf(name, data, (4, 64))), data)


@pytest.mark.parametrize(
    "bits, zero, name", [(2, None, "Q4_0"), (4, 3, "Q5_0"), (5, None, "Q5_0"), (6, 9, "Q8_0")]
)
def test_codes_that_ggml_has_no_type_for_go_into_a_wider_one(bits, zero, name):
    low = -(2 ** (bits - 1)) if zero is None else 0
    codes = np.random.default_rng(2).integers(low, low + 2**bits, (64, 4))
    scale = jnp.asarray(np.linspace(0.5, 1, 4, dtype=np.float16)[None])
    zero = None if zero is None else jnp.full((1, 4), zero, jnp.uint8)
    weight = Quantized.from_codes(jnp.asarray(codes), scale, zero, bits=bits)
    assert gguf_type(weight) == name and not unfit_gguf(weight)
    again = unpack_gguf(name, pack_gguf(weight), (4, 64))
    np.testing.assert_array_equal(again.materialize().T, weight.materialize())


def test_what_no_type_holds_is_said():
    def weight(in_dim=64, rows=2, bits=4, scale=1.0, **fields):
        codes = jnp.zeros((in_dim, 4), jnp.int32)
        return Quantized.from_codes(codes, jnp.full((rows, 4), scale), bits=bits, **fields)

    cases = {
        "has 48 inputs, which blocks of 32 do not divide": weight(in_dim=48, rows=1),
        "has groups of 16 inputs": weight(rows=4),
        "has groups in another order": weight(group_index=jnp.array([0, 1] * 32, jnp.int32)),
        "has offsets and 6 bits": weight(bits=6, offset=jnp.ones((2, 4))),
        "has 8 of 8 scales, such as 1e+06, lie beyond float16": weight(scale=1e6),
        "has 8 of 8 scales, such as 1e-09, lie beyond float16": weight(scale=1e-9),
        "has 8 of 8 offsets, such as 1e+06, lie beyond float16": weight(
            offset=jnp.full((2, 4), 1e6)
        ),
    }
    for words, case in cases.items():
        assert [words in problem for problem in unfit_gguf(case)] == [True], words


def test_offsets_that_vanish_beside_their_scales_and_groups_of_zeros_are_written():
    codes = jnp.zeros((32, 1), jnp.int32)
    tiny = Quantized.from_codes(codes, jnp.ones((1, 1)), bits=4, offset=jnp.full((1, 1), 1e-9))
    zero = Quantized.from_codes(codes, jnp.zeros((1, 1)), bits=4)
    assert not unfit_gguf(tiny) and not unfit_gguf(zero)


@pytest.mark.parametrize("size, written", [(1e-9, "1.25e-10"), (1e6, "125000")])
def test_a_file_is_not_written_with_scales_that_become_zero_or_infinite(tmp_path, size, written):
    tx = jw.quantize.round_to_nearest(bits=4, group_size=32)
    values = jnp.full((2, 64), size).at[0].set(0.5)
    small = jw.apply(tx, {"up.weight": values}, layout={"up.weight": jw.Axes((-1,), (-2,))})
    with pytest.raises(ValueError) as error:
        jw.checkpoint.write_gguf(tmp_path / "m.gguf", small, {"general.name": "tiny"})
    message = str(error.value)
    assert f"'up.weight' has 2 of 4 scales, such as -{written}, lie beyond float16" in message
    assert "Set what is so small to 0" in message and not [*tmp_path.iterdir()]
