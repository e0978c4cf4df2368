"""Configurations run as they stand: layers, gradients, filters, documents, adapters."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.recipes.mergekit import explain_merge, run_merge
from tests.recipes.mergekit._checkpoints import CONFIG, arrays, read, write_config, write_models

Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def _linear(*entries, **more):
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in entries]
    return {"merge_method": "linear", "models": models, **more}


def test_gradients_run_from_the_first_layer_to_the_head(folder):
    config = _linear(("ft1", [0.0, 1.0]), ("ft2", [1.0, 0.0]))
    out = folder / "gradient"
    run_merge(write_config(folder, config, "gradient.yml"), out)
    merged, first, second = read(out), arrays("ft1"), arrays("ft2")
    for name in (EMBED, Q0):
        np.testing.assert_array_equal(merged[name], second[name])
    for name in (Q1, NORM, HEAD):
        np.testing.assert_array_equal(merged[name], first[name])
    explained = explain_merge(folder / "gradient.yml", compat="mergekit")
    depth = {tensor.job.name: tensor.depth for tensor in explained.tensors}
    assert depth[HEAD] == depth[NORM] == depth[EMBED] == 0.0


def test_the_first_filter_that_fits_wins_and_sources_come_before_globals(folder):
    config = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {
                "model": "ft1",
                "parameters": {
                    "weight": [
                        {"filter": "q_proj", "value": 0.25},
                        {"filter": "self_attn", "value": 0.5},
                    ]
                },
            }
        ],
        "parameters": {"weight": 0.75},
    }
    explained = explain_merge(write_config(folder, config, "filters.yml"))
    weight = {t.job.name: t.parameters["weight"]["ft1"] for t in explained.tensors}
    assert weight[Q0] == 0.25
    assert weight[Q0.replace("q_proj", "o_proj")] == 0.5
    assert weight[HEAD] == 0.75


def test_slices_stack_layers_and_the_config_counts_them(folder):
    config = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "ft1", "layer_range": [0, 2]}]},
            {"sources": [{"model": "ft2", "layer_range": [0, 2]}]},
        ],
        "dtype": "bfloat16",
    }
    out = folder / "stacked"
    run_merge(write_config(folder, config, "stacked.yml"), out)
    merged = read(out)
    second = arrays("ft2")
    name = Q1.replace("layers.1", "layers.3")
    np.testing.assert_array_equal(merged[name], second[Q1].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(merged[EMBED], arrays("ft1")[EMBED].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(merged[HEAD], second[HEAD].astype(ml_dtypes.bfloat16))
    written = open_checkpoint(out).config
    assert written["num_hidden_layers"] == 4
    assert written["torch_dtype"] == "bfloat16"


def test_later_documents_use_what_earlier_ones_make(folder):
    documents = [
        {"name": "math", **_linear(("ft1", 1.0), ("ft2", 1.0))},
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "math", "parameters": {"weight": 0.5}}],
        },
    ]
    out = folder / "documents"
    run_merge(write_config(folder, documents, "documents.yml"), out)
    for name, got in read(out).items():
        mean = (arrays("ft1")[name] + arrays("ft2")[name]) / 2
        want = arrays("base")[name] + 0.5 * (mean - arrays("base")[name])
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-7)


@pytest.mark.parametrize("scaling, scale", [({}, 8 / 4), ({"use_rslora": True}, 8 / 2)])
def test_an_adapter_behind_a_plus_is_applied_first(folder, scaling, scale):
    draws = np.random.default_rng(0)
    down = draws.normal(size=(4, 48)).astype(np.float32)
    up = draws.normal(size=(48, 4)).astype(np.float32)
    stem = f"base_model.model.{Q0.removesuffix('.weight')}"
    adapter = folder / f"adapter{scale}"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **scaling}
    write_safetensors(
        adapter,
        {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up},
        files={"adapter_config.json": json.dumps(config)},
    )
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    out = folder / f"adapted{scale}"
    run_merge(write_config(folder, _linear((f"base+{adapter.name}", 1.0)), "adapted.yml"), out)
    merged = read(out)
    want = arrays("base")[Q0] + scale * (up @ down)
    np.testing.assert_allclose(merged[Q0], want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(merged[Q1], arrays("base")[Q1])


def test_leaves_that_only_one_model_has_are_taken_from_it_when_asked(folder):
    tower = {**arrays("ft1"), "vision.proj.weight": np.ones((3, 3), np.float32)}
    write_safetensors(folder / "tower", tower, files={"config.json": json.dumps(CONFIG)})
    config = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("tower", "ft2")],
    }
    path = write_config(folder, config, "tower.yml")
    with pytest.raises(ValueError, match=r"tower has \['vision.proj.weight'\], which base lacks"):
        run_merge(path, folder / "towers")
    run_merge(path, folder / "towers", missing="take")
    merged = read(folder / "towers")
    np.testing.assert_array_equal(merged["vision.proj.weight"], np.ones((3, 3)))


def test_the_result_says_where_it_came_from(folder):
    path = write_config(folder, _linear(("ft1", 1.0), ("ft2", 1.0)), "origin.yml")
    done = run_merge(path, folder / "origin")
    said = json.loads((folder / "origin" / "jaxweights-provenance.json").read_text())
    assert said["recipe"]["merge"] == path.read_text()
    assert said["outputs"] == done.checksums
    assert set(said["inputs"]) == {f"{m}/{name}" for m in ("ft1", "ft2") for name in arrays("ft1")}
    assert said["versions"]["jaxweights"]


@pytest.mark.parametrize("memory", [None, 600 << 20])
def test_memory_and_shards_change_no_bit(folder, memory):
    config = {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [
            {"model": m, "parameters": {"weight": 1, "density": 0.4}} for m in ("ft1", "ft2")
        ],
    }
    path = write_config(folder, config, "same.yml")
    first = run_merge(path, folder / f"same{memory}")
    from jaxweights.stream._memory import resident_bytes

    limit = None if memory is None else memory + resident_bytes()
    second = run_merge(path, folder / f"cut{memory}", memory=limit, max_shard_bytes=40_000)
    assert first.checksums == second.checksums
    assert len(list((folder / f"cut{memory}").glob("*.safetensors"))) > 1


def test_tensors_that_some_models_lack_are_averaged_over_those_that_have_them(folder):
    for name, seed in (("one", 1), ("two", 2)):
        extra = np.random.default_rng(seed).normal(size=(3, 3)).astype(np.float32)
        tensors = {**arrays("ft1"), "extra.proj.weight": extra}
        write_safetensors(folder / name, tensors, files={"config.json": json.dumps(CONFIG)})
    config = _linear(("ft2", 1.0), ("one", 1.0), ("two", 3.0), dtype="bfloat16")
    run_merge(write_config(folder, config, "extra.yml"), folder / "extra", missing="take")
    one, two = (open_checkpoint(folder / n).read("extra.proj.weight") for n in ("one", "two"))
    got = read(folder / "extra")["extra.proj.weight"]
    # One rounding to 8 bits of mantissa.
    np.testing.assert_allclose(got.astype(np.float32), (one + 3 * two) / 4, rtol=2**-8)
