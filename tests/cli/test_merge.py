"""The command that merges checkpoints."""

import json

import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.cli import main

CONFIG = """\
merge_method: linear
models:
  - model: first
    parameters: {weight: 1}
  - model: second
    parameters: {weight: [1, 3]}
"""


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("first", "second")):
        tensors = {
            f"model.layers.{j}.up.weight": np.full((4, 3), 10 * i, np.float32) for j in range(2)
        }
        files = {"config.json": '{"num_hidden_layers": 2}'}
        write_safetensors(tmp_path / name, tensors, files=files)
    (tmp_path / "merge.yml").write_text(CONFIG)
    return tmp_path


def _run(capsys, *arguments):
    code = main(["merge", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_merge_is_written_and_told(capsys, folder):
    code, out, _ = _run(capsys, folder / "merge.yml", folder / "out", "--json", "--quiet")
    assert code == 0
    result = json.loads(out)
    assert result["tensors"] == 2
    assert result["bytes_written"] == 2 * 4 * 3 * 4
    assert set(result["checksums"]) == set(open_checkpoint(folder / "out").names)
    merged = open_checkpoint(folder / "out").read("model.layers.1.up.weight")
    np.testing.assert_allclose(merged, 7.5)
    code, out, err = _run(capsys, folder / "merge.yml", folder / "again")
    assert code == 0
    assert "2 tensors, 0.00 GB written to" in out
    assert "Streaming: done" in err


def test_a_merge_can_be_written_as_orbax(capsys, folder):
    code, out, _ = _run(capsys, folder / "merge.yml", folder / "plain", "--json", "--quiet")
    code, again, _ = _run(
        capsys, folder / "merge.yml", folder / "out", "--to", "orbax", "--json", "--quiet"
    )
    assert code == 0
    assert json.loads(again)["checksums"] == json.loads(out)["checksums"]
    made = open_checkpoint(folder / "out")
    assert made.format == "orbax" and made.config == {"num_hidden_layers": 2}
    np.testing.assert_allclose(made.read("model.layers.1.up.weight"), 7.5)
    assert "mergekit_config.yml" in made.files


def test_explaining_resolves_every_parameter_and_writes_nothing(capsys, folder):
    code, out, _ = _run(capsys, folder / "merge.yml", "--explain", "--json")
    assert code == 0
    tensors = {entry["tensor"]: entry for entry in json.loads(out)["tensors"]}
    weights = tensors["model.layers.1.up.weight"]["parameters"]["weight"]
    assert weights == {"first": 1.0, "second": 3.0}
    assert json.loads(out)["differs"]
    code, out, _ = _run(capsys, folder / "merge.yml", "--explain")
    assert "weight: first 1, second 3" in out
    assert sorted(p.name for p in folder.iterdir()) == ["first", "merge.yml", "second"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["merge.yml"], "OUT is missing"),
        (["nope.yml", "out"], "cannot be read"),
        (["merge.yml", "first"], "exists and nothing was written"),
        (["merge.yml", "first"], "remove it, or say --overwrite."),
        (["merge.yml", "out", "--memory", "1MB"], "memory=1000000 leaves nothing"),
    ],
)
def test_what_cannot_be_done_is_said_and_ends_with_one(capsys, folder, arguments, words):
    config, *rest = arguments
    rest = [folder / rest[0], *rest[1:]] if rest else []
    code, _, err = _run(capsys, folder / config, *rest)
    assert code == 1
    assert words in err
    assert err.count("jaxweights merge: ") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize("text, value", [("1GB", 10**9), ("1.5 MiB", 3 << 19), ("4096", 4096)])
def test_sizes_are_read_with_their_units(text, value):
    from jaxweights.cli._bytes import byte_count

    assert byte_count(text) == value


def test_a_size_without_sense_ends_with_two(capsys, folder):
    with pytest.raises(SystemExit) as error:
        main(["merge", "x.yml", "out", "--memory", "much"])
    assert error.value.code == 2
    assert "'much' is no size" in capsys.readouterr().err
