"""Checkpoints of narrow floats and of rounded inputs are read, run and written."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_safetensors, write_safetensors
from jaxweights.models import export_checkpoint, load_pretrained
from jaxweights.weights import (
    Codebook,
    NarrowFloat,
    is_weight,
)
from tests.models._quantized_checkpoints import (
    CONFIG,
    LAYERS,
    LINEARS,
    again,
    common,
    kernels,
    logits,
    rounded,
    same_tensors,
)

FLOATS = {
    "nf4": (jw.quantize.nf4(), "bitsandbytes"),
    "nf4 with quantized scales": (jw.quantize.nf4(double_quantization=True), "bitsandbytes"),
    "fp4": (jw.quantize.fp4(group_size=128), "bitsandbytes"),
    "fp8": (jw.quantize.fp8(), "compressed-tensors"),
    "fp8 in tiles": (jw.quantize.fp8(group_size=(64, 64)), "compressed-tensors"),
    "mxfp4": (jw.quantize.mx(element="e2m1"), "compressed-tensors"),
    "mxfp6": (jw.quantize.mx(element="e2m3"), "compressed-tensors"),
    "mxfp8": (jw.quantize.mx(element="e4m3"), "compressed-tensors"),
    "nvfp4": (jw.quantize.nvfp4(), "compressed-tensors"),
}


@pytest.mark.parametrize("case", FLOATS)
def test_narrow_floats_come_back_and_run(dense_model, tmp_path, case):
    method, form = FLOATS[case]
    params = rounded(dense_model, rules=[("layers/mlp/.*/kernel", method)])
    export_checkpoint(tmp_path / "out", params, dense_model.config, form=form)
    got = load_pretrained(tmp_path / "out")
    for path, kernel in kernels(params).items():
        again = kernels(got.params)[path]
        assert type(again) is type(kernel), path
        if is_weight(kernel):
            again, kernel = again.astype(jnp.float32).materialize(), kernel.materialize()
        np.testing.assert_array_equal(again, kernel, err_msg=path)
    np.testing.assert_allclose(
        logits(got, got.params), logits(dense_model, params), rtol=1e-5, atol=1e-5
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == form
    skipped = config.get("ignore") or config.get("llm_int8_skip_modules")
    assert {"lm_head", "model.layers.1.self_attn.q_proj"} <= set(skipped)


def fp8_folder(folder, tile, *, scales="weight_scale_inv", scheme="dynamic", seed=0):
    """As DeepSeek-V3 and Qwen3-FP8 are released, and the dense matrices `(in, out)`."""
    rng = np.random.default_rng(seed)
    tensors, dense = common(rng), {}
    for layer in range(LAYERS):
        for name, (in_dim, out_dim) in LINEARS.items():
            stem = f"model.layers.{layer}.{name}"
            weight = (rng.normal(size=(out_dim, in_dim)) * 5).astype(ml_dtypes.float8_e4m3fn)
            counts = [-(-n // size) for n, size in zip((out_dim, in_dim), tile or (1, 1))]
            counts = counts if tile else [out_dim, 1]
            scale = rng.uniform(0.5, 1.5, counts).astype(np.float32) / 100
            tall, wide = tile or (1, in_dim)
            spread = scale[np.arange(out_dim) // tall][:, np.arange(in_dim) // wide]
            dense[stem] = (weight.astype(np.float32) * spread).T
            tensors |= {f"{stem}.weight": weight, f"{stem}.{scales}": scale}
            if scheme == "static":
                tensors[f"{stem}.input_scale"] = np.full(1, 0.25, np.float32)
            if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{stem}.bias"] = (rng.normal(size=out_dim) * 0.1).astype(np.float16)
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": scheme,
        "weight_block_size": tile and list(tile),
        "modules_to_not_convert": ["lm_head"],
    }
    files = {"config.json": json.dumps(CONFIG | {"quantization_config": settings})}
    write_safetensors(folder, tensors, files=files)
    return dense


@pytest.mark.parametrize("tile", [(128, 128), (48, 80), (64, 256), None])
def test_a_released_fp8_folder_is_read_run_and_written_for_others(tmp_path, tile):
    scales = "weight_scale_inv" if tile else "weight_scale"
    dense = fp8_folder(tmp_path / "m", tile, scales=scales)
    call = r"quantize.fp8_dynamic\(" + (f"input_group_size={tile[1]}" if tile else "") + r"\)"
    with pytest.warns(UserWarning, match=rf"\('activation_scheme'\) .*Apply {call} to round"):
        got = load_pretrained(tmp_path / "m")
    for stem, matrix in dense.items():
        _, _, layer, *name = stem.split(".")
        part, kind = name[0].replace("self_", ""), name[1].removesuffix("_proj")
        leaf = got.params["layers"][part][kind]["kernel"]
        assert isinstance(leaf, NarrowFloat)
        np.testing.assert_array_equal(leaf.materialize()[int(layer)], matrix, err_msg=stem)
    stacked = {path: jw.weights.Axes() for path in kernels(got.params)}
    tx = jw.partition(("layers/.*/kernel", jw.quantize.fp8_dynamic()))
    products = jw.apply(tx, got.params, layout=stacked)
    exact = np.asarray(logits(got, got.params))
    near = np.asarray(logits(got, products)) - exact
    assert 0 < np.linalg.norm(near) < 0.2 * np.linalg.norm(exact)
    with pytest.warns(UserWarning, match=rf"Apply {call} for products of 8-bit floats"):
        written = again(tmp_path / "out", got, got.params, form="compressed-tensors")
    for path, kernel in kernels(got.params).items():
        back = kernels(written.params)[path]
        assert isinstance(back, NarrowFloat)
        np.testing.assert_array_equal(back.materialize(), kernel.materialize())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    said = TOKENWISE | {"type": "float"}
    if tile:
        said |= {"strategy": "group", "group_size": tile[1]}
    groups = config["config_groups"].values()  # cut tiles are of another size than whole ones
    assert len(groups) > 0 and all(group["input_activations"] == said for group in groups)
    assert not config.keys() & {"activation_scheme", "weight_block_size", "fmt"}


@pytest.mark.filterwarnings("ignore:.*inputs rounded")
def test_fixed_scales_of_inputs_of_an_fp8_folder_are_written_for_others(tmp_path):
    fp8_folder(tmp_path / "m", None, scales="weight_scale", scheme="static")
    got = load_pretrained(tmp_path / "m")
    again(tmp_path / "out", got, got.params, form="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    fixed = {"type": "float", "strategy": "tensor", "dynamic": False}
    assert group["input_activations"] == TOKENWISE | fixed
    reader = open_safetensors(tmp_path / "out")
    scales = [name for name in reader if name.endswith("input_scale")]
    assert len(scales) == LAYERS * len(LINEARS)
    assert all(reader.read(name).tolist() == [0.25] for name in scales)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_same_of_a_released_fp8_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    fp8_folder(tmp_path / "m", (128, 128))
    options = {"dequantize": True, "weight_block_size": (128, 128)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=transformers.FineGrainedFP8Config(**options)
    ).float()
    got = load_pretrained(tmp_path / "m", dtype=jnp.float32)
    for name, part in (("down_proj", "mlp"), ("k_proj", "attn")):
        ours = got.params["layers"][part][name[:-5]]["kernel"].materialize()
        for layer in range(LAYERS):
            block = theirs.model.layers[layer]
            weight = getattr(block.mlp if part == "mlp" else block.self_attn, name).weight
            expected = weight.detach().numpy().T
            assert np.std(expected) > 0.01
            np.testing.assert_allclose(ours[layer], expected, rtol=2**-8)  # theirs is bfloat16


TOKENWISE = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def test_a_description_of_dynamic_activations_is_told_run_and_written_again(dense_model, tmp_path):
    int8 = jw.quantize.round_to_nearest(bits=8)
    params = rounded(dense_model, rules=[("layers/mlp/.*/kernel", int8)])
    out = tmp_path / "out"
    export_checkpoint(out, params, dense_model.config, form="compressed-tensors")
    config = json.loads((out / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = TOKENWISE
    (out / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"inputs rounded \('input_activations'\) while the"):
        got = load_pretrained(out)
    tx = jw.partition(("layers/mlp/.*/kernel", jw.quantize.int8_dynamic()))
    layout = {"layers/mlp/.*/kernel": jw.weights.Axes()}
    products = jw.apply(tx, got.params, layout=layout)
    assert type(kernels(products)["layers/mlp/up/kernel"]).__name__ == "QuantizedProduct"
    near = np.asarray(logits(got, products)) - np.asarray(logits(got, got.params))
    assert 0 < np.abs(near).max() < 0.05 * np.abs(logits(got, got.params)).max()

    from jaxweights.recipes._write import write_checkpoint

    write_checkpoint(tmp_path / "again", "compressed-tensors", got, got.params)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == config
    with pytest.warns(UserWarning, match="The description is written again"):
        load_pretrained(tmp_path / "again")


def test_inputs_in_nvfp4_are_described_told_and_described_again(dense_model, tmp_path):
    params = rounded(dense_model, rules=[("layers/mlp/.*/kernel", jw.quantize.nvfp4())])
    overall = jnp.arange(100.0, 100 + LAYERS).reshape(LAYERS, 1, 1)

    def rounds(leaf):
        if not isinstance(leaf, Codebook):
            return leaf
        return jw.weights.RoundedInputs.of(leaf, overall, form="nvfp4")

    products = jax.tree.map(rounds, params, is_leaf=is_weight)
    export_checkpoint(tmp_path / "out", products, dense_model.config, form="compressed-tensors")
    reader = open_safetensors(tmp_path / "out")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.up_proj.input_global_scale"
        assert reader.read(name).tolist() == [100.0 + layer]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    said = group["input_activations"]
    assert (said["num_bits"], said["strategy"], said["dynamic"]) == (4, "tensor_group", "local")
    with pytest.warns(UserWarning, match=r"Apply quantize.round_inputs\(form='nvfp4'\) to round"):
        got = load_pretrained(tmp_path / "out")
    near = np.asarray(logits(got, products)) - np.asarray(logits(got, got.params))
    assert 0 < np.abs(near).max() < 0.5 * np.abs(logits(got, got.params)).max()
    with pytest.warns(UserWarning, match="The description is written again"):
        again(tmp_path / "again", got, got.params, form="compressed-tensors")
    one, other = (open_safetensors(tmp_path / name) for name in ("out", "again"))
    assert {*one} == {*other}
    for name in one:
        np.testing.assert_array_equal(one.read(name), other.read(name))
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written == config


def test_static_scales_of_activations_and_of_the_cache_come_back(dense_model, tmp_path):
    params = rounded(dense_model, rules=[("layers/mlp/.*/kernel", jw.quantize.fp8())])
    export_checkpoint(tmp_path / "out", params, dense_model.config, form="compressed-tensors")
    reader = open_safetensors(tmp_path / "out")
    scales = {
        n.replace("weight_scale", "input_scale"): np.ones(1, np.float32)
        for n in reader
        if n.endswith("weight_scale")
    }
    assert len(scales) == 3 * LAYERS
    scales["model.layers.0.self_attn.k_scale"] = np.full(1, 0.5, np.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = config["quantization_config"]
    settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    fixed = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    settings["config_groups"]["group_0"]["input_activations"] = fixed
    files = {"config.json": json.dumps(config)}
    write_safetensors(
        tmp_path / "static", {n: reader.read(n) for n in reader} | scales, files=files
    )
    first = load_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="only the weights are read"):
        second = load_pretrained(tmp_path / "static")
    assert jax.tree.structure(first.params) == jax.tree.structure(second.params)
    for one, other in zip(*map(jax.tree.leaves, (first.params, second.params)), strict=True):
        np.testing.assert_array_equal(one, other)

    from jaxweights.recipes._write import write_checkpoint

    write_checkpoint(tmp_path / "again", "compressed-tensors", second, second.params)
    same_tensors(tmp_path / "again", {n: reader.read(n) for n in reader} | scales)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    # Without the scales nothing is said of them, and a dense checkpoint has none.
    export_checkpoint(
        tmp_path / "bare",
        second.params,
        second.config,
        form="compressed-tensors",
        settings=settings,
    )
    bare = json.loads((tmp_path / "bare" / "config.json").read_text())["quantization_config"]
    assert bare["config_groups"]["group_0"]["input_activations"] is None
    assert bare["kv_cache_scheme"] is None
    write_checkpoint(tmp_path / "dense", "safetensors", second, second.params)
    assert not any(n.endswith("_scale") for n in open_safetensors(tmp_path / "dense"))
