import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint.exchange._bitsandbytes import (
    pack_bitsandbytes,
    unfit_bitsandbytes,
    unpack_bitsandbytes,
)
from jaxweights.checkpoint.exchange._module import Part
from jaxweights.quantize._nf4 import FP4_LEVELS, NF4_LEVELS, four_bit_matrix
from jaxweights.weights import Codebook, Quantized
from tests.checkpoint.exchange._oracles import case_of


def parts(arrays):
    return {name: Part.of(array) for name, array in arrays.items()}


def stored(case, *, shape=(32, 128), block=64):
    """Tensors as transformers saves what bitsandbytes computed for the fixture."""
    arrays = case_of("quantize/bitsandbytes.npz", case)
    kind = case[:3]
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(shape)}
    tensors = {"weight": arrays["packed"]}
    if "absmax_q" in arrays:
        code = case_of("quantize/bitsandbytes.npz", "nf4_b64")["code"]
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = float(arrays["offset"])
        tensors |= {"weight.absmax": arrays["absmax_q"], "weight.quant_map": code}
        tensors["weight.nested_absmax"] = arrays["absmax2"]
        tensors["weight.nested_quant_map"] = arrays["code2"]
    else:
        tensors |= {"weight.absmax": arrays["absmax"], "weight.quant_map": arrays["code"]}
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    return tensors, arrays["dq"]


CASES = [("nf4_b64", 64), ("nf4_b128", 128), ("fp4_b64", 64), ("fp4_b128", 128), ("nf4_double", 64)]


@pytest.mark.parametrize("case, block", CASES)
def test_what_bitsandbytes_wrote_is_read_exactly_and_written_byte_for_byte(case, block):
    tensors, dense = stored(case, block=block)
    weight = unpack_bitsandbytes(parts(tensors))
    assert isinstance(weight, Codebook) and weight.shape == (32, 128)
    np.testing.assert_allclose(weight.materialize(), dense, rtol=1e-6, atol=1e-9)
    assert not unfit_bitsandbytes(weight)
    ours = {name: tensor() for name, tensor in pack_bitsandbytes(weight).items()}
    assert ours.keys() == tensors.keys()
    for name, array in tensors.items():
        assert ours[name].dtype == array.dtype and ours[name].shape == array.shape, name
        assert ours[name].tobytes() == array.tobytes(), name


def test_the_first_of_two_codes_lies_in_the_high_bits():
    weight = four_bit_matrix(jnp.array([[-1.0], [1.0]] * 32), NF4_LEVELS, group_size=64)
    assert set(pack_bitsandbytes(weight)["weight"]().reshape(-1).tolist()) == {0x0F}


def odd_blocks(shape, block):
    """A module whose blocks may end inside of an output."""
    rng = np.random.default_rng(0)
    count = shape[0] * shape[1]
    codes = rng.integers(0, 16, count + count % 2).astype(np.uint8)
    absmax = rng.uniform(0.5, 1, -(-count // block)).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(shape)}
    tensors = {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": NF4_LEVELS,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    flat = NF4_LEVELS[codes[:count]] * absmax[np.arange(count) // block]
    return tensors, flat.reshape(shape)


@pytest.mark.parametrize("shape, represented", [((4, 32), True), ((3, 5), True), ((5, 96), False)])
def test_blocks_that_tile_no_matrix_are_read_as_a_dense_array(shape, represented):
    tensors, dense = odd_blocks(shape, 64)
    got = unpack_bitsandbytes(parts(tensors))
    assert isinstance(got, Codebook) is represented
    values = got.materialize() if represented else got
    np.testing.assert_array_equal(values, dense)
    if represented:
        ours = pack_bitsandbytes(got)["weight.absmax"]()
        np.testing.assert_array_equal(ours, tensors["weight.absmax"])


def state_of(**changes):
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 128]}
    return np.frombuffer(json.dumps(state | changes).encode(), np.uint8)


KEY = "weight.quant_state.bitsandbytes__nf4"
BAD = {
    "no state": (lambda t: t.pop(KEY), "holds no single 'quant_state'"),
    "huge": (lambda t: t.update({KEY: state_of(shape=[2**40, 2])}), "describes no matrix"),
    "text": (lambda t: t.update({KEY: state_of(blocksize="64")}), "describes no matrix"),
    "other shape": (lambda t: t.update({KEY: state_of(shape=[32, 127])}), r"'weight' is uint8"),
    "dtype": (lambda t: t.update({KEY: state_of(dtype="os.system")}), "describes no matrix"),
    "no json": (lambda t: t.update({KEY: np.zeros(3, np.uint8)}), "'quant_state': not valid"),
    "absmax": (lambda t: t.update({"weight.absmax": np.ones(3, np.float32)}), "'weight.absmax' is"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_modules_are_refused(case):
    change, words = BAD[case]
    tensors, _ = stored("nf4_b64")
    change(tensors)
    with pytest.raises(ValueError, match=words):
        unpack_bitsandbytes(parts(tensors))


def test_what_the_format_cannot_hold_is_said():
    values = jnp.linspace(-1, 1, 96 * 4).reshape(96, 4)
    integers = Quantized.from_codes(jnp.ones((8, 8), jnp.int32), jnp.ones((1, 8)), bits=4)
    other = Codebook.from_codes(
        jnp.ones((64, 4), jnp.int32), jnp.linspace(-1, 1, 16), jnp.ones((1, 4)), bits=4
    )
    cases = {
        "is a Quantized, but bitsandbytes holds levels": integers,
        "has other levels than nf4 and fp4": other,
        "has groups of 96": four_bit_matrix(values, NF4_LEVELS, group_size=96),
        "has scales \\(96, 1\\)": four_bit_matrix(values, FP4_LEVELS, group_size=(1, 4)),
        "has scales in blocks of 192": four_bit_matrix(
            jnp.tile(values, (1, 96)), NF4_LEVELS, group_size=32, double_quantization=True
        ),
    }
    for words, weight in cases.items():
        problems = unfit_bitsandbytes(weight)
        with pytest.raises(ValueError, match=words):
            raise ValueError(problems[0])
