"""Tokenizers from `tokenizer.json` and from the metadata of GGUF files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ASKER = "models.load_tokenizer"
# Kinds of token in GGUF.
_CONTROL, _USER_DEFINED = 3, 4
# How text is cut before merging, by GGUF's name for it. "llama" numbers come in threes and "qwen"
# numbers one by one; both keep contractions, and punctuation with the line break behind it.
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(source: Any) -> Tokenizer:
    """Makes the tokenizer that belongs to a checkpoint.

    Args:
      source: A `Pretrained`, a path to a `tokenizer.json`, a GGUF file or a folder with either, or
        the metadata of a GGUF file.

    Returns:
      A `tokenizers.Tokenizer` that neither pads nor truncates; its special tokens are recognised.

    Raises:
      ImportError: If the package `tokenizers` is not installed.
      FileNotFoundError: If there is no tokenizer at the path.
      ValueError: If the GGUF metadata describe a tokenizer that is not supported.

    Example:
      >>> import tempfile, tokenizers
      >>> file = Path(tempfile.mkdtemp()) / "tokenizer.json"
      >>> made = tokenizers.Tokenizer(
      ...     tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
      ... )
      >>> made.save(str(file))
      >>> load_tokenizer(file).encode("abb").ids
      [2, 1]
    """
    _require_package()
    from tokenizers import Tokenizer

    if isinstance(source, Mapping):
        return _from_gguf(source)
    path = _path(source)
    if path.suffix == ".gguf":
        from jaxweights.checkpoint import open_checkpoint

        return _from_gguf(open_checkpoint(path).metadata)
    tokenizer = Tokenizer.from_file(str(path))
    # Some files fix a length, which silently cuts long texts: that is the caller's choice.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _require_package() -> None:
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{_ASKER}: needs the package 'tokenizers'. Run `pip install tokenizers`."
        ) from error


def _path(source: Any) -> Path:
    if hasattr(source, "tokenizer_path"):
        if source.tokenizer_path is None:
            raise FileNotFoundError(
                f"{_ASKER}: the checkpoint '{source.source.path}' came without a tokenizer. "
                "Give the path of its tokenizer.json."
            )
        return source.tokenizer_path
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"{_ASKER}: source is a {type(source).__name__}. Give a Pretrained, a path or the "
            "metadata of a GGUF file."
        )
    path = Path(source)
    if path.is_dir():
        found = [path / "tokenizer.json"] if (path / "tokenizer.json").is_file() else []
        found += sorted(path.glob("*.gguf"))
        if not found:
            raise FileNotFoundError(f"{_ASKER}: '{path}' holds no tokenizer.json and no GGUF file.")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{_ASKER}: '{path}' does not exist.")
    return path


def _from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """A byte-level BPE tokenizer; GGUF stores the vocabulary and names the way text is cut."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"{_ASKER}: tokenizer.ggml.model={kind!r} is not supported. Supported: 'gpt2' "
            "(byte-level BPE). Give the path of the model's tokenizer.json instead."
        )
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    _check_vocabulary(tokens, vocabulary, merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    marked = list(zip(tokens, kinds, strict=False))
    tokenizer.add_special_tokens([t for t, k in marked if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in marked if k == _USER_DEFINED])
    _add_ends(tokenizer, tokens, metadata)
    return tokenizer


def _check_vocabulary(
    tokens: list[str], vocabulary: dict[str, int], merges: list[tuple[str, ...]]
) -> None:
    if len(vocabulary) != len(tokens):
        raise ValueError(
            f"{_ASKER}: tokenizer.ggml.tokens lists {len(tokens) - len(vocabulary)} tokens twice. "
            "The file is damaged."
        )
    for merge in merges:
        if len(merge) != 2 or "".join(merge) not in vocabulary:
            raise ValueError(
                f"{_ASKER}: tokenizer.ggml.merges has {' '.join(merge)!r}, which joins no two "
                "parts to a token. The file is damaged."
            )


def known_cuts() -> dict[str, Callable[[], Any]]:
    """Ways to cut a text before its parts are merged, by the names that GGUF has for them."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel

    def cut(numbers: str) -> Any:
        split = pre_tokenizers.Split(Regex(_CUT % numbers), behavior="isolated")
        return pre_tokenizers.Sequence([split, byte_level(add_prefix_space=False, use_regex=False)])

    def digits_alone() -> Any:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level(add_prefix_space=False)])

    def plain() -> Any:
        return byte_level(add_prefix_space=False)

    return {
        "gpt-2": plain,
        "olmo": plain,
        "smollm": digits_alone,
        "llama-bpe": lambda: cut(r"\p{N}{1,3}"),
        "llama3": lambda: cut(r"\p{N}{1,3}"),
        "dbrx": lambda: cut(r"\p{N}{1,3}"),
        "qwen2": lambda: cut(r"\p{N}"),
    }


def _pre_tokenizer(name: str) -> Any:
    ways = known_cuts()
    if name not in ways:
        raise ValueError(
            f"{_ASKER}: tokenizer.ggml.pre={name!r} is not supported. Supported: "
            f"{', '.join(map(repr, sorted(ways)))}. Give the path of the model's tokenizer.json."
        )
    return ways[name]()


def _add_ends(tokenizer: Tokenizer, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    """Puts begin and end tokens around a text where the metadata ask for them."""
    from tokenizers import processors

    ends = {
        end: metadata.get(f"tokenizer.ggml.{end}_token_id")
        for end in ("bos", "eos")
        if metadata.get(f"tokenizer.ggml.add_{end}_token")
    }
    missing = [end for end, index in ends.items() if index is None or index >= len(tokens)]
    if missing:
        raise ValueError(
            f"{_ASKER}: the metadata add {missing[0]} tokens but tokenizer.ggml.{missing[0]}"
            "_token_id names none of the vocabulary. The file is damaged."
        )
    if not ends:
        return
    around = {end: tokens[index] for end, index in ends.items() if index is not None}
    template = [around.get("bos"), "$A", around.get("eos")]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=[part for part in template if part],
                special_tokens=[(around[end], ends[end]) for end in around],
            ),
        ]
    )
