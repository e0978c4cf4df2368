"""Models of several towers, each merged as its own part of the configuration says."""

import json

import numpy as np
import pytest

from jaxweights.checkpoint import write_safetensors
from jaxweights.recipes.mergekit import explain_merge, run_merge
from jaxweights.recipes.mergekit._towers import tensors_by_module
from tests.recipes.mergekit._checkpoints import read, write_config

CONFIG = {
    "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
    "vision_config": {"depth": 2},
}
VALUES = {"base": 0.0, "one": 1.0, "two": 3.0}


def _names():
    text = [f"model.language_model.layers.{i}.up.weight" for i in range(3)]
    vision = [f"model.visual.blocks.{i}.up.weight" for i in range(2)]
    return ["model.language_model.embed_tokens.weight", *text, "lm_head.weight", *vision,
            "model.visual.merger.mlp.0.weight"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for model, value in VALUES.items():
        tensors = {}
        for i, name in enumerate(_names()):
            tensors[name] = np.full((2, 3), 10 * i + value, np.float32)
        write_safetensors(tmp_path / model, tensors, files={"config.json": json.dumps(CONFIG)})
    return tmp_path


def _linear(one, two):
    return [{"model": m, "parameters": {"weight": w}} for m, w in (("one", one), ("two", two))]


def _merged(folder, modules, **document):
    config = {"merge_method": "linear", "modules": modules} | document
    run_merge(write_config(folder, config), folder / "out", overwrite=True)
    out = read(folder / "out")
    places = {name: i for i, name in enumerate(_names())}
    above = {name: float(x[0, 0]) - 10 * places[name] for name, x in out.items() if name in places}
    return out, above, json.loads((folder / "out" / "config.json").read_text())


def test_each_tower_is_merged_with_its_own_models_and_parameters(folder):
    modules = {
        "text_decoder": {"models": _linear(1, 0)},
        "vision_tower": {"models": _linear(0, 1)},
        "multi_modal_projector": {"models": _linear(1, 1), "parameters": {"normalize": False}},
    }
    out, above, _ = _merged(folder, modules)
    assert len(out) == len(_names())
    for name, value in above.items():
        if "merger" in name:
            assert out[name][0, 0] == 2 * 10 * (len(_names()) - 1) + 4
        else:
            assert value == (3.0 if "visual" in name else 1.0), name


def test_a_tower_that_is_not_named_is_taken_over(folder):
    modules = {"text_decoder": {"models": _linear(1, 1)}}
    out, above, _ = _merged(folder, modules)
    assert out.keys() == set(_names())
    for name, value in above.items():
        assert value == (1.0 if "visual" in name else 2.0), name
    explained = explain_merge(folder / "merge.yml")
    assert {t.method for t in explained.tensors if "visual" in t.job.name} == {"copy"}
    assert any("modules that are not named" in text for text in explained.differs)


def test_layers_of_one_tower_are_stacked_and_counted(folder):
    def part(start, stop):
        return {"sources": [{"model": "one", "layer_range": [start, stop]}]}

    modules = {
        "text_decoder": {"slices": [part(0, 2), part(1, 3)]},
        "vision_tower": {"models": [{"model": "two"}]},
        "multi_modal_projector": {"models": [{"model": "two"}]},
    }
    out, _, config = _merged(folder, modules, merge_method="passthrough")
    first = [out[f"model.language_model.layers.{i}.up.weight"][0, 0] for i in range(4)]
    assert first == [11.0, 21.0, 21.0, 31.0]
    assert config["text_config"] == {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"]}
    assert config["vision_config"] == {"depth": 2}
    assert out["model.visual.blocks.1.up.weight"][0, 0] == 63.0


def test_a_module_that_has_no_tensors_is_refused_with_the_names_that_there_are(folder):
    modules = {"txt_decoder": {"models": _linear(1, 1)}}
    path = write_config(folder, {"merge_method": "linear", "modules": modules})
    with pytest.raises(
        ValueError, match=r"merge.yml:4: modules.txt_decoder: has no tensors; .*'lm_"
    ):
        run_merge(path, folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "modules, name, module",
    [
        (["default"], "model.layers.0.up", "default"),
        (["encoder", "decoder", "shared"], "lm_head.weight", "shared"),
        (["encoder", "decoder", "shared"], "decoder.block.0.layer.0.q", "decoder"),
        (["encoder", "decoder"], "model.encoder.layers.0.q", "encoder"),
        (["text_decoder", "vision_tower"], "language_model.model.layers.0.q", "text_decoder"),
        (["text_decoder", "vision_tower"], "vision_tower.vision_model.encoder.layers.0.q",
         "vision_tower"),
        (["text_decoder", "vision_model"], "vision_model.model.layers.0.q", "vision_model"),
        (["text_decoder", "vision_tower"], "multi_modal_projector.linear.weight", None),
        (["vision_tower", "multi_modal_projector"], "visual.merger.ln_q.weight",
         "multi_modal_projector"),
        (["vision_tower", "multi_modal_projector"], "model.layers.0.up", None),
        (["audio", "audio.proj"], "audio.proj.weight", "audio.proj"),
    ],
)  # fmt: skip
def test_names_tell_the_module(modules, name, module):
    assert tensors_by_module([name], modules) == {name: module}
