"""Tokenizers as `tokenizer.json` holds them: their tokens, with some added or taken out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxweights.recipes._yaml import RecipeError
from jaxweights.recipes.mergekit._models import Model

_TOKENIZER = "tokenizer.json"


def tokens_of(model: Model) -> dict[str, int]:
    """Index of every token of a model."""
    return _read_tokens(tokenizer_of(model), model.label)


def tokenizer_of(model: Model) -> dict[str, Any]:
    """A model's tokenizer."""
    file = model.files.get(_TOKENIZER)
    if file is None:
        raise RecipeError(
            f"model {model.label!r} has no {_TOKENIZER}, so its rows cannot be matched to tokens. "
            "Save its tokenizer with the library that made it, or leave 'tokenizer_source' out."
        )
    text = Path(file).read_text(encoding="utf-8") if isinstance(file, Path) else str(file)
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecipeError(f"model {model.label!r}: {_TOKENIZER} is damaged: {error}.") from None


def _read_tokens(tokenizer: Mapping[str, Any], label: str) -> dict[str, int]:
    vocab = tokenizer.get("model", {}).get("vocab")
    if isinstance(vocab, dict):
        found = {str(token): int(i) for token, i in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: pairs of a token and its score
        found = {str(entry[0]): i for i, entry in enumerate(vocab)}
    else:
        raise RecipeError(f"model {label!r}: {_TOKENIZER} holds no vocabulary that is known.")
    added = tokenizer.get("added_tokens") or []
    return found | {str(token["content"]): int(token["id"]) for token in added}


def with_tokens(
    tokenizer: dict[str, Any], numbered: Mapping[str, int], others: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A tokenizer that knows more tokens: added ones as such, others in its vocabulary."""
    added = {
        str(entry["content"]): entry
        for other in others
        for entry in other.get("added_tokens") or []
    }
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    result = json.loads(json.dumps(tokenizer))
    vocab = result["model"]["vocab"]
    for token, i in numbered.items():
        if token in added or not isinstance(vocab, dict):
            entry = added.get(token, {"content": token, "special": False, **plain})
            result.setdefault("added_tokens", []).append(entry | {"id": i})
        else:
            vocab[token] = i
    return result


def only_tokens(tokenizer: dict[str, Any], kept: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer without the tokens that have no row, and without the merges that make them."""
    model = tokenizer["model"]
    added = tokenizer.get("added_tokens") or []
    vocab, merges = model.get("vocab"), model.get("merges")
    changed: dict[str, Any] = {}
    if isinstance(vocab, dict):
        changed["vocab"] = {token: i for token, i in vocab.items() if token in kept}
    elif isinstance(vocab, list):  # Unigram: a token's row is its place, so the end is cut off
        changed["vocab"] = vocab[: max(kept.values(), default=-1) + 1]
        if (model.get("unk_id") or 0) >= len(changed["vocab"]):
            changed["unk_id"] = None
    if isinstance(merges, list) and len(changed.get("vocab", vocab)) < len(vocab):
        parts = [m.split(" ") if isinstance(m, str) else m for m in merges]
        changed["merges"] = [
            merge
            for merge, (left, right) in zip(merges, parts, strict=True)
            if {left, right, left + right} <= kept.keys()
        ]
    added = [entry for entry in added if entry["content"] in kept]
    return tokenizer | {"model": model | changed, "added_tokens": added}
