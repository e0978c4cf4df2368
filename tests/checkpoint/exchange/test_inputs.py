"""Weights that round their inputs: what compressed-tensors says of them, and who cannot."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, open_safetensors
from jaxweights.checkpoint.exchange import LazyWeight, write_quantized
from jaxweights.quantize import int8_dynamic, round_to_nearest
from jaxweights.weights import Quantized, QuantizedProduct

TOKENWISE = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FIXED = TOKENWISE | {"strategy": "tensor", "dynamic": False}


def kernel(number, shape=(24, 16)):
    """Of torch's orientation, (out, in)."""
    return jax.random.normal(jax.random.key(number), shape)


def with_step(weight, step):
    return dataclasses.replace(weight, input_scale=jnp.full((1, 1), step, jnp.float32))


@pytest.fixture
def weights():
    names = ["a.weight", "b.weight", "c.weight", "d.weight"]
    params = {name: kernel(i) for i, name in enumerate(names)}
    rules = [("a.*|b.*", int8_dynamic()), ("c.*", int8_dynamic(bits=4, input_bits=6))]
    made = jw.apply(jw.partition(*rules, (".*", round_to_nearest(bits=8))), params)
    return made | {"b.weight": with_step(made["b.weight"], 0.25)}


def write(folder, tensors, **options):
    write_quantized(folder, tensors, form="compressed-tensors", config={}, **options)
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def inputs_by_module(described):
    groups = described["config_groups"].values()
    return {stem: g["input_activations"] for g in groups for stem in g["targets"]}


def test_every_module_says_how_its_own_inputs_are_rounded(tmp_path, weights):
    described = write(tmp_path / "m", weights)
    assert inputs_by_module(described) == {
        "a": TOKENWISE,
        "b": FIXED,
        "c": TOKENWISE | {"num_bits": 6},
        "d": None,
    }
    reader = open_safetensors(tmp_path / "m")
    scales = [name for name in reader if "input" in name]
    assert scales == ["b.input_scale"] and reader.read("b.input_scale").tolist() == [0.25]
    np.testing.assert_array_equal(reader.read("a.weight"), weights["a.weight"].codes)
    again = open_checkpoint(tmp_path / "m")
    for name, weight in weights.items():
        held = again.represented(name)
        assert isinstance(held, Quantized) and held.bits == weight.bits
        np.testing.assert_array_equal(held.materialize(), weight.materialize())


def test_the_integers_that_are_read_make_the_same_product(tmp_path, weights):
    write(tmp_path / "m", weights)
    held = {"a.weight": open_checkpoint(tmp_path / "m").represented("a.weight")}
    product = jw.apply(int8_dynamic(), held)["a.weight"]
    assert isinstance(product, QuantizedProduct)
    model = jw.lift(lambda weight, x: x @ weight.T)
    x = jax.random.normal(jax.random.key(9), (5, 16))
    np.testing.assert_array_equal(model(product, x), model(weights["a.weight"], x))


def test_lazy_ones_give_the_same_files(tmp_path, weights):
    write(tmp_path / "m", weights)
    write(tmp_path / "lazy", {n: LazyWeight(lambda w=w: w) for n, w in weights.items()})
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "lazy" / file).read_bytes()


def test_what_a_weight_says_wins_over_what_a_checkpoint_said(tmp_path, weights):
    """Steps that were fixed for the old integers go; those of other modules stay."""
    step = {"a.input_scale": np.ones(1, np.float32), "d.input_scale": np.full(1, 2, np.float32)}
    given = {"config_groups": {"group_0": {"targets": ["Linear"], "input_activations": FIXED}}}
    described = write(tmp_path / "m", step | weights, settings=given)
    assert inputs_by_module(described) == {
        "a": TOKENWISE,
        "b": FIXED,
        "c": TOKENWISE | {"num_bits": 6},
        "d": FIXED,
    }
    scales = {n for n in open_safetensors(tmp_path / "m") if "input" in n}
    assert scales == {"b.input_scale", "d.input_scale"}


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq", "bitsandbytes"])
def test_formats_of_weights_alone_refuse_them(tmp_path, weights, form):
    words = rf"'a.weight' is a QuantizedProduct, whose inputs are rounded too, which {form} cannot"
    with pytest.raises(ValueError, match=words) as error:
        write_quantized(tmp_path / "m", weights, form=form, config={})
    assert "Write compressed-tensors, or `weight_only()` of it" in str(error.value)
    assert not (tmp_path / "m").exists()


def test_kernels_of_vllm_multiply_8_bits(tmp_path, weights):
    with pytest.raises(ValueError) as error:
        write(tmp_path / "m", {"c.weight": weights["c.weight"]}, target="vllm")
    assert "'c.weight' has 4 bits, but products of 8-bit numbers take 8" in str(error.value)
    write(tmp_path / "m", {"a.weight": weights["a.weight"]}, target="vllm")
