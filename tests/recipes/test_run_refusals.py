"""What a run refuses, and what it leaves when it fails."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint
from jaxweights.cli import main
from jaxweights.recipes import RecipeError, parse_recipe, run_recipe
from tests.recipes._run import DECODER, DISTILLED, EXPORT, FLAT, QUICK, recipe_of


def test_an_existing_destination_is_refused_before_any_work(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")
    recipe = recipe_of(DECODER, llama, tmp_path / "out")
    seen = []
    with pytest.raises(FileExistsError, match="exists and nothing was written"):
        run_recipe(recipe, progress=lambda *event: seen.append(event))
    assert not seen
    assert (tmp_path / "out" / "result.json").read_text() == "{}"


def test_overwriting_replaces_a_run_but_nothing_else(bert, tmp_path):
    recipe = recipe_of(QUICK, bert, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no run made; it holds \['thesis.txt'\]"):
        run_recipe(recipe, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").exists()
    (tmp_path / "out" / "result.json").write_text("{}")
    run_recipe(recipe, overwrite=True)
    assert not (tmp_path / "out" / "thesis.txt").exists()


@pytest.mark.parametrize(
    "old, new, words",
    [
        (
            "layers/mlp/.*/kernel",
            "layers/mpl/.*/kernel",
            r"r.yaml:8: .*'layers/mpl/.*/kernel' matches no leaf. The nearest paths: \['layers/mlp",
        ),
        (
            "bits: 8",
            "bits: 8\n    group_size: 24",
            r"r.yaml:11: quantize.round_to_nearest: .*group_size=24 does not divide",
        ),
        ("windows: 3", "windows: 10_000", r"has \d+ tokens, but 10000 windows of 32 need 320000"),
        (
            "perplexity: {text: pydoc-topics, windows: 3, length: 32}",
            "retrieval: {text: brown}",
            r"r.yaml:15: llama is a language model, which has no retrieval. Measure its perplexity",
        ),
        ("match: layers/mlp/.*/kernel", "match: final_norm/scale", r"final_norm/scale.*no matrix"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_the_work(llama, tmp_path, old, new, words):
    recipe = recipe_of(DECODER, llama, tmp_path / "out", **{old: new})
    seen = []
    with pytest.raises(ValueError, match=words):
        run_recipe(recipe, progress=lambda *event: seen.append(event[0]))
    assert "Perplexity before" not in seen
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer_cannot_read_text(llama, tmp_path):
    import shutil

    copy = tmp_path / "bare"
    shutil.copytree(llama, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"r.yaml:2: bare came without a tokenizer"):
        run_recipe(recipe_of(DECODER, copy, tmp_path / "out"))


def test_a_failure_in_the_middle_leaves_nothing(llama, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxweights.recipes._run.write_checkpoint", fail)
    with pytest.raises(OSError, match="the disk is full while writing"):
        run_recipe(recipe_of(QUICK, llama, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_weight_with_nan_is_named_before_the_work(llama, tmp_path):
    from jaxweights.checkpoint import write_safetensors

    checkpoint = open_checkpoint(llama)
    tensors = {name: np.array(value) for name, value in checkpoint.items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_safetensors(tmp_path / "bad", tensors, files=checkpoint.files)
    words = r"'layers/mlp/up/kernel': 1 of 4096 values are not finite, the first at \[1, 4, 3\]"
    with pytest.raises(ValueError, match=words):
        run_recipe(recipe_of(DECODER, tmp_path / "bad", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_no_destination_and_the_next_run_cleans_up(bert, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(QUICK.format(model=bert, output=tmp_path / "out"))
    # Stops for good in the middle of writing.
    program = textwrap.dedent(
        f"""
        import time
        from jaxweights.recipes import _run, load_recipe, run_recipe
        def hang(destination, *_, **__):
            destination.mkdir()
            (destination / "half").write_text("half")
            print("writing", flush=True)
            time.sleep(600)
        _run.write_checkpoint = hang
        run_recipe(load_recipe({os.fspath(path)!r}))
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    run_recipe(recipe_of(QUICK, bert, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.yaml"]


def test_a_bad_recipe_is_a_clean_error_of_the_command(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: x}\ntransform: []\noutput: {directory: y}\n")
    assert main(["run", str(path)]) == 1
    err = capsys.readouterr().err
    assert f"{path}:2: recipe: unknown key 'transform'. Did you mean 'transforms'?" in err
    assert "Traceback" not in err


def test_weights_that_a_format_cannot_hold_are_refused_before_they_are_changed(
    llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("jaxweights.recipes._run.apply", None)
    narrow = EXPORT.replace("group_size: 32", "group_size: 16")
    text = narrow.format(model=llama, output=tmp_path / "out", bits=4)
    with pytest.raises(ValueError, match=r"'blk.0.attn_q.weight' has groups of 16 inputs"):
        run_recipe(parse_recipe(text))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("steps: 24", "steps: 0", r"r\.yaml:5: distill: steps is 0\. It must be at least 1"),
        ("0.02", "0.5", r"distill: code_rate is 0\.5\. It must lie in \[0, 0\.5\)"),
        ("calibrate:", "seed: 0 #", r"r\.yaml:5: distill trains on the sequences of `calibrate`"),
        (
            "model:",
            "stream: always\nmodel:",
            "`distill` trains the model, which needs it in memory",
        ),
    ],
)
def test_a_distillation_that_cannot_be_is_refused(llama, tmp_path, old, new, words):
    with pytest.raises(RecipeError, match=words):
        run_recipe(recipe_of(DISTILLED.replace(old, new, 1), llama, tmp_path / "out"))


def test_one_folder_holds_one_format(llama, tmp_path):
    with pytest.raises(RecipeError, match="one directory holds one format"):
        recipe_of(FLAT.replace("[safetensors]", "[safetensors, orbax]"), llama, tmp_path / "out")
