"""A recipe runs from a checkpoint to its report, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from jaxweights.checkpoint import load_tree, open_checkpoint
from jaxweights.cli import main
from jaxweights.models import load_pretrained
from jaxweights.recipes import RecipeError, parse_recipe, plan_recipe, run_recipe
from jaxweights.weights import Quantized, materialize
from tests._tiny_models import BERT, LLAMA, write_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", LLAMA)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "bert", BERT)


DECODER = """\
model: {{path: "{model}"}}
calibrate:
  text: pydoc-topics
  sequences: 4
  length: 32
  batch: 2
transforms:
  - method: sparsify.wanda
    match: layers/mlp/.*/kernel
    sparsity: 0.5
  - method: quantize.round_to_nearest
    except: .*/o/kernel
    bits: 8
evaluate:
  perplexity: {{text: pydoc-topics, windows: 3, length: 32}}
output:
  directory: "{output}"
"""

ENCODER = """\
model: {{path: "{model}"}}
transforms:
  - method: quantize.round_to_nearest
    bits: 4
    group_size: 16
evaluate:
  retrieval: {{text: pydoc-topics, documents: 6, batch: 4}}
output:
  directory: "{output}"
  formats: [safetensors]
"""


# No measures and no report: for what happens before and around them.
QUICK = """\
model: {{path: "{model}"}}
transforms:
  - method: quantize.round_to_nearest
    bits: 4
    group_size: 16
output: {{directory: "{output}", formats: [safetensors], report: false}}
"""


def recipe_of(template, model, output, **changes):
    text = template.format(model=model, output=output)
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse_recipe(text, name="r.yaml")


@pytest.fixture(scope="module")
def decoded(llama, tmp_path_factory):
    """One run of a decoder, looked at from all sides below."""
    output = tmp_path_factory.mktemp("runs") / "decoder"
    seen = []
    recipe = recipe_of(DECODER, llama, output)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        result = run_recipe(recipe, progress=lambda *event: seen.append(event))
    return result, seen


def test_a_run_writes_everything_it_promises(decoded):
    result, _ = decoded
    names = sorted(path.name for path in result.directory.iterdir())
    assert names == ["orbax", "recipe.yaml", "report.html", "result.json", "safetensors"]
    assert [p.name for p in result.directory.parent.iterdir()] == [result.directory.name]


def test_the_steps_did_what_the_recipe_says(decoded):
    result, _ = decoded
    leaves = {leaf.path: leaf for leaf in result.leaves}
    up, q = leaves["layers/mlp/up/kernel"], leaves["layers/attn/q/kernel"]
    assert up.zeros == pytest.approx(0.5, abs=0.01)
    assert up.representation == "Masked(Quantized(bits=8))"
    assert q.representation == "Quantized(bits=8)"
    assert len(q.errors) == LLAMA.num_layers
    # Eight bits round to one part in 127 of the largest, uniformly: well below 1 % of the norm.
    assert 0 < q.error < 0.01 < up.error < 1


def test_what_was_left_says_why(decoded):
    result, _ = decoded
    why = {leaf.path: leaf.why for leaf in result.leaves if not leaf.changed}
    assert why["layers/attn/o/kernel"] == "excepted by the recipe: .*/o/kernel"
    assert why["embed/embedding"].startswith("an embedding: left alone unless a `match` names it")
    assert why["final_norm/scale"].startswith("a vector")
    assert set(why) == {
        "embed/embedding",
        "final_norm/scale",
        "layers/attn/o/kernel",
        "layers/attn_norm/scale",
        "layers/mlp_norm/scale",
    }


def test_both_formats_hold_the_same_weights(decoded):
    result, _ = decoded
    represented = load_tree(result.directory / "orbax").tree
    dense = load_pretrained(result.directory / "safetensors").params
    for name in ("q", "o"):
        leaf = represented["layers"]["attn"][name]["kernel"]
        value = leaf.materialize() if hasattr(leaf, "materialize") else leaf
        np.testing.assert_array_equal(dense["layers"]["attn"][name]["kernel"], value)


def test_config_and_tokenizer_travel_along(decoded):
    result, _ = decoded
    for form in ("orbax", "safetensors"):
        checkpoint = open_checkpoint(result.directory / form)
        assert checkpoint.config["hidden_size"] == 32
        assert "tokenizer.json" in checkpoint.files


def test_the_result_records_recipe_versions_source_and_errors(decoded, llama):
    result, _ = decoded
    provenance = open_checkpoint(result.directory / "orbax").metadata["provenance"]
    assert provenance.source == open_checkpoint(llama).fingerprint()
    assert "sparsify.wanda" in provenance.recipe["yaml"]
    assert provenance.versions["jax"] == jax.__version__
    assert 0 < provenance.errors["layers/attn/q/kernel"]["relative_error"] < 0.01
    stored = json.loads((result.directory / "result.json").read_text())
    assert stored["versions"]["jax"] == jax.__version__
    assert stored["evaluation"]["perplexity"]["before"]["tokens"] == 3 * 31
    assert stored["size"]["after"] < stored["size"]["before"]


def test_perplexity_after_is_that_of_the_written_weights(decoded):
    result, _ = decoded
    from jaxweights.models import load_tokenizer
    from jaxweights.recipes import load_text, perplexity, windows

    written = load_pretrained(result.directory / "safetensors")
    text = load_text("pydoc-topics").whole
    tokens = windows(text[: len(text) // 2], load_tokenizer(written), count=3, length=32)
    score = perplexity(
        lambda params, batch: written.model.apply({"params": params}, batch),
        written.params,
        tokens,
    )
    found = result.summary["evaluation"]["perplexity"]["after"]["perplexity"]
    # The lifted product sums in another order than the dense one.
    np.testing.assert_allclose(score.perplexity, found, rtol=1e-4)


def test_calibration_and_evaluation_read_different_halves(decoded):
    result, _ = decoded
    assert "from the second half of the text" in result.summary["calibration"]["definition"]
    definition = result.summary["evaluation"]["perplexity"]["definition"]
    assert "from the beginning of pydoc-topics, re-flowed" in definition


def test_progress_runs_to_the_end_of_every_task(decoded):
    _, seen = decoded
    last = {task: (done, total) for task, done, total in seen}
    expected = {"Calibrating", "Step 1 of 2: sparsify.wanda", "Perplexity before"}
    assert expected | {"Step 2 of 2: quantize.round_to_nearest", "Perplexity after"} <= set(last)
    assert all(done == total for done, total in last.values())


def test_the_report_stands_alone(decoded):
    result, _ = decoded
    page = (result.directory / "report.html").read_text()
    assert page.count("<svg") == 3
    for outside in ("http://", "https://", "src=", "<script", "@import", "url("):
        body = page.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")
        body = body.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert outside not in body.replace("url(#", "")
    assert "excepted by the recipe" in page and "prefers-color-scheme: dark" in page


def test_an_encoder_is_measured_by_retrieval(bert, tmp_path):
    result = run_recipe(recipe_of(ENCODER, bert, tmp_path / "out"))
    scores = result.summary["evaluation"]["retrieval"]
    assert scores["before"]["cosine"] == 1.0
    assert 0 < scores["after"]["cosine"] < 1.0
    assert scores["before"]["documents"] == 6
    assert not (tmp_path / "out" / "orbax").exists()


def test_a_run_can_be_opened_by_the_commands(decoded, capsys):
    result, _ = decoded
    assert main(["inspect", str(result.directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "orbax"


def test_models_are_merged_onto_the_model(llama, tmp_path):
    other = write_tiny(tmp_path / "other", LLAMA, seed=1)
    text = (
        f"model: {{path: '{llama}'}}\n"
        f"models: [{{path: '{other}'}}]\n"
        "transforms: [{method: merge.task_arithmetic, scale: 0.25}]\n"
        f"output: {{directory: '{tmp_path / 'out'}', formats: [safetensors], report: false}}\n"
    )
    run_recipe(parse_recipe(text))
    base, tuned, merged = (
        load_pretrained(path).params["embed"]["embedding"]
        for path in (llama, other, tmp_path / "out" / "safetensors")
    )
    # One product and one sum in float32.
    np.testing.assert_allclose(merged, 0.75 * base + 0.25 * tuned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("again", ["each_step", "each_block"])
def test_statistics_can_be_taken_anew(llama, tmp_path, again):
    calibrate = f"{{text: pydoc-topics, sequences: 2, length: 16, again: {again}}}"
    text = QUICK.format(model=llama, output=tmp_path / "out").replace(
        "transforms:",
        f"calibrate: {calibrate}\ntransforms:\n"
        "  - {method: sparsify.wanda, match: layers/mlp/.*/kernel, sparsity: 0.5}",
    )
    result = run_recipe(parse_recipe(text))
    leaves = {leaf.path: leaf for leaf in result.leaves}
    down = leaves["layers/mlp/down/kernel"]
    assert down.representation == "Masked(Quantized(bits=4, group_size=16))"


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


def test_the_plan_says_what_the_run_does(llama, tmp_path, decoded):
    plan = plan_recipe(recipe_of(DECODER, llama, tmp_path / "out"))
    result, _ = decoded
    planned = {leaf.path: (leaf.changed, leaf.after) for leaf in plan.leaves}
    done = {leaf.path: (leaf.changed, leaf.representation) for leaf in result.leaves}
    assert planned == done
    assert plan.bytes_after == result.summary["size"]["after"]
    assert list(tmp_path.iterdir()) == []


def test_run_and_plan_as_commands(bert, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(ENCODER.format(model=bert, output=tmp_path / "unused"))
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leaves_changed"] == 6
    assert main(["run", str(path), "--output", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["directory"] == str(tmp_path / "out")
    assert "Retrieval after: done" in captured.err
    assert not (tmp_path / "unused").exists()
    assert main(["run", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "exists and nothing was written" in capsys.readouterr().err
    assert main(["run", str(path), "--output", str(tmp_path / "out"), "--overwrite"]) == 0
    assert "report.html" in capsys.readouterr().out


def test_a_bad_recipe_is_a_clean_error_of_the_command(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: x}\ntransform: []\noutput: {directory: y}\n")
    assert main(["run", str(path)]) == 1
    err = capsys.readouterr().err
    assert f"{path}:2: recipe: unknown key 'transform'. Did you mean 'transforms'?" in err
    assert "Traceback" not in err


EXPORT = """\
model: {{path: "{model}"}}
transforms:
  - method: quantize.round_to_nearest
    bits: {bits}
    group_size: 32
output:
  directory: "{output}"
  formats: [compressed-tensors, gguf]
"""


def test_a_recipe_writes_what_transformers_and_llama_cpp_read(llama, tmp_path):
    text = EXPORT.format(model=llama, output=tmp_path / "out", bits=4)
    found = run_recipe(parse_recipe(text))
    want = jax.tree.leaves(materialize(found.params))
    for name, settings in (("compressed-tensors", {}), ("gguf", {"dequantize": False})):
        loaded = load_pretrained(tmp_path / "out" / name, **settings)
        assert isinstance(loaded.params["layers"]["mlp"]["up"]["kernel"], Quantized)
        for one, other in zip(jax.tree.leaves(materialize(loaded.params)), want, strict=True):
            # GGUF holds scales in float16.
            rtol = 1e-3 if name == "gguf" else 0
            np.testing.assert_allclose(one, other, rtol=rtol, atol=0)


def test_weights_that_a_format_cannot_hold_are_refused_before_they_are_changed(
    llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("jaxweights.recipes._run.apply", None)
    narrow = EXPORT.replace("group_size: 32", "group_size: 16")
    text = narrow.format(model=llama, output=tmp_path / "out", bits=4)
    with pytest.raises(ValueError, match=r"'blk.0.attn_q.weight' has groups of 16 inputs"):
        run_recipe(parse_recipe(text))
    assert not (tmp_path / "out").exists()


FOLDED = """\
model: {{path: "{model}"}}
calibrate: {{text: pydoc-topics}}
transforms:
  - {{method: quantize.awq, group_size: 16, folds: model}}
output: {{directory: unused, formats: [orbax]}}
"""


def test_a_recipe_asks_for_the_folds_of_its_model(llama):
    def becomes(text):
        leaves = plan_recipe(parse_recipe(text.format(model=llama))).changed
        return {leaf.after.split("(")[0] for leaf in leaves if leaf.path.endswith("kernel")}

    assert becomes(FOLDED) == {"Quantized"}
    assert becomes(FOLDED.replace(", folds: model", "")) == {"Rescaled"}


FLAT = QUICK.replace("report: false", "report: true, flat: true")


def test_a_flat_result_is_a_checkpoint_with_its_report_beside_it(llama, tmp_path):
    found = run_recipe(recipe_of(FLAT, llama, tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "report.html", "result.json"} <= names
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())
    loaded = load_pretrained(tmp_path / "out").params
    one, other = (jax.tree.leaves(materialize(tree)) for tree in (loaded, found.params))
    assert all(map(np.array_equal, one, other))


def test_a_streamed_result_is_flat_too(llama, tmp_path):
    run_recipe(recipe_of(f"stream: always\n{FLAT}", llama, tmp_path / "out"))
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())
    jax.block_until_ready(load_pretrained(tmp_path / "out").params)
    assert (tmp_path / "out" / "report.html").is_file()


DISTILLED = """\
model: {{path: "{model}"}}
calibrate: {{text: pydoc-topics, sequences: 4, length: 32, batch: 4}}
transforms:
  - {{method: quantize.round_to_nearest, bits: 2, group_size: 16}}
distill: {{steps: 24, code_rate: 0.02}}
output: {{directory: "{output}", formats: [safetensors]}}
"""


def test_a_recipe_trains_what_it_quantized_towards_the_original(llama, tmp_path):
    seen = []
    recipe = recipe_of(DISTILLED, llama, tmp_path / "out")
    result = run_recipe(recipe, progress=lambda *event: seen.append(event))
    losses = result.summary["distill"]["losses"]
    assert len(losses) == 24 and losses[-1] < 0.8 * losses[0]
    assert ("Distilling", 24, 24) in seen
    plain = recipe_of(DISTILLED.replace("distill: {{steps: 24, code_rate: 0.02}}\n", ""), llama, "")
    before = run_recipe(plain, output=tmp_path / "plain").params
    for name in ("up", "down"):
        one, other = (tree["layers"]["mlp"][name]["kernel"] for tree in (before, result.params))
        assert (one.bits, one.codes.shape) == (other.bits, other.codes.shape)
        assert np.any(one.codes != other.codes)
    assert "Trained afterwards for 24 steps" in (tmp_path / "out" / "report.html").read_text()


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


def test_a_quantized_model_is_dequantized_where_a_recipe_says_so(llama, tmp_path):
    first = EXPORT.format(model=llama, output=tmp_path / "four", bits=4)
    run_recipe(parse_recipe(first))
    source = tmp_path / "four" / "compressed-tensors"
    text = EXPORT.format(model=source, output=tmp_path / "eight", bits=8)
    with pytest.raises(ValueError, match="is already a Quantized"):
        run_recipe(parse_recipe(text))
    dense = text.replace('"}', '", dequantize: true}', 1)
    assert dense != text
    params = run_recipe(parse_recipe(dense)).params
    assert params["layers"]["mlp"]["up"]["kernel"].bits == 8
