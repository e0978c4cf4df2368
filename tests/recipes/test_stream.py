"""A recipe that runs tensor by tensor gives what it gives in memory."""

import json

import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.models import load_pretrained
from jaxweights.recipes import RecipeError, _stream, parse_recipe, run_recipe
from tests._tiny_models import BERT, LLAMA, write_tiny

RECIPE = """\
stream: {stream}
model: {{path: "{model}"}}
transforms:
{steps}
output: {{directory: "{output}", formats: [safetensors]{more}}}
"""
STEPS = {
    "rounding": """\
  - method: quantize.round_to_nearest
    except: .*/o/kernel
    bits: 4
    group_size: 16
""",
    "pruned, rounded": """\
  - method: sparsify.magnitude
    match: layers/mlp/.*/kernel
    sparsity: 0.5
  - method: quantize.round_to_nearest
    bits: 8
""",
    "a table": """\
  - method: quantize.round_to_nearest
    match: [embed/.*, layers/attn/k/kernel]
    bits: 8
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        write_tiny(folder / f"llama{seed}", LLAMA, seed=seed)
    write_tiny(folder / "bert", BERT)
    return folder


def _run(model, output, steps, stream, more="", extra=""):
    text = RECIPE.format(stream=stream, model=model, steps=steps, output=output, more=more)
    return run_recipe(parse_recipe(text + extra, name="r.yaml"))


def _same_tensors(first, second):
    one, two = (open_checkpoint(place / "safetensors") for place in (first, second))
    assert set(one.names) == set(two.names) and len(one.names) > 10
    for name in one.names:
        assert one.dtype(name) == two.dtype(name), name
        np.testing.assert_array_equal(one.read(name), two.read(name), err_msg=name)


@pytest.mark.parametrize(
    "model, steps", [("bert", "rounding"), ("llama0", "pruned, rounded"), ("llama0", "a table")]
)
def test_weights_and_report_are_those_of_memory(folder, tmp_path, model, steps):
    steps = STEPS[steps]
    streamed = _run(folder / model, tmp_path / "streamed", steps, "always")
    held = _run(folder / model, tmp_path / "held", steps, "never")
    _same_tensors(tmp_path / "streamed", tmp_path / "held")
    assert streamed.params is None and held.params is not None
    assert any(leaf.changed for leaf in held.leaves)
    for ours, theirs in zip(streamed.leaves, held.leaves, strict=True):
        for field in ("path", "shape", "parameters", "bytes_before", "bytes_after", "changed",
                      "representation", "why"):  # fmt: skip
            assert getattr(ours, field) == getattr(theirs, field), (theirs.path, field)
        np.testing.assert_allclose(ours.errors, theirs.errors, rtol=1e-5, err_msg=ours.path)
        np.testing.assert_allclose(ours.zeros, theirs.zeros, rtol=1e-5)
    one, two = (
        json.loads((tmp_path / p / "result.json").read_text()) for p in ("streamed", "held")
    )
    assert one.keys() == two.keys()
    for key in ("before", "after"):
        assert one["size"][key] == two["size"][key]
    assert load_pretrained(tmp_path / "streamed" / "safetensors").config == held_config(
        folder, model
    )
    pages = [(tmp_path / p / "report.html").read_text() for p in ("streamed", "held")]
    assert pages[0].count("<svg") == pages[1].count("<svg") > 0


def held_config(folder, model):
    return load_pretrained(folder / model).config


@pytest.mark.parametrize("method", ["mean", "slerp\n    t: 0.3", "ram_plus"])
def test_models_are_merged_tensor_by_tensor(folder, tmp_path, method):
    names = ["llama1"] if "slerp" in method else ["llama1", "llama2"]
    paths = "".join(f'  - path: "{folder / name}"\n' for name in names)
    for stream in ("always", "never"):
        steps = f"  - method: merge.{method}\n"
        _run(folder / "llama0", tmp_path / stream, steps, stream, ", report: false",
             f"models:\n{paths}")  # fmt: skip
    one, two = (open_checkpoint(tmp_path / s / "safetensors") for s in ("always", "never"))
    for name in one.names:
        np.testing.assert_allclose(one.read(name), two.read(name), rtol=0, atol=1e-6, err_msg=name)
        if "slerp" not in method:
            np.testing.assert_array_equal(one.read(name), two.read(name), err_msg=name)


def test_auto_streams_what_would_fill_the_memory(folder, tmp_path, monkeypatch):
    steps = STEPS["rounding"]
    assert _run(folder / "llama0", tmp_path / "small", steps, "auto").params is not None
    monkeypatch.setattr(_stream, "free_memory", lambda: 1000.0)
    assert _run(folder / "llama0", tmp_path / "large", steps, "auto").params is None
    _same_tensors(tmp_path / "small", tmp_path / "large")


def test_auto_loads_what_cannot_be_told_tensor_by_tensor(folder, tmp_path, monkeypatch):
    tied = open_checkpoint(folder / "llama0")
    tensors = {name: tied.read(name) for name in tied.names}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    write_safetensors(tmp_path / "headed", tensors | head, files=dict(tied.files))
    monkeypatch.setattr(_stream, "free_memory", lambda: 1)
    run = _run(tmp_path / "headed", tmp_path / "out", STEPS["rounding"], "auto")
    assert run.params is not None
    with pytest.raises(RecipeError, match=r"r.yaml:1: stream: always, but .*'lm_head.weight'"):
        _run(tmp_path / "headed", tmp_path / "no", STEPS["rounding"], "always")
    models = f'models: [{{path: "{tmp_path}/headed"}}]\n'
    merge = "  - method: merge.mean\n"
    merged = _run(folder / "llama0", tmp_path / "merged", merge, "auto", extra=models)
    assert merged.params is not None


def test_auto_counts_the_models_that_are_merged(folder, tmp_path, monkeypatch):
    size = _stream.bytes_of(folder / "llama0")
    monkeypatch.setattr(_stream, "free_memory", lambda: 3.5 * size)
    merge, models = "  - method: merge.mean\n", f'models: [{{path: "{folder}/llama1"}}]\n'
    assert _run(folder / "llama0", tmp_path / "one", STEPS["rounding"], "auto").params is not None
    assert _run(folder / "llama0", tmp_path / "two", merge, "auto", extra=models).params is None


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("[safetensors]", "[orbax]", "r.yaml:1: stream: always, but only `formats: .safetensors.`"),
        (
            "sparsify.magnitude",
            "sparsify.magnitude\n    group: global",
            r"magnitude \(line 4\) looks",
        ),
        (
            "output:",
            "evaluate: {perplexity: {text: moby-dick}}\noutput:",
            "`evaluate` runs the model",
        ),
        ("always", "sometimes", "r.yaml:1: .*always"),
    ],
)
def test_what_cannot_be_streamed_is_said(folder, tmp_path, old, new, words):
    text = RECIPE.format(stream="always", model=folder / "llama0", steps=STEPS["pruned, rounded"],
                         output=tmp_path / "out", more="")  # fmt: skip
    with pytest.raises(RecipeError, match=words):
        run_recipe(parse_recipe(text.replace(old, new), name="r.yaml"))
    assert not (tmp_path / "out").exists()


def test_nan_is_named_and_nothing_is_written(folder, tmp_path):
    source = open_checkpoint(folder / "llama0")
    tensors = {name: np.array(x) for name, x in source.items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    write_safetensors(tmp_path / "broken", tensors, files=dict(source.files))
    with pytest.raises(ValueError, match="layers/mlp/up/kernel': 1 of 2048 values are not finite"):
        _run(tmp_path / "broken", tmp_path / "out", STEPS["rounding"], "always")
    assert not (tmp_path / "out").exists()
