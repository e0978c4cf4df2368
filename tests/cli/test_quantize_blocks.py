"""jaxweights quantize --memory: block by block, as in memory."""

import json

import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint
from jaxweights.models import load_pretrained
from tests.cli._quantize import DATA, WIDE


@pytest.mark.filterwarnings("ignore:.*tokens were seen")
def test_blocks_make_up_for_errors_of_those_before_them(quantize, llama, tmp_path):
    base = ("--method", "gptq", "--bits", 2, "--group-size", 32, "--again", "each_block", *DATA)
    given = ("--set", "error_propagation=0.5")
    for name, more in (("with", given), ("without", ())):
        code, _, err = quantize(llama, tmp_path / name, *base, *more, "--no-report")
        assert code == 0, err
    one, other = (
        load_pretrained(tmp_path / name).params["layers"]["mlp"]["up"]["kernel"]
        for name in ("with", "without")
    )
    same = [np.mean(np.asarray(one.codes[i] == other.codes[i])) for i in range(2)]
    assert same[0] == 1 and same[1] < 1


GPTQ = ("--method", "gptq", "--group-size", 32, *DATA)


def tensors_of(path):
    source = open_checkpoint(path)
    return {name: source._stored(name)[1].tobytes() for name in source.names}


def test_block_by_block_gives_what_memory_gives_report_included(quantize, llama, tmp_path):
    # What this process holds counts, too, and other tests may have left it much.
    code, text, err = quantize(llama, tmp_path / "blocks", *GPTQ, "--memory", "300GB")
    assert code == 0, err
    assert "Size of the weights" in text
    code, _, err = quantize(llama, tmp_path / "whole", *GPTQ, "--again", "each_block")
    assert code == 0, err
    assert tensors_of(tmp_path / "blocks") == tensors_of(tmp_path / "whole")
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("blocks", "whole")]
    assert files[0] == files[1]
    one, two = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("blocks", "whole")
    )
    assert one["calibration"] == two["calibration"]
    for ours, theirs in zip(one["leaves"], two["leaves"], strict=True):
        for field in theirs.keys() - {"errors", "error", "zeros"}:
            assert ours[field] == theirs[field], (theirs["path"], field)
        np.testing.assert_allclose(ours["errors"], theirs["errors"], rtol=1e-5)
        np.testing.assert_allclose(ours["zeros"], theirs["zeros"], rtol=1e-5)
    pages = [(tmp_path / name / "report.html").read_text() for name in ("blocks", "whole")]
    assert pages[0].count("<svg") == pages[1].count("<svg") > 0
    # Another limit makes no other recipe: only what decides about the result is compared.
    recipe = (tmp_path / "blocks" / "recipe.yaml").read_text()
    assert recipe.startswith("memory: 300GB\n") and "again: each_block" in recipe


@pytest.mark.parametrize("method", ["gptq", "smooth+int8_dynamic"])
def test_a_model_is_measured_block_by_block_as_in_memory(quantize, llama, tmp_path, method):
    grid = ("--bits", 2, "--group-size", 32) if method == "gptq" else ()
    arguments = ("--method", method, *grid, *DATA, "--no-report", "--again", "each_block")
    arguments += ("--evaluate", "pydoc-topics", "--windows", "3x32")
    scores = {}
    for name, limit in (("blocks", ("--memory", "300GB")), ("whole", ())):
        code, text, err = quantize(llama, tmp_path / name, *arguments, *limit)
        assert code == 0, err
        assert "Perplexity" in text
        found = json.loads((tmp_path / name / "result.json").read_text())
        scores[name] = found["evaluation"]["perplexity"]
    assert scores["blocks"].keys() == scores["whole"].keys()
    assert scores["blocks"]["definition"] == scores["whole"]["definition"]
    for when in ("before", "after"):
        one, two = scores["blocks"][when], scores["whole"][when]
        assert one["tokens"] == two["tokens"] == 3 * 31
        np.testing.assert_allclose(one["windows"], two["windows"], rtol=1e-5)
    assert scores["blocks"]["before"]["nll"] != pytest.approx(scores["blocks"]["after"]["nll"])


def test_memory_that_measuring_has_no_room_for_is_refused(refuse, llama, monkeypatch):
    from jaxweights.recipes.onload._measure import BlockMeasure

    monkeypatch.setattr(BlockMeasure, "_needed_bytes", lambda self, one: 400 * 10**9)
    arguments = ("--memory", "300GB", "--evaluate", "pydoc-topics", "--windows", "3x32")
    message = refuse(llama, *GPTQ, *arguments)
    assert "memory=300GB does not suffice to measure: it takes about 40" in message
    assert "take shorter windows, or leave `evaluate` out" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--memory", "1MB"), "memory=1MB does not suffice: one block needs about"),
        (("--memory", "3GB", "--format", "native"), "the format orbax (native) stacks all layers"),
        (("--memory", "3GB", "--distill", 2), "`distill` trains the whole model"),
        (("--resume",), "--resume belongs to --memory"),
    ],
)
def test_what_a_limit_of_memory_does_not_go_with_is_refused(refuse, llama, arguments, words):
    assert words in refuse(llama, *GPTQ, *arguments)


def test_an_encoder_is_not_measured_block_by_block(refuse, bert):
    arguments = ("--method", "rtn", "--group-size", 16, "--memory", "300GB", "--evaluate", "brown")
    assert "`evaluate.retrieval` runs the whole model" in refuse(bert, *arguments)


def test_methods_that_look_at_all_layers_are_refused_beside_a_limit(refuse, llama):
    message = refuse(llama, "--method", "power", "--bits", 4, "--memory", "3GB")
    assert "quantize.power looks at all layers together" in message
    assert "such as quantize.gptq" in message


def test_a_calibration_that_memory_has_no_room_for_is_refused(refuse, llama, monkeypatch):
    from jaxweights.recipes import _free_memory

    size = sum(p.stat().st_size for p in llama.glob("*.safetensors"))
    monkeypatch.setattr(_free_memory, "free_memory", lambda: size + 1000)
    message = refuse(llama, *GPTQ)
    # Per layer: the inputs of q, k and v; of o; of gate and up; of down. Twice, for two batches.
    layers, hidden, inner = WIDE.num_layers, WIDE.hidden_size, WIDE.intermediate_size
    grams = 2 * 4 * layers * (3 * hidden**2 + inner**2 + 0)
    assert f"({-(-grams // 10**6)}MB for their statistics" in message
    assert "--memory 4GB" in message and "--batch 1" in message
    monkeypatch.setattr(_free_memory, "free_memory", lambda: size - 1)
    assert "of memory are free. Hold one block of layers at a time" in refuse(llama, *GPTQ)
