"""Folders as GPTQ, AWQ and compressed-tensors write them: loaded, changed, saved, compared."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.models import export_checkpoint, load_pretrained
from jaxweights.weights import (
    LowRank,
    Masked,
    Quantized,
    is_weight,
    materialize,
)
from tests.models._quantized_checkpoints import (
    CONFIG,
    GPTQ,
    GROUP,
    HIDDEN,
    INNER,
    LAYERS,
    again,
    kernels,
    logits,
    released,
    rounded,
    same_tensors,
)


def test_a_released_gptq_folder_is_loaded_as_its_integers(gptq_folder):
    folder, _, dense = gptq_folder
    loaded = load_pretrained(folder)
    for path, kernel in kernels(loaded.params).items():
        assert isinstance(kernel, Quantized) and kernel.zero_point is None, path
        assert kernel.bits == 4 and kernel.group_index is None and kernel.stack_shape == (LAYERS,)
    up = loaded.params["layers"]["mlp"]["up"]["kernel"].astype(np.float32).materialize()
    np.testing.assert_array_equal(up[1], dense["model.layers.1.mlp.up_proj"])
    assert loaded.params["embed"]["embedding"].dtype == jnp.float16
    assert "head" not in loaded.params and loaded.config.tie_embeddings


def test_it_runs_as_the_dense_model_does(gptq_folder):
    folder, _, _ = gptq_folder
    loaded = load_pretrained(folder, dtype=jnp.float32)
    dense = load_pretrained(folder, dtype=jnp.float32, dequantize=True)
    assert not any(isinstance(k, Quantized) for k in kernels(dense.params).values())
    want = dense.model.apply({"params": dense.params}, jnp.arange(10).reshape(2, 5))
    assert float(jnp.std(want)) > 0.1
    # The dense checkpoint rounds products of integers and scales to float16 first.
    np.testing.assert_allclose(logits(loaded, loaded.params), want, rtol=0, atol=2e-2)


def test_it_is_saved_byte_for_byte(gptq_folder, tmp_path):
    folder, tensors, _ = gptq_folder
    loaded = load_pretrained(folder)
    again(tmp_path / "copy", loaded, loaded.params, form="gptq")
    same_tensors(tmp_path / "copy", tensors)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == CONFIG
    added = {"checkpoint_format": "gptq", "lm_head": False}
    assert settings == GPTQ | added


def test_it_is_continued_with_factors_and_saved_on_its_own_grid(gptq_folder, tmp_path):
    folder, tensors, _ = gptq_folder
    loaded = load_pretrained(folder, dtype=jnp.float32)
    layout = jw.infer_layout(
        lambda p: loaded.model.apply({"params": p}, jnp.zeros((1, 4), jnp.int32)),
        materialize(loaded.params),
    )
    tx = jw.partition((".*/mlp/.*/kernel", jw.adapt.lora(rank=2)), (".*", jw.identity()))
    adapted = jw.apply(tx, loaded.params, layout=layout, key=jax.random.key(0))
    assert isinstance(adapted["layers"]["mlp"]["up"]["kernel"], LowRank)
    np.testing.assert_allclose(
        logits(loaded, adapted), logits(loaded, loaded.params), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"up_proj.weight' is a LowRank, and gptq holds only"):
        again(tmp_path / "no", loaded, adapted, form="gptq")
    assert not (tmp_path / "no").exists()
    # Rounding the dense weights to the scales that they came from finds every code again.
    back = {
        path: jw.quantize.requantize(kernel, kernel.materialize()).weight
        for path, kernel in kernels(loaded.params).items()
    }
    flat, structure = jw.core.flatten(loaded.params)
    again(tmp_path / "yes", loaded, jw.core.unflatten(structure, flat | back), form="gptq")
    same_tensors(tmp_path / "yes", tensors | float32_biases(tensors))


def float32_biases(tensors):
    """The dense tensors, which were loaded in float32."""
    wide = {n: t for n, t in tensors.items() if n.endswith((".bias", "norm.weight", "s.weight"))}
    carried = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
    return {n: t.astype(np.float32) for n, t in wide.items() if not n.endswith(carried)}


def test_an_awq_folder_is_loaded_and_saved_byte_for_byte(tmp_path):
    tensors, dense = released("awq", symmetric=False)
    awq = {"bits": 4, "group_size": GROUP, "modules_to_not_convert": None, "quant_method": "awq"}
    awq |= {"version": "gemm", "zero_point": True}
    files = {"config.json": json.dumps(CONFIG | {"quantization_config": awq})}
    write_safetensors(tmp_path / "awq", tensors, files=files)
    loaded = load_pretrained(tmp_path / "awq")
    down = loaded.params["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(
        down.astype(np.float32).materialize()[0], dense["model.layers.0.mlp.down_proj"]
    )
    again(tmp_path / "copy", loaded, loaded.params, form="awq")
    same_tensors(tmp_path / "copy", tensors)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config == CONFIG | {"quantization_config": awq}


@pytest.mark.parametrize("form", ["gptq_v2", "awq", "compressed-tensors"])
def test_one_format_becomes_another_without_changing_a_number(gptq_folder, tmp_path, form):
    folder, _, _ = gptq_folder
    loaded = load_pretrained(folder)
    other = again(tmp_path / "other", loaded, loaded.params, form=form)
    assert kernels(other.params).keys() == kernels(loaded.params).keys()
    for path, kernel in kernels(other.params).items():
        np.testing.assert_array_equal(
            kernel.materialize(), kernels(loaded.params)[path].materialize()
        )
    back = again(tmp_path / "back", other, other.params, form="gptq")
    for path, kernel in kernels(back.params).items():
        np.testing.assert_array_equal(
            kernel.materialize(), kernels(loaded.params)[path].materialize()
        )


def test_a_checkpoint_shows_quantized_modules_as_their_weights(gptq_folder):
    folder, _, dense = gptq_folder
    checkpoint = open_checkpoint(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    assert name in checkpoint.names and checkpoint.shape(name) == (HIDDEN, INNER)
    assert not any("qweight" in n or "g_idx" in n for n in checkpoint.names)
    assert checkpoint.read(name).dtype == checkpoint.dtype(name) == np.float16
    np.testing.assert_array_equal(
        checkpoint.read(name), dense["model.layers.0.mlp.down_proj"].T.astype(np.float16)
    )
    assert "quantization_config" not in checkpoint.config
    assert "quantization_config" not in checkpoint.files["config.json"]
    assert checkpoint.quantization == GPTQ
    assert checkpoint.fingerprint() != checkpoint.fingerprint(sampled=True)


def test_dense_safetensors_of_it_say_nothing_of_quantization(gptq_folder, tmp_path):
    folder, _, _ = gptq_folder
    loaded = load_pretrained(folder)
    dense = again(tmp_path / "dense", loaded, loaded.params, form="safetensors")
    assert not any(isinstance(k, Quantized) for k in kernels(dense.params).values())
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config == CONFIG


UNREAD = {
    "method": ({"quant_method": "aqlm"}, "quant_method='aqlm' cannot be read"),
    "floats": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' of fp8 cannot be read"),
    "tiles": ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size=[128] of"),
    "bits": (GPTQ | {"bits": 5}, "bits=5 cannot be read. Known are 2, 3, 4, 8"),
    "text": (GPTQ | {"bits": "4"}, "bits='4' cannot be read"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' of GPTQ"),
    "list": (GPTQ | {"checkpoint_format": ["gptq"]}, "checkpoint_format=['gptq'] of GPTQ"),
    "gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv' of AWQ"),
    "format": (
        {
            "quant_method": "compressed-tensors",
            "format": "nonsense",
            "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        },
        "the format 'nonsense' of compressed-tensors",
    ),
    "pattern": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 4}}},
        },
        "the target 're:(' of 'config_groups' is no regular expression",
    ),
    "targets": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"targets": 1, "weights": {"num_bits": 4}}},
        },
        "no target of 'config_groups' names the quantized module 'a'",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_cannot_be_read_is_said_by_name(tmp_path, case):
    settings, words = UNREAD[case]
    files = {"config.json": json.dumps(CONFIG | {"quantization_config": settings})}
    write_safetensors(tmp_path / "m", {"a.weight_scale": np.ones((1, 1), np.float16)}, files=files)
    with pytest.raises(ValueError, match=r"the quantization_config of its config.json") as error:
        load_pretrained(tmp_path / "m")
    assert words in str(error.value)


def test_a_damaged_module_is_named(gptq_folder, tmp_path):
    _, tensors, _ = gptq_folder
    name = "model.layers.1.mlp.up_proj.scales"
    files = {"config.json": json.dumps(CONFIG | {"quantization_config": GPTQ})}
    write_safetensors(tmp_path / "m", tensors | {name: tensors[name][:, :8]}, files=files)
    with pytest.raises(
        ValueError, match=r"'model.layers.1.mlp.up_proj.weight': 'scales' is float16 \(1, 8\)"
    ):
        load_pretrained(tmp_path / "m")


def test_a_module_without_its_integers_is_named(tmp_path):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"a": group}}
    files = {
        "config.json": json.dumps({"quantization_config": settings | {"format": "int-quantized"}})
    }
    write_safetensors(tmp_path / "m", {"a.weight_scale": np.ones((1, 1), np.float16)}, files=files)
    checkpoint = open_checkpoint(tmp_path / "m")
    for look in (checkpoint.shape, checkpoint.read):
        with pytest.raises(
            ValueError, match=r"'a.weight': 'weight' is missing. The file is damaged"
        ):
            look("a.weight")


def test_layers_with_scales_of_two_dtypes_become_dense(gptq_folder, tmp_path):
    _, tensors, dense = gptq_folder
    stem = "model.layers.1.mlp.up_proj"
    changed = {f"{stem}.scales": tensors[f"{stem}.scales"].astype(np.float32)}
    changed[f"{stem}.qzeros"] = tensors[f"{stem}.qzeros"] - 1  # another form than layer 0's
    files = {"config.json": json.dumps(CONFIG | {"quantization_config": GPTQ})}
    write_safetensors(tmp_path / "m", tensors | changed, files=files)
    kernel = load_pretrained(tmp_path / "m").params["layers"]["mlp"]["up"]["kernel"]
    assert not is_weight(kernel) and kernel.dtype == np.float32
    want = dense["model.layers.0.mlp.up_proj"].astype(np.float16)
    np.testing.assert_array_equal(kernel[0], want)


def test_all_that_does_not_fit_is_listed_and_nothing_is_written(dense_model, tmp_path):
    rtn = jw.quantize.round_to_nearest
    params = rounded(
        dense_model,
        rules=[
            ("layers/mlp/up/kernel", rtn(bits=6, group_size=32)),
            ("layers/.*/kernel", rtn(bits=4, group_size=64)),
            ("embed/embedding", rtn(bits=8)),
        ],
    )
    with pytest.raises(ValueError) as error:
        export_checkpoint(tmp_path / "out", params, dense_model.config, form="gptq", target="vllm")
    lines = str(error.value).splitlines()
    assert all(line.startswith("checkpoint.write_quantized: ") for line in lines)
    assert sum("up_proj.weight' has 6 bits, but GPTQ has" in line for line in lines) == LAYERS
    assert sum("up_proj.weight' has 6 bits, but Marlin" in line for line in lines) == LAYERS
    assert any("'model.embed_tokens.weight' is an embedding" in line for line in lines)
    assert any("gptq has one grid for all modules, but these differ" in line for line in lines)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no tensor is quantized, so there is nothing that awq"):
        export_checkpoint(tmp_path / "out", dense_model.params, dense_model.config, form="awq")


def test_mixed_grids_go_into_config_groups_and_come_back(dense_model, tmp_path):
    rtn = jw.quantize.round_to_nearest
    params = rounded(
        dense_model,
        rules=[
            ("layers/mlp/up/kernel", rtn(bits=6, group_size=32)),
            ("layers/mlp/down/kernel", rtn(bits=8)),
            ("layers/attn/[qk]/kernel", rtn(bits=4, group_size=64)),
        ],
    )
    export_checkpoint(tmp_path / "ct", params, dense_model.config, form="compressed-tensors")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert "model.layers.0.mlp.gate_proj" in config["ignore"]
    loaded = load_pretrained(tmp_path / "ct")
    assert loaded.params["layers"]["mlp"]["up"]["kernel"].bits == 6
    for path, kernel in kernels(params).items():
        got = kernels(loaded.params)[path]
        assert isinstance(got, Quantized) == isinstance(kernel, Quantized)
        np.testing.assert_array_equal(materialize({"k": got})["k"], materialize({"k": kernel})["k"])


def test_masked_weights_are_written_with_the_code_of_zero(dense_model, tmp_path):
    params = rounded(dense_model, bits=4, group_size=128)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    mask = np.random.default_rng(0).random(kernel.shape) < 0.5
    params["layers"]["mlp"]["up"]["kernel"] = Masked(kernel, jnp.asarray(mask))
    export_checkpoint(tmp_path / "out", params, dense_model.config, form="compressed-tensors")
    got = load_pretrained(tmp_path / "out").params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(got.materialize(), np.where(mask, kernel.materialize(), 0))
