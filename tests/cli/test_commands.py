"""inspect, compare and convert on small checkpoints of every format."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxweights.checkpoint import load_tree, open_checkpoint, write_safetensors
from jaxweights.cli import main
from jaxweights.core import apply
from jaxweights.models import load_pretrained
from jaxweights.quantize import round_to_nearest
from jaxweights.recipes._write import write_checkpoint
from jaxweights.weights import Axes, Quantized, is_weight
from tests._tiny_models import LLAMA, write_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", LLAMA)


@pytest.fixture(scope="module")
def quantized(llama, tmp_path_factory):
    """The same model with int4 weights, as Orbax."""
    pretrained = load_pretrained(llama)
    layout = {"layers/.*/kernel": Axes()}
    params = apply(round_to_nearest(bits=4, group_size=16), pretrained.params, layout=layout)
    folder = tmp_path_factory.mktemp("models") / "quantized"
    write_checkpoint(folder, "orbax", pretrained, params)
    return folder


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out, captured.err


def run_json(capsys, *arguments):
    return json.loads(run(capsys, *arguments, "--json")[0])


def test_inspect_lists_tensors_sizes_and_config(capsys, llama):
    found = run_json(capsys, "inspect", llama)
    names = {tensor["name"]: tensor for tensor in found["tensors"]}
    q = names["model.layers.0.self_attn.q_proj.weight"]
    assert (q["shape"], q["stored"], q["bytes"]) == ([32, 32], "float32", 32 * 32 * 4)
    assert found["format"] == "safetensors"
    assert found["config"]["hidden_size"] == 32
    assert found["bytes"] == 4 * found["parameters"]
    assert "tokenizer.json" in found["files"]


@pytest.mark.parametrize("form", ["safetensors", "compressed-tensors"])
def test_the_folder_of_a_run_stands_for_its_weights(capsys, llama, tmp_path, form):
    shutil.copytree(llama, tmp_path / form)
    (tmp_path / "result.json").write_text("{}")
    found = run_json(capsys, "inspect", tmp_path)
    assert found["tensors"] == run_json(capsys, "inspect", llama)["tensors"]


def test_inspect_shows_the_same_to_people(capsys, llama):
    out, _ = run(capsys, "inspect", llama)
    assert "model.layers.0.self_attn.q_proj.weight" in out
    assert "32 × 32" in out and "hidden_size: 32" in out


def test_inspect_names_representations_and_counts_their_bytes(capsys, quantized):
    found = run_json(capsys, "inspect", quantized)
    q = next(t for t in found["tensors"] if t["name"] == "layers/attn/q/kernel")
    assert q["stored"] == "Quantized(bits=4)"
    # Two codes a byte, and a float32 scale for every 16 of them.
    assert q["bytes"] == 2 * 32 * 32 // 2 + 2 * 32 * 32 // 16 * 4


def test_a_checkpoint_is_identical_to_itself(capsys, llama):
    found = run_json(capsys, "compare", llama, llama)
    assert found["identical"] and found["relative_error"] == 0.0


def test_compare_measures_across_formats(capsys, llama, quantized):
    found = run_json(capsys, "compare", llama, quantized)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors["embed/embedding"]["identical"]
    assert not found["only_in_one"]
    kernel = load_pretrained(llama).params["layers"]["mlp"]["up"]["kernel"]
    rounded = load_tree(quantized).tree["layers"]["mlp"]["up"]["kernel"].materialize()
    expected = np.linalg.norm(rounded - kernel) / np.linalg.norm(kernel)
    # Sums of 4096 float32 squares in another order.
    np.testing.assert_allclose(
        tensors["layers/mlp/up/kernel"]["relative_error"], expected, rtol=1e-5
    )
    out, _ = run(capsys, "compare", llama, quantized)
    assert "layers/mlp/up/kernel" in out and "°" in out


def test_the_rank_of_the_difference_tells_an_adapter_from_rounding(capsys, llama, tmp_path):
    checkpoint = open_checkpoint(llama)
    tensors = {name: np.array(value) for name, value in checkpoint.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    rng = np.random.default_rng(0)
    down, up = rng.normal(size=(64, 3)), rng.normal(size=(3, 32))
    tensors[name] = (tensors[name] + down @ up).astype(np.float32)
    write_safetensors(tmp_path / "adapted", tensors, files=checkpoint.files)
    found = run_json(capsys, "compare", llama, tmp_path / "adapted", "--ranks")
    (changed,) = [tensor for tensor in found["tensors"] if not tensor["identical"]]
    assert (changed["name"], changed["rank_of_difference"]) == (name, 3)
    out, _ = run(capsys, "compare", llama, tmp_path / "adapted", "--ranks")
    assert "rank of the difference" in out


def test_a_tensor_that_one_lacks_is_listed(capsys, llama, tmp_path):
    tensors = dict(open_checkpoint(llama).items())
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    write_safetensors(tmp_path / "less", tensors)
    found = run_json(capsys, "compare", llama, tmp_path / "less")
    assert not found["identical"]
    assert found["only_in_one"] == [
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight: (64, 32) in one, (2, 2) in the other",
    ]


def test_models_without_a_common_tensor_are_refused(capsys, llama, tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {"a": np.ones(3, np.float32)})
    code = main(["compare", str(llama / "model.safetensors"), str(tmp_path / "other.safetensors")])
    assert code == 1
    assert capsys.readouterr().err


def test_models_whose_every_tensor_has_another_shape_are_refused(capsys, tmp_path):
    for name, size in (("one", 3), ("two", 4)):
        write_safetensors(tmp_path / f"{name}.safetensors", {"a": np.ones(size, np.float32)})
    assert main(["compare", *(str(tmp_path / f"{n}.safetensors") for n in ("one", "two"))]) == 1
    assert "Of what both hold, a: (3,) in one, (4,) in the other." in capsys.readouterr().err


def test_a_value_that_is_not_finite_is_found_by_file_tensor_and_place(capsys, llama, tmp_path):
    tensors = {name: np.array(array) for name, array in open_checkpoint(llama).items()}
    tensors["model.layers.0.mlp.up_proj.weight"][2, 1] = np.nan
    write_safetensors(tmp_path / "broken", tensors)
    assert main(["compare", str(llama), str(tmp_path / "broken"), "--quiet"]) == 1
    message = capsys.readouterr().err
    assert (
        f"'{tmp_path / 'broken'}': 'model.layers.0.mlp.up_proj.weight': 1 of 2048 values are not "
        "finite, the first at [2, 1]." in message
    )


def test_equal_masks_of_minus_infinity_are_no_hindrance(capsys, tmp_path):
    mask = np.array([0, -np.inf], np.float32)
    for name, weight in (("one", 1), ("two", 2)):
        tensors = {"mask": mask, "weight": np.full(4, weight, np.float32)}
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    assert run_json(capsys, "compare", *files)["relative_error"] == 1


def test_numbers_that_json_has_no_word_for_are_null(capsys, tmp_path):
    for name, weight in (("one", 0), ("two", 1)):
        tensors = {"a": np.ones(3, np.float32), "b": np.full(4, weight, np.float32)}
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
    out, _ = run(
        capsys, "compare", *(tmp_path / f"{name}.safetensors" for name in ("one", "two")), "--json"
    )

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(out, parse_constant=refuse)
    errors = {tensor["name"]: tensor["relative_error"] for tensor in found["tensors"]}
    assert errors == {"a": 0, "b": None}


def test_converting_there_and_back_changes_no_bit(capsys, llama, tmp_path):
    run(capsys, "convert", llama, tmp_path / "orbax", "--to", "orbax", "--quiet")
    run(capsys, "convert", tmp_path / "orbax", tmp_path / "back", "--to", "safetensors", "--quiet")
    old, new = open_checkpoint(llama), open_checkpoint(tmp_path / "back")
    assert set(old.names) == set(new.names)
    for name in old.names:
        np.testing.assert_array_equal(old.read(name), new.read(name))
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


def test_converting_represented_weights_writes_what_they_stand_for(capsys, quantized, tmp_path):
    found = run_json(capsys, "convert", quantized, tmp_path / "dense", "--to", "safetensors")
    assert "model.safetensors" in found["files"]
    dense = load_pretrained(tmp_path / "dense").params
    expected = load_tree(quantized).tree["layers"]["attn"]["o"]["kernel"].materialize()
    np.testing.assert_array_equal(dense["layers"]["attn"]["o"]["kernel"], expected)


def test_converting_casts_on_request(capsys, llama, tmp_path):
    arguments = ("convert", llama, tmp_path / "half", "--to", "safetensors", "--dtype", "bfloat16")
    run(capsys, *arguments)
    checkpoint = open_checkpoint(tmp_path / "half")
    assert {checkpoint.dtype(name).name for name in checkpoint.names} == {"bfloat16"}


def test_an_existing_destination_is_kept_unless_overwriting_is_asked_for(capsys, llama, tmp_path):
    target = tmp_path / "kept"
    arguments = ["convert", str(llama), str(target), "--to", "safetensors"]
    assert main(arguments) == 0
    (target / "mine.txt").write_text("mine")
    assert main(arguments) == 1
    assert "exists and nothing was written" in capsys.readouterr().err
    assert (target / "mine.txt").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert not (target / "mine.txt").exists()
    jax.block_until_ready(load_pretrained(target).params)


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(capsys, llama, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    arguments = ["convert", str(llama), str(tmp_path), "--to", "safetensors", "--overwrite"]
    assert main(arguments) == 1
    assert "holds no checkpoint but ['thesis.txt']" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_progress_goes_to_standard_error_and_can_be_silenced(capsys, llama, tmp_path):
    out, err = run(capsys, "convert", llama, tmp_path / "a", "--to", "orbax", "--json")
    assert "Writing: done" in err
    json.loads(out)
    _, err = run(capsys, "convert", llama, tmp_path / "b", "--to", "orbax", "--quiet")
    assert err == ""


def test_convert_offers_every_format_that_can_be_written():
    from jaxweights.cli._convert import FORMATS
    from jaxweights.recipes import _write

    assert set(FORMATS) == set(_write.FORMATS)


def test_converting_quantized_weights_keeps_their_integers(capsys, quantized, tmp_path):
    run(capsys, "convert", quantized, tmp_path / "ct", "--to", "compressed-tensors", "--quiet")
    found = run_json(capsys, "convert", tmp_path / "ct", tmp_path / "back", "--to", "orbax")
    assert "jaxweights.json" in found["files"]
    first, again = (load_pretrained(p).params for p in (quantized, tmp_path / "back"))
    for one, other in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    leaves = jax.tree.leaves(again, is_leaf=is_weight)
    assert any(isinstance(leaf, Quantized) for leaf in leaves)
    tensors = run_json(capsys, "inspect", tmp_path / "ct")["tensors"]
    q = next(t for t in tensors if t["name"] == "model.layers.0.self_attn.q_proj.weight")
    assert (q["shape"], q["stored"]) == ([32, 32], "compressed-tensors")
    assert q["bytes"] == 32 * 32 // 2 + 32 * 2 * 4 + 16  # codes, float32 scales, two int64


def test_converting_dense_weights_to_a_quantized_format_is_refused(capsys, llama, tmp_path):
    arguments = ["convert", str(llama), str(tmp_path / "out"), "--to", "awq", "--quiet"]
    assert main(arguments) == 1
    assert "no tensor is quantized" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_converting_to_one_gguf_file_and_back(capsys, llama, tmp_path):
    file = tmp_path / "model.gguf"
    found = run_json(capsys, "convert", llama, file, "--to", "gguf")
    assert found["files"] == ["model.gguf"] and file.is_file()
    run(capsys, "convert", file, tmp_path / "back", "--to", "safetensors", "--quiet")
    first, again = open_checkpoint(llama), open_checkpoint(tmp_path / "back")
    assert set(first.names) == set(again.names)
    for name in first.names:
        np.testing.assert_array_equal(first.read(name), again.read(name))


def test_converting_a_gguf_file_keeps_its_blocks_where_the_format_has_integers(
    capsys, llama, tmp_path
):
    pretrained = load_pretrained(llama)
    layout = {"layers/.*/kernel": Axes()}
    params = apply(round_to_nearest(bits=4, group_size=32), pretrained.params, layout=layout)
    first = tmp_path / "first.gguf"
    write_checkpoint(first, "gguf", pretrained, params)
    run(capsys, "convert", first, tmp_path / "again.gguf", "--to", "gguf", "--quiet")
    assert (tmp_path / "again.gguf").read_bytes() == first.read_bytes()
    run(capsys, "convert", first, tmp_path / "ct", "--to", "compressed-tensors", "--quiet")
    want = load_pretrained(first, dequantize=False).params["layers"]["mlp"]["up"]["kernel"]
    kernel = load_pretrained(tmp_path / "ct").params["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, Quantized) and isinstance(want, Quantized)
    np.testing.assert_array_equal(kernel.codes, want.codes)
    np.testing.assert_array_equal(kernel.scale, want.scale)
