"""Models with different vocabularies are merged token by token."""

import json

import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.recipes.mergekit import run_merge
from tests.recipes.mergekit._checkpoints import read, write_config

EMBED = "model.embed_tokens.weight"
BASE = ["a", "b", "c", "<eos>"]
MATH = ["<eos>", "c", "b", "a", "<math>"]
CHAT = [*BASE, "<chat>", "<math>"]


def _write(folder, name, tokens, seed, rows=None):
    added = [
        {"id": i, "content": token, "special": True}
        for i, token in enumerate(tokens)
        if token.startswith("<")
    ]
    vocab = {token: i for i, token in enumerate(tokens) if not token.startswith("<")}
    tokenizer = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": added}
    rows = rows or len(tokens)
    draws = np.random.default_rng(seed)
    tensors = {
        EMBED: draws.normal(size=(rows, 3)).astype(np.float32),
        "model.layers.0.up.weight": draws.normal(size=(4, 3)).astype(np.float32),
        "lm_head.weight": draws.normal(size=(rows, 3)).astype(np.float32),
    }
    files = {
        "config.json": json.dumps({"vocab_size": rows, "num_hidden_layers": 1}),
        "tokenizer.json": json.dumps(tokenizer),
    }
    write_safetensors(folder / name, tensors, files=files)
    return {tokens[i]: row for i, row in enumerate(tensors[EMBED][: len(tokens)])}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, {
        "base": _write(folder, "base", BASE, 0, rows=8),
        "math": _write(folder, "math", MATH, 1),
        "chat": _write(folder, "chat", CHAT, 2),
    }


def _merge(folder, name, tokenizer):
    config = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [
            {"model": "math", "parameters": {"weight": 1}},
            {"model": "chat", "parameters": {"weight": 1}},
        ],
        **tokenizer,
    }
    run_merge(write_config(folder, config, f"{name}.yml"), folder / name)
    files = folder / name
    tokens = json.loads((files / "tokenizer.json").read_text())
    ids = dict(tokens["model"]["vocab"])
    ids |= {entry["content"]: entry["id"] for entry in tokens["added_tokens"]}
    return read(files)[EMBED], ids, open_checkpoint(files).config


def test_a_union_has_every_token_and_rows_follow_their_tokens(rows):
    folder, own = rows
    merged, ids, config = _merge(folder, "union", {"tokenizer_source": "union"})
    assert set(ids) == {*BASE, "<math>", "<chat>"}
    assert config["vocab_size"] == len(merged) == 8  # the base's padding has room for both
    for token in BASE:
        want = (own["math"][token] + own["chat"][token]) / 2
        np.testing.assert_allclose(merged[ids[token]], want, rtol=1e-6, atol=1e-6)
    # Only one model has it: the other takes its row.
    np.testing.assert_allclose(merged[ids["<chat>"]], own["chat"]["<chat>"], rtol=1e-6, atol=1e-6)
    both = (own["math"]["<math>"] + own["chat"]["<math>"]) / 2
    np.testing.assert_allclose(merged[ids["<math>"]], both, rtol=1e-6, atol=1e-6)


def test_a_models_own_vocabulary_keeps_its_order(rows):
    folder, own = rows
    merged, ids, config = _merge(folder, "own", {"tokenizer_source": "math"})
    assert ids == {token: i for i, token in enumerate(MATH)}
    assert config["vocab_size"] == 5
    want = (own["math"]["a"] + own["chat"]["a"]) / 2
    np.testing.assert_allclose(merged[3], want, rtol=1e-6, atol=1e-6)


def test_tokens_beyond_the_rows_are_cut_off_a_list_whose_places_are_its_rows(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for name, words, rows in (("base", "abcxyz", 4), ("other", "abcx!", 5)):
        _write(tmp_path, name, list(words), 0, rows=rows)
        model = {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [[word, -float(i)] for i, word in enumerate(words)],
        }
        file = tmp_path / name / "tokenizer.json"
        file.write_text(json.dumps({"model": model, "added_tokens": []}))
    config = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("base", "other")],
        "tokenizer_source": "union",
    }
    run_merge(write_config(tmp_path, config), tmp_path / "merged")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "merged" / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    assert ids == {"a": 0, "b": 1, "c": 2, "x": 3, "!": 4}
    merged, other = read(tmp_path / "merged")[EMBED], read(tmp_path / "other")[EMBED]
    assert len(merged) == 5
    np.testing.assert_allclose(merged[ids["!"]], other[4], rtol=1e-6, atol=1e-6)


def test_rules_choose_the_row_of_a_token(rows):
    folder, own = rows
    tokens = {
        "<chat>": {"source": {"kind": "model_token", "model": "math", "token": "<math>"}},
        "<math>": {"source": "math", "force": True},
        "b": {"source": {"kind": "zero"}, "force": True},
    }
    rule = {"tokenizer": {"source": "union", "tokens": tokens, "pad_to_multiple_of": 16}}
    merged, ids, config = _merge(folder, "rules", rule)
    assert config["vocab_size"] == len(merged) == 16
    np.testing.assert_allclose(merged[ids["<math>"]], own["math"]["<math>"], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(merged[ids["b"]], 0)
    # Padding that the base has no rows for is the mean of all tokens.
    mean = np.mean([merged[i] for i in ids.values()], axis=0)
    np.testing.assert_allclose(merged[8:], np.tile(mean, (8, 1)), rtol=1e-5, atol=1e-6)
    want = (own["chat"]["<chat>"] + own["math"]["<math>"]) / 2
    np.testing.assert_allclose(merged[ids["<chat>"]], want, rtol=1e-6, atol=1e-6)


def test_a_rule_for_a_token_that_is_not_there_is_refused(rows):
    folder, _ = rows
    tokens = {"x": {"source": {"kind": "model_token", "model": "math", "token": "<nope>"}}}
    with pytest.raises(ValueError, match=r"math has no token '<nope>'"):
        _merge(folder, "refused", {"tokenizer": {"tokens": tokens}})


def test_a_model_without_a_tokenizer_is_named(rows):
    folder, _ = rows
    (folder / "chat" / "tokenizer.json").rename(folder / "chat" / "hidden")
    try:
        with pytest.raises(ValueError, match=r"'chat' has no tokenizer.json"):
            _merge(folder, "never", {"tokenizer_source": "union"})
    finally:
        (folder / "chat" / "hidden").rename(folder / "chat" / "tokenizer.json")


def test_a_real_number_of_tokens_takes_no_quadratic_time(tmp_path):
    tokens = [f"t{i}" for i in range(60_000)]
    for seed, name in enumerate(("base", "math", "chat")):
        _write(tmp_path, name, tokens[::-1] if name == "math" else tokens, seed)
    merged, ids, _ = _merge(tmp_path, "large", {"tokenizer_source": "union"})
    own = {n: open_checkpoint(tmp_path / n).read(EMBED) for n in ("math", "chat")}
    np.testing.assert_allclose(merged, (own["math"][::-1] + own["chat"]) / 2, rtol=0, atol=1e-6)
    assert len(ids) == 60_000
