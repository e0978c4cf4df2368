"""Weights whose last group is shorter, in the formats of others."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, write_gguf
from jaxweights.checkpoint.exchange import write_quantized
from jaxweights.weights import Quantized

# 4.5 groups of 64, as SmolLM2-135M has of 128.
WEIGHT = jax.random.normal(jax.random.key(0), (32, 288))  # as torch has it, (out, in)
CONFIG = {"model_type": "llama"}


def short(bits=4, grid="affine"):
    tx = jw.quantize.round_to_nearest(
        bits=bits, group_size=64, pad="zero", grid=grid, scale_dtype=jnp.float16
    )
    return jw.apply(tx, {"up.weight": WEIGHT})["up.weight"]


def scattered():
    """As act-order leaves it: the last of the visited inputs make up the shorter group."""
    order = np.random.default_rng(0).permutation(288)
    index = jnp.asarray(np.argsort(order) // 64, jnp.int32)
    return dataclasses.replace(short(), group_index=index)


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def written_and_read(folder, weight, form):
    write_quantized(folder, {"up.weight": weight}, form=form, config=CONFIG)
    return open_checkpoint(folder).represented("up.weight")


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("make", [short, scattered])
def test_gptq_keeps_them_as_they_are(tmp_path, make, form):
    weight = make()
    # Version 1 cannot hold zero points of 0.
    weight = dataclasses.replace(weight, zero_point=jnp.maximum(weight.zero_point, 1))
    read = written_and_read(tmp_path / "out", weight, form)
    assert read.scale.shape == (5, 32)
    assert (read.full_group, read.group_size) == (64, 64)
    assert (read.group_index is None) == (weight.group_index is None)
    expected = weight.materialize().astype(read.dtype)
    np.testing.assert_array_equal(read.materialize(), expected)
    config = quantization_config(tmp_path / "out")
    assert config["group_size"] == 64
    assert config["desc_act"] == (weight.group_index is not None)


def test_the_index_of_a_gptq_file_names_the_rows_that_its_writers_name(tmp_path):
    weight = dataclasses.replace(short(), zero_point=jnp.full((5, 32), 8, jnp.uint8))
    write_quantized(tmp_path / "out", {"up.weight": weight}, form="gptq", config=CONFIG)
    index = open_checkpoint(tmp_path / "out").read("up.g_idx")
    np.testing.assert_array_equal(index, np.arange(288) // 64)


@pytest.mark.parametrize("bits, grid", [(4, "affine"), (4, "narrow"), (8, "narrow"), (3, "half")])
def test_compressed_tensors_holds_the_same_numbers_in_groups_of_one_size(tmp_path, bits, grid):
    weight = short(bits, grid)
    read = written_and_read(tmp_path / "out", weight, "compressed-tensors")
    assert (read.full_group, read.group_size) == (0, 32)
    np.testing.assert_array_equal(read.codes_matrix(), stored(weight, read))
    np.testing.assert_array_equal(read.materialize(), weight.materialize().astype(read.dtype))


def stored(weight, read):
    """Codes of the weight, signed or not as the file has them."""
    codes = np.asarray(weight.codes_matrix()).astype(np.int16)
    return codes + (2 ** (weight.bits - 1) if weight.signed and not read.signed else 0)


@pytest.mark.parametrize("bits, grid", [(4, "affine"), (4, "narrow"), (8, "narrow"), (3, "half")])
def test_compressed_tensors_itself_reads_what_is_written(tmp_path, bits, grid):
    load_file = pytest.importorskip("safetensors.torch").load_file
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weight = short(bits, grid)
    write_quantized(
        tmp_path / "out", {"up.weight": weight}, form="compressed-tensors", config=CONFIG
    )
    (group,) = quantization_config(tmp_path / "out")["config_groups"].values()
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**group["weights"])
    )
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    parts = load_file(tmp_path / "out" / "model.safetensors")
    state = {name.removeprefix("up."): part for name, part in parts.items()}
    dense = compressor.decompress(state, scheme)["weight"]
    expected = weight.materialize().astype(jnp.float16)
    np.testing.assert_array_equal(dense.float().numpy(), expected.astype(jnp.float32))


@pytest.mark.parametrize("bits, grid", [(4, "signed_max"), (8, "narrow")])
def test_gguf_repeats_scales_for_its_blocks(tmp_path, bits, grid):
    weight = short(bits, grid)
    write_gguf(tmp_path / "out.gguf", {"up.weight": weight}, metadata={})
    read = open_checkpoint(tmp_path / "out.gguf").represented("up.weight")
    np.testing.assert_array_equal(read.materialize(), weight.materialize())


def test_what_formats_cannot_say_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="groups of 64 inputs of which the last is shorter, but"
    ) as e:
        written_and_read(tmp_path / "out", short(), "awq")
    assert "divides the 288 inputs, such as 32, or write GPTQ" in str(e.value)
    with pytest.raises(ValueError, match="scattered groups of 64 inputs of which the last is"):
        written_and_read(tmp_path / "out", scattered(), "compressed-tensors")
    odd = jw.quantize.round_to_nearest(bits=4, group_size=24, pad="zero", grid="signed_max")
    odd = jw.apply(odd, {"up.weight": WEIGHT[:, :256]})["up.weight"]
    with pytest.raises(ValueError, match="has groups of 8 inputs, but GGUF's blocks have 32"):
        write_gguf(tmp_path / "out.gguf", {"up.weight": odd}, metadata={})


def test_a_file_with_groups_of_other_lengths_keeps_its_index():
    from jaxweights.checkpoint.exchange._module import read_groups

    read = lambda index: read_groups(index, 12, 3, name="g_idx")  # noqa: E731
    index = np.repeat(np.arange(3, dtype=np.int32), [5, 4, 3])
    assert read(index) == (index, 0)
    assert read(np.repeat(np.arange(3, dtype=np.int32), [5, 5, 2])) == (None, 5)
    assert read(np.repeat(np.arange(3, dtype=np.int32), 4)) == (None, 0)
    assert read(index[::-1] * 0)[1] == 0  # empty groups
    assert Quantized.from_codes(jnp.zeros((12, 1)), jnp.ones((3, 1)), None, index, bits=4)
