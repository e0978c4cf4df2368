"""Models and their merge scored on a text."""

import json
import weakref

import jax
import numpy as np
import pytest

from jaxweights.cli import main
from jaxweights.models import load_pretrained, load_tokenizer
from jaxweights.recipes.mergekit import Evaluation, run_merge
from jaxweights.recipes.mergekit._evaluate import Evaluator
from tests._tiny_models import BERT, LLAMA, write_tiny
from tests.recipes.mergekit._checkpoints import write_config

CONFIG = {
    "merge_method": "linear",
    "models": [
        {"model": "first", "parameters": {"weight": 0.5}},
        {"model": "second", "parameters": {"weight": 0.5}},
    ],
}
TEXT = "It was the best of times, it was the worst of times.\nIt was the age of wisdom.\n" * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    write_tiny(folder / "first", LLAMA)
    write_tiny(folder / "second", LLAMA, seed=1)
    (folder / "text.txt").write_text(TEXT)
    write_config(folder, CONFIG)
    return folder


def _perplexity(place, windows, length):
    """As slow and plain as can be."""
    loaded = load_pretrained(place)
    ids = load_tokenizer(place).encode(" ".join(TEXT.split())).ids[: windows * length]
    tokens = np.reshape(ids, (windows, length)).astype(np.int32)
    logits = np.asarray(loaded.model.apply({"params": loaded.params}, tokens), np.float64)[:, :-1]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp(-np.take_along_axis(logs, tokens[:, 1:, None], -1).mean())


def test_the_command_scores_the_models_the_merge_and_the_line_between_them(folder, capsys):
    out, report = folder / "merged", folder / "report.html"
    text = str(folder / "text.txt")
    arguments = ["merge", str(folder / "merge.yml"), str(out), "--evaluate", text, "--report"]
    arguments += [str(report), "--windows", "2x16", "--curve", "3", "--json"]
    assert main(arguments) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    places = {"first": "first", "second": "second", "the merged model": "merged"}
    assert list(scores["perplexity"]) == list(places)
    for label, place in places.items():
        want = _perplexity(folder / place, 2, 16)
        np.testing.assert_allclose(scores["perplexity"][label], want, rtol=1e-5)
    assert scores["alphas"] == [0.0, 0.5, 1.0]
    line = scores["curves"]["second"]
    # Halfway between the two models lies their mean.
    np.testing.assert_allclose(line[1], scores["perplexity"]["the merged model"], rtol=1e-6)
    assert abs(line[0] - line[2]) > 1e-3
    page = report.read_text()
    assert "2 windows of 16 tokens" in page and "second: the loss rises" in page


def test_a_scored_model_is_let_go_before_the_next_one_is_read(folder, monkeypatch):
    read, held = [], []

    def watch(name):
        method = getattr(Evaluator, name)

        def watched(self, what):
            held.append(sum(leaf() is not None for leaf in read))
            own, params = method(self, what)
            read.append(weakref.ref(jax.tree.leaves(params)[0]))
            return own, params

        monkeypatch.setattr(Evaluator, name, watched)

    watch("_model")
    watch("_merged")
    settings = Evaluation(str(folder / "text.txt"), windows=1, length=16, curve=3)
    run_merge(folder / "merge.yml", folder / "watched", evaluate=settings)
    assert held == [0, 1, 1]  # the first model is one end of every line


def test_a_layer_more_is_scored_but_lies_on_no_line(folder):
    part = lambda start, stop: {"sources": [{"model": "first", "layer_range": [start, stop]}]}  # noqa: E731
    config = {"merge_method": "passthrough", "slices": [part(0, 2), part(1, 2)]}
    path = write_config(folder, config, "deeper.yml")
    settings = Evaluation(str(folder / "text.txt"), windows=1, length=16, curve=3)
    scores = run_merge(path, folder / "deeper", evaluate=settings).scores
    assert scores is not None and list(scores.perplexity) == ["first", "the merged model"]
    assert not scores.curves


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"windows": 0}, "windows=0 must be at least 1"),
        ({"curve": 2}, "curve=2 must be at least 3"),
        ({"windows": 400}, "the text has .* tokens, but 400 windows of 512"),
        ({"text": "nowhere.txt"}, "'nowhere.txt': No such file"),
        ({"memory": 10**9}, "scores need two whole models"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_merge(folder, settings, words):
    memory = {"memory": settings.pop("memory")} if "memory" in settings else {}
    with pytest.raises(ValueError, match=words):
        evaluate = Evaluation(**{"text": str(folder / "text.txt")} | settings)
        run_merge(folder / "merge.yml", folder / "never", evaluate=evaluate, **memory)
    assert not (folder / "never").exists()


def test_a_model_without_perplexity_is_refused(folder):
    write_tiny(folder / "bert", BERT)
    config = {"merge_method": "passthrough", "models": [{"model": "bert"}]}
    path = write_config(folder, config, "bert.yml")
    with pytest.raises(ValueError, match="bert is a Bert, which has no perplexity"):
        run_merge(path, folder / "never", evaluate=Evaluation("pydoc-topics"))


def test_a_curve_without_a_text_is_refused(folder, capsys):
    assert main(["merge", str(folder / "merge.yml"), str(folder / "x"), "--curve", "5"]) == 1
    assert "--curve needs a text" in capsys.readouterr().err
