"""Folders as GPTQ, AWQ and compressed-tensors write them: loaded, changed, saved, compared."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, open_safetensors, write_safetensors
from jaxweights.models import export_checkpoint, load_pretrained
from jaxweights.weights import (
    Codebook,
    LowRank,
    Masked,
    NarrowFloat,
    Quantized,
    is_weight,
    materialize,
)
from tests.checkpoint.exchange._oracles import awq_words, stream_along, stream_down

HIDDEN, INNER, VOCAB, GROUP, LAYERS = 128, 256, 96, 128, 2
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "transformers_version": "4.41.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
# As in the released Qwen2.5-0.5B-Instruct-GPTQ-Int4.
GPTQ = {
    "batch_size": 1,
    "bits": 4,
    "block_name_to_quantize": None,
    "cache_block_outputs": True,
    "damp_percent": 0.01,
    "dataset": None,
    "desc_act": False,
    "exllama_config": {"version": 1},
    "group_size": GROUP,
    "max_input_length": None,
    "model_seqlen": None,
    "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": None,
    "pad_token_id": None,
    "quant_method": "gptq",
    "sym": True,
    "tokenizer": None,
    "true_sequential": True,
    "use_cuda_fp16": False,
    "use_exllama": True,
}


def linear(rng, in_dim, out_dim, *, symmetric):
    codes = rng.integers(0, 16, (in_dim, out_dim))
    scales = (rng.uniform(0.5, 1.5, (in_dim // GROUP, out_dim)) / 50).astype(np.float16)
    zero = np.full(scales.shape, 8) if symmetric else rng.integers(1, 16, scales.shape)
    return codes, scales, zero


def common(rng):
    half = lambda *shape: (rng.normal(size=shape) * 0.1).astype(np.float16)  # noqa: E731
    tensors = {"model.embed_tokens.weight": half(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = 1 + half(HIDDEN)
    return tensors | {"model.norm.weight": 1 + half(HIDDEN)}


def released(method, *, symmetric=True):
    """Tensors of a released folder, and the dense matrices `(in, out)` that they stand for."""
    rng = np.random.default_rng(0)
    tensors, dense = common(rng), {}
    for layer in range(LAYERS):
        for name, (in_dim, out_dim) in LINEARS.items():
            stem = f"model.layers.{layer}.{name}"
            codes, scales, zero = linear(rng, in_dim, out_dim, symmetric=symmetric)
            rows = np.arange(in_dim) // GROUP
            dense[stem] = (codes - zero[rows]).astype(np.float32) * scales[rows].astype(np.float32)
            if method == "gptq":
                tensors[f"{stem}.qweight"] = stream_down(codes, 4)
                tensors[f"{stem}.qzeros"] = stream_along(zero - 1, 4)
                tensors[f"{stem}.g_idx"] = rows.astype(np.int32)
            else:
                tensors[f"{stem}.qweight"] = awq_words(codes)
                tensors[f"{stem}.qzeros"] = awq_words(zero)
            tensors[f"{stem}.scales"] = scales
            # Only q, k and v have biases; AutoGPTQ writes zeros for the others.
            real = name[-6:] in ("q_proj", "k_proj", "v_proj")
            if real or method == "gptq":
                bias = rng.normal(size=out_dim) * 0.1 if real else np.zeros(out_dim)
                tensors[f"{stem}.bias"] = bias.astype(np.float16)
    return tensors, dense


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "model"
    tensors, dense = released("gptq")
    files = {"config.json": json.dumps(CONFIG | {"quantization_config": GPTQ})}
    write_safetensors(folder, tensors, files=files)
    return folder, tensors, dense


def same_tensors(folder, tensors):
    reader = open_safetensors(folder)
    assert set(reader) == set(tensors)
    for name, array in tensors.items():
        got = reader.read(name)
        assert got.dtype == array.dtype and got.shape == array.shape, name
        assert got.tobytes() == array.tobytes(), name


def kernels(params):
    return {p: x for p, x in jw.core.flatten(params)[0].items() if p.endswith("kernel")}


def logits(pretrained, params):
    tokens = jnp.arange(10).reshape(2, 5)
    run = jw.lift(lambda params: pretrained.model.apply({"params": params}, tokens))
    return jax.jit(run)(params)


def again(folder, pretrained, params, **settings):
    from jaxweights.recipes._write import write_checkpoint

    write_checkpoint(folder, settings.pop("form"), pretrained, params, **settings)
    return load_pretrained(folder)


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
    flat, treedef = jw.core.flatten(loaded.params)
    again(tmp_path / "yes", loaded, jw.core.unflatten(treedef, flat | back), form="gptq")
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


def rounded(pretrained, **settings):
    tokens = jnp.zeros((1, 4), jnp.int32)
    run = lambda p, t: pretrained.model.apply({"params": p}, t)  # noqa: E731
    layout = jw.infer_layout(run, pretrained.params, tokens)
    rules = settings.pop("rules", None) or [
        ("layers/.*/kernel", jw.quantize.round_to_nearest(**settings))
    ]
    return jw.apply(jw.partition(*rules, (".*", jw.identity())), pretrained.params, layout=layout)


@pytest.fixture(scope="module")
def dense_model(gptq_folder):
    return load_pretrained(gptq_folder[0], dequantize=True, dtype=jnp.float32)


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


FLOATS = {
    "nf4": (jw.quantize.nf4(), "bitsandbytes"),
    "nf4 with quantized scales": (jw.quantize.nf4(double_quantization=True), "bitsandbytes"),
    "fp4": (jw.quantize.fp4(group_size=128), "bitsandbytes"),
    "fp8": (jw.quantize.fp8(), "compressed-tensors"),
    "fp8 in tiles": (jw.quantize.fp8(group_size=(64, 64)), "compressed-tensors"),
    "mxfp4": (jw.quantize.mx(element="e2m1"), "compressed-tensors"),
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
