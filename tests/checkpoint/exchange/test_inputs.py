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
from jaxweights.quantize import fp8_dynamic, int8_dynamic, mx, nvfp4, round_to_nearest
from jaxweights.weights import NarrowFloat, Quantized, QuantizedProduct, RoundedInputs

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


FLOATS = TOKENWISE | {"type": "float"}


@pytest.fixture
def float_weights():
    names = ["a.weight", "b.weight", "c.weight", "d.weight"]
    params = {name: kernel(i, (32, 64)) for i, name in enumerate(names)}
    tiles, rtn = fp8_dynamic(group_size=(16, 8), input_group_size=16), round_to_nearest
    integers = jw.chain(rtn(bits=4, group_size=32, grid="half"), fp8_dynamic())
    rules = [("a.*|b.*", fp8_dynamic()), ("c.*", tiles), ("d.*", integers)]
    made = jw.apply(jw.partition(*rules), params)
    fixed = RoundedInputs.of(made["b.weight"].weight_only(), jnp.full((1, 1), 0.25))
    return made | {"b.weight": fixed}


def test_modules_of_8_bit_floats_say_how_their_inputs_are_rounded(tmp_path, float_weights):
    described = write(tmp_path / "m", float_weights)
    assert inputs_by_module(described) == {
        "a": FLOATS,
        "b": FLOATS | {"strategy": "tensor", "dynamic": False},
        "c": FLOATS | {"strategy": "group", "group_size": 16},
        "d": FLOATS,
    }
    reader = open_safetensors(tmp_path / "m")
    scales = [name for name in reader if "input" in name]
    assert scales == ["b.input_scale"] and reader.read("b.input_scale").tolist() == [0.25]
    again = open_checkpoint(tmp_path / "m")
    for name, weight in float_weights.items():
        held = again.represented(name)
        assert isinstance(held, Quantized if name[0] == "d" else NarrowFloat)
        np.testing.assert_array_equal(held.materialize(), weight.materialize())
    # What is read makes the same product again.
    product = jw.apply(fp8_dynamic(), {"a.weight": again.represented("a.weight")})["a.weight"]
    model = jw.lift(lambda weight, x: x @ weight.T, on_materialize="error")
    x = jax.random.normal(jax.random.key(9), (5, 64))
    np.testing.assert_array_equal(model(product, x), model(float_weights["a.weight"], x))


def test_lazy_and_masked_floats_give_the_same_files(tmp_path, float_weights):
    write(tmp_path / "m", float_weights)
    write(tmp_path / "lazy", {n: LazyWeight(lambda w=w: w) for n, w in float_weights.items()})
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "lazy" / file).read_bytes()
    pruned = jw.apply(jw.sparsify.magnitude(sparsity=0.5), {"a.weight": kernel(0, (32, 64))})
    pruned = jw.apply(jw.chain(round_to_nearest(bits=4), fp8_dynamic()), pruned)
    write(tmp_path / "pruned", pruned)
    held = open_checkpoint(tmp_path / "pruned").represented("a.weight")
    np.testing.assert_array_equal(held.materialize(), pruned["a.weight"].materialize())


UNFIT = {
    "tiles": (
        fp8_dynamic(group_size=(16, 8), input_group_size=16),
        r"tiles of \(16, 8\) and inputs in groups of 16, but products take \(128, 128\) and 128",
    ),
    "groups": (fp8_dynamic(group_size=16), "has scales of groups of inputs"),
    "mx": (jw.chain(jw.quantize.mx(element="e2m1"), fp8_dynamic()), "has levels of a table"),
    "w4a8 groups": (
        jw.chain(round_to_nearest(bits=4, group_size=32), fp8_dynamic()),
        "has group_size=32, but W4A8 takes 128",
    ),
    "w3a8": (
        jw.chain(round_to_nearest(bits=3, group_size=128), fp8_dynamic()),
        "is not of symmetric 4-bit integers in order",
    ),
    "fixed": (
        jw.chain(round_to_nearest(bits=4, group_size=128), fp8_dynamic(input_group_size=128)),
        "W4A8 takes one for each token",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_kernels_of_vllm_do_not_multiply_is_said(tmp_path, case):
    tx, words = UNFIT[case]
    params = jw.apply(tx, {"a.weight": kernel(0, (128, 256))})
    with pytest.raises(ValueError, match=f"'a.weight' .*{words}") as error:
        write(tmp_path / "m", params, target="vllm")
    assert len(str(error.value).splitlines()) == 1
    fits = [
        fp8_dynamic(),
        fp8_dynamic(group_size=(128, 128), input_group_size=128),
        jw.chain(round_to_nearest(bits=4, group_size=128), fp8_dynamic()),
    ]
    for i, tx in enumerate(fits if case == "tiles" else ()):
        params = jw.apply(tx, {"a.weight": kernel(0, (128, 256))})
        write(tmp_path / f"fits{i}", params, target="vllm")


def test_other_formats_refuse_floats_as_inputs(tmp_path, float_weights):
    words = "'d.weight' is a RoundedInputs, whose inputs are rounded too, which gptq cannot"
    with pytest.raises(ValueError, match=words):
        write_quantized(tmp_path / "m", float_weights, form="gptq", config={})


BLOCKS = {"num_bits": 4, "type": "float", "symmetric": True}
NVFP4 = BLOCKS | {
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": "local",
    "scale_dtype": "torch.float8_e4m3fn",
}
MXFP4 = BLOCKS | {
    "strategy": "group",
    "group_size": 32,
    "dynamic": True,
    "scale_dtype": "torch.uint8",
}


@pytest.fixture
def block_weights():
    params = {name: kernel(i, (32, 64)) for i, name in enumerate(["a.weight", "b.weight"])}
    four = jw.apply(jw.partition(("a.*", nvfp4()), (".*", mx(element="e2m1"))), params)
    overall = jnp.full((1, 1), 768.0)
    return {
        "a.weight": RoundedInputs.of(four["a.weight"], overall, form="nvfp4"),
        "b.weight": RoundedInputs.of(four["b.weight"], form="mxfp4"),
        "c.weight": RoundedInputs.of(four["b.weight"], form="mxfp8"),
    }


def test_inputs_in_microscaling_formats_are_described(tmp_path, block_weights):
    described = write(tmp_path / "m", block_weights)
    assert inputs_by_module(described) == {
        "a": NVFP4,
        "b": MXFP4,
        "c": MXFP4 | {"num_bits": 8},
    }
    reader = open_safetensors(tmp_path / "m")
    scales = [name for name in reader if "input" in name]
    assert scales == ["a.input_global_scale"] and reader.read(scales[0]).tolist() == [768.0]
    again = open_checkpoint(tmp_path / "m")
    for name, weight in block_weights.items():
        np.testing.assert_array_equal(again.represented(name).materialize(), weight.materialize())


def test_kernels_of_vllm_multiply_nvfp4(tmp_path, block_weights):
    write(tmp_path / "m", {"a.weight": block_weights["a.weight"]}, target="vllm")
    words = "'b.weight' has inputs of 4-bit floats, but products take NVFP4 on both sides"
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "n", {"b.weight": block_weights["b.weight"]}, target="vllm")
    with pytest.raises(ValueError, match=r"'c.weight' has levels of a table"):
        write(tmp_path / "n", {"c.weight": block_weights["c.weight"]}, target="vllm")
