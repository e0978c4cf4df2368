"""What is wrong is said with file and line, before anything is written."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from jaxweights.checkpoint import write_safetensors
from jaxweights.merge import mean
from jaxweights.recipes.mergekit import load_merge_config, run_merge
from jaxweights.stream import transform_checkpoint
from tests.recipes.mergekit._checkpoints import CONFIG, arrays, read, write_config, write_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


TEXT = """\
merge_method: ties
base_model: base
models:
  - model: ft1
    parameters: {weight: 1.0, density: 0.5}
"""


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("merge_method: ties", "merge_method: tise", r"x.yml:1: .*'tise'. Did you mean 'ties'"),
        ("base_model", "base_modle", r"x.yml:2: configuration: unknown key 'base_modle'. Did"),
        ("density", "densty", r"x.yml:5: .*unknown key 'densty'. Did you mean 'density'"),
        ("weight: 1.0", "weight: heavy", r"x.yml:5: weight: is the text 'heavy'.*a finite number"),
        ("weight: 1.0", "weight: .nan", r"x.yml:5: weight: is .*nan.*a finite number"),
        ("density: 0.5", "density: [0.5, .inf]", r"x.yml:5: density: .*a finite number"),
        ("density: 0.5", "density: -0.5", r"x.yml:5: density: is -0.5. It must lie in \[0, 1\]"),
        ("density: 0.5", "density: [1, 50]", r"x.yml:5: density: is 50. .*0.5 for 50 percent"),
        ("merge_method: ties", "transforms: []", r"x.yml:1: transforms: This is a recipe"),
        ("models:", "slices: []\nmodels:", r"'models' and 'slices'.*exactly one"),
        ("base_model: base", "dtype: float8", r"x.yml:2: dtype: .*float32, float16, bfloat16"),
        ("parameters: {", "layers: 3\n    parameters: {", r"unknown key 'layers'"),
    ],
)
def test_a_typo_is_refused_with_its_line(tmp_path, old, new, words):
    path = write_config(tmp_path, TEXT.replace(old, new), "x.yml")
    with pytest.raises(ValueError, match=words):
        load_merge_config(path)


@pytest.mark.parametrize("method, share", [("ties", "density"), ("della", "density"),
                                           ("sce", "select_topk")])  # fmt: skip
def test_shares_above_one_are_taken_as_one_where_mergekit_does_so(folder, tmp_path, method, share):
    merged = []
    for value, options in ((1.0, {}), (50, {"compat": "mergekit"})):
        config = {"merge_method": method, "base_model": str(folder / "base"), "parameters": {}}
        config["models"] = [{"model": str(folder / name)} for name in ("ft1", "ft2")]
        config["parameters"] = {share: value} | ({} if method == "sce" else {"weight": 1.0})
        out = tmp_path / str(value)
        run_merge(write_config(tmp_path, config, "share.yml"), out, **options)
        merged.append(read(out))
    for name, tensor in merged[0].items():
        np.testing.assert_allclose(merged[1][name], tensor, atol=1e-6)


def _models(*names, **parameters):
    values = {"weight": 1.0} | parameters
    return [{"model": name, "parameters": values} for name in names]


def _refused(folder, config, words, **options):
    path = write_config(folder, config, "wrong.yml")
    before = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, OSError), match=words):
        run_merge(path, folder / "never", **options)
    assert sorted(folder.rglob("*")) == before


def test_a_model_that_is_not_there_is_named(folder):
    config = {"merge_method": "linear", "models": _models("ft1", "ft9")}
    _refused(folder, config, r"model 'ft9' is neither a folder here nor beside")


def test_a_delta_method_without_a_base_is_refused(folder):
    config = {"merge_method": "ties", "models": _models("ft1", "ft2")}
    _refused(folder, config, r"ties needs a 'base_model'")


def test_a_missing_weight_is_named_with_its_model(folder):
    config = {"merge_method": "linear", "models": [{"model": "ft1"}, *_models("ft2")]}
    _refused(folder, config, r"linear needs the parameter 'weight' for ft1")


def test_a_base_that_is_the_only_model_leaves_nothing_to_merge(folder):
    config = {"merge_method": "ties", "base_model": "base", "models": _models("base")}
    _refused(folder, config, r"merges 1 or more models besides the base, not 0")


def test_weights_that_sum_to_zero_are_refused(folder):
    models = [*_models("ft1"), *_models("ft2", weight=-1.0)]
    _refused(folder, {"merge_method": "linear", "models": models}, r"sum to 0.*normalize=False")


def test_other_shapes_are_refused_with_the_remedy(folder):
    wide = {**arrays("ft1"), "lm_head.weight": np.ones((70, 48), np.float32)}
    write_safetensors(folder / "wide", wide, files={"config.json": json.dumps(CONFIG)})
    config = {"merge_method": "linear", "models": _models("ft1", "wide")}
    _refused(
        folder, config, r"'lm_head.weight': is \(64, 48\) in ft1, \(70, 48\) in wide.*tokenizer"
    )


def test_another_number_of_layers_is_refused(folder):
    less = {name: x for name, x in arrays("ft1").items() if ".layers.1." not in name}
    write_safetensors(folder / "shallow", less, files={"config.json": json.dumps(CONFIG)})
    config = {"merge_method": "linear", "models": _models("ft1", "shallow")}
    _refused(folder, config, r"layers.1.*shallow lacks it")


def test_a_layer_range_beyond_the_model_is_refused(folder):
    slices = [{"sources": [{"model": "ft1", "layer_range": [1, 3]}]}]
    _refused(
        folder, {"merge_method": "passthrough", "slices": slices}, r"beyond the 2 layers of ft1"
    )


def test_a_missing_shard_is_refused(folder):
    write_safetensors(folder / "sharded", arrays("ft1"), max_shard_bytes=40_000)
    next((folder / "sharded").glob("model-00002-*")).unlink()
    config = {"merge_method": "linear", "models": _models("sharded", "ft2")}
    _refused(folder, config, r"shards are missing")


def test_codes_that_are_not_understood_are_not_merged(folder):
    config = {**CONFIG, "quantization_config": {"quant_method": "mystery"}}
    write_safetensors(folder / "coded", arrays("ft1"), files={"config.json": json.dumps(config)})
    words = r"coded': the quantization_config .*'mystery' cannot be read.*Give a dense checkpoint"
    _refused(folder, {"merge_method": "linear", "models": _models("ft2", "coded")}, words)
    tx = mean(weights=[1.0])
    with pytest.raises(ValueError, match=words):
        transform_checkpoint(tx, folder / "ft2", folder / "out", models=[folder / "coded"])


def test_nan_in_a_model_is_named_with_its_tensor(folder):
    broken = {name: x.copy() for name, x in arrays("ft1").items()}
    broken["model.norm.weight"][3] = np.nan
    write_safetensors(folder / "broken", broken, files={"config.json": json.dumps(CONFIG)})
    config = {"merge_method": "task_arithmetic", "base_model": "base", "models": _models("broken")}
    _refused(folder, config, r"'model.norm.weight': .*broken")
    config = {"merge_method": "linear", "models": _models("broken", "ft2")}
    _refused(folder, config, r"'model.norm.weight': .*broken")


def test_too_little_memory_is_refused_before_anything_is_read(folder):
    config = {"merge_method": "linear", "models": _models("ft1")}
    _refused(folder, config, r"memory=1000 leaves nothing", memory=1000)


def test_deltas_of_zero_give_the_base(folder):
    write_safetensors(folder / "same", arrays("base"), files={"config.json": json.dumps(CONFIG)})
    for method in ("ties", "dare_linear", "breadcrumbs"):
        config = {
            "merge_method": method,
            "base_model": "base",
            "models": _models("same", density=0.5),
        }
        out = folder / f"zero-{method}"
        run_merge(write_config(folder, config, "zero.yml"), out)
        for name, array in read(out).items():
            np.testing.assert_array_equal(array, arrays("base")[name])


def test_eight_bit_floats_are_refused_not_copied(folder):
    narrow = arrays("ft1") | {"lm_head.weight": np.ones((64, 48), ml_dtypes.float8_e4m3fn)}
    write_safetensors(folder / "narrow", narrow, files={"config.json": json.dumps(CONFIG)})
    config = {"merge_method": "linear", "models": _models("ft1", "narrow")}
    _refused(folder, config, r"'lm_head.weight': is float8_e4m3fn in narrow.*bfloat16 first")


def test_a_model_that_stands_twice_in_a_slice_is_refused(folder):
    config = {"merge_method": "linear", "models": _models("ft1", "ft1", "ft2")}
    _refused(folder, config, r"\['ft1'\] stand twice in one slice. Add their weights")


def test_an_index_that_lies_is_refused(folder):
    write_safetensors(folder / "liar", arrays("ft1"), max_shard_bytes=40_000)
    index = folder / "liar" / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    name = "model.norm.weight"
    shards = sorted(set(said["weight_map"].values()))
    said["weight_map"][name] = next(s for s in shards if s != said["weight_map"][name])
    index.write_text(json.dumps(said))
    config = {"merge_method": "linear", "models": _models("liar", "ft2")}
    _refused(folder, config, r"liar.*model.norm.weight")


def test_another_architecture_is_refused(folder):
    other = {f"encoder.layer.{i}.dense.weight": np.ones((4, 4), np.float32) for i in range(2)}
    write_safetensors(folder / "other", other, files={"config.json": "{}"})
    config = {"merge_method": "linear", "models": _models("ft1", "other")}
    _refused(folder, config, r"other has \['encoder.layer.0.*which ft1 lacks.*one architecture")


def test_a_destination_that_cannot_be_made_is_refused_before_anything_is_read(folder):
    (folder / "file.txt").write_text("mine")
    path = write_config(folder, {"merge_method": "linear", "models": _models("ft1")}, "wrong.yml")
    with pytest.raises(OSError, match=r"jaxweights merge: .*file.txt/out' cannot be made"):
        run_merge(path, folder / "file.txt" / "out")
    assert (folder / "file.txt").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to_is_refused(folder, monkeypatch):
    # A superuser, as whom tests may run, may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    config = {"merge_method": "linear", "models": _models("ft1", "ft2")}
    _refused(folder, config, r"never' cannot be made, because .* may not be written to")


def test_a_disk_that_becomes_full_is_said_and_nothing_is_left(folder, file_limit):
    config = {"merge_method": "linear", "models": _models("ft1", "ft2")}
    _refused(folder, config, "the disk is full while writing")


def test_a_disk_that_is_too_full_is_refused_before_anything_is_written(folder, monkeypatch):
    free = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    config = {"merge_method": "linear", "models": _models("ft1", "ft2")}
    _refused(folder, config, r"never' needs \d+ bytes, but only 1000 are free")
