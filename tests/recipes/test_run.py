"""A recipe runs from a checkpoint to its report, whole or not at all."""

import json

import jax
import numpy as np
import pytest

from jaxweights.checkpoint import load_tree, open_checkpoint
from jaxweights.cli import main
from jaxweights.models import load_pretrained
from jaxweights.recipes import parse_recipe, plan_recipe, run_recipe
from jaxweights.weights import Quantized, materialize
from tests._tiny_models import LLAMA, write_tiny
from tests.recipes._run import DECODER, DISTILLED, EXPORT, FLAT, QUICK, recipe_of

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
