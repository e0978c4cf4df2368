"""Tokenizers from metadata: how text is cut, merged, and put together again."""

from __future__ import annotations

import pytest

from jaxweights.models import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXT = "I'll pay 1234 at 10:30!!\n\n  Grüße, 世界 🎉\tend "
CONTROL, NORMAL = 3, 1


def metadata(pre="smollm", **extra):
    """All 256 bytes, a few merges, and a begin and an end token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["a b", "Ġ ab", "1 2", "3 4", "12 34", "! !", "' l", "'l l", "! Ċ"]
    merges += ["h e", "he l", "hel l", "hell o"]
    tokens = ["<s>", "</s>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL] + [NORMAL] * (len(tokens) - 2),
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_text_comes_back_from_its_tokens(pre):
    tokenizer = load_tokenizer(metadata(pre))
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


@pytest.mark.parametrize(
    "pre, numbers",
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["12", "3", "4"]),
        ("gpt-2", ["1234"]),
    ],
)
def test_numbers_are_cut_as_the_model_saw_them(pre, numbers):
    assert load_tokenizer(metadata(pre)).encode("1234").tokens == numbers


def test_contractions_and_punctuation_are_cut_as_the_model_saw_them():
    assert load_tokenizer(metadata("llama-bpe")).encode("I'll!!\n").tokens[1:] == [
        "'ll",
        "!!",
        "Ċ",
    ]
    assert load_tokenizer(metadata("llama-bpe")).encode("!\n").tokens == ["!Ċ"]
    assert load_tokenizer(metadata("smollm")).encode("!\n").tokens == ["!", "Ċ"]


def test_merges_are_applied_and_special_tokens_are_kept_whole():
    tokenizer = load_tokenizer(metadata())
    encoding = tokenizer.encode("<s>hello ab</s>")
    assert encoding.tokens == ["<s>", "hello", "Ġab", "</s>"]
    assert tokenizer.decode(encoding.ids) == "hello ab"


def test_begin_and_end_tokens_are_added_where_the_metadata_ask():
    ends = dict(add_bos_token=True, bos_token_id=0, add_eos_token=True, eos_token_id=1)
    tokenizer = load_tokenizer(metadata(**ends))
    assert tokenizer.encode("ab").tokens == ["<s>", "ab", "</s>"]
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]
    only_begin = metadata(add_bos_token=True, bos_token_id=0, eos_token_id=1)
    assert load_tokenizer(only_begin).encode("ab").tokens == ["<s>", "ab"]
    assert load_tokenizer(metadata(bos_token_id=0)).encode("ab").tokens == ["ab"]


def test_a_tokenizer_file_is_read_without_its_fixed_length(tmp_path):
    tokenizer = load_tokenizer(metadata())
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        assert len(load_tokenizer(source).encode("x" * 200).ids) == 200


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": "llama"}, r"tokenizer.ggml.model='llama' is not supported. Supported: 'gpt2'"),
        ({"pre": "deepseek"}, r"tokenizer.ggml.pre='deepseek' is not supported. Supported: 'dbrx'"),
        ({"merges": ["q q"]}, r"tokenizer.ggml.merges has 'q q', which joins no two"),
        ({"tokens": ["a", "a"], "merges": []}, r"lists 1 tokens twice"),
        ({"add_bos_token": True}, r"the metadata add bos tokens but tokenizer.ggml.bos_token_id"),
    ],
)
def test_metadata_that_give_no_tokenizer_are_refused(change, words):
    with pytest.raises(ValueError, match=f"models.load_tokenizer: .*{words}"):
        load_tokenizer(metadata(**change))


def test_a_path_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.json and no GGUF file"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TypeError, match="source is a int"):
        load_tokenizer(3)
