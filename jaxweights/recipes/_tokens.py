"""Texts as arrays of tokens: windows, sequences and their batches."""

from __future__ import annotations

from typing import Any

import numpy as np


def special_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts around a text: begin tokens, or [CLS] and [SEP]."""
    return list(tokenizer.encode("").ids)


def windows(text: str, tokenizer: Any, *, count: int, length: int) -> np.ndarray:
    """Cuts the beginning of a text into windows that do not overlap.

    Where the tokenizer begins every text with a token, so does every window, as its first.

    Args:
      text: The text.
      tokenizer: The model's.
      count: Windows.
      length: Tokens each.

    Returns:
      `(count, length)`, int32.

    Raises:
      ValueError: If the text has too few tokens.

    Example:
      >>> import tokenizers
      >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"be": 0, "to": 1}, "to"))
      >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
      >>> windows("to be to be be", tokenizer, count=2, length=2)
      array([[1, 0], [1, 0]], dtype=int32)
    """
    begin = special_tokens(tokenizer)
    payload = length - len(begin)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if payload < 1 or len(ids) < count * payload:
        raise ValueError(
            f"recipes.windows: the text has {len(ids)} tokens, but {count} windows of {length} "
            f"need {count * max(payload, 1)}. Ask for fewer or shorter "
            "windows, or give a longer text."
        )
    cut = np.asarray(ids[: count * payload], np.int32).reshape(count, payload)
    return np.concatenate([np.tile(np.asarray(begin, np.int32), (count, 1)), cut], axis=1)


def sequences(
    text: str, tokenizer: Any, *, count: int, length: int, close: bool = False
) -> np.ndarray:
    """Takes sequences from places evenly spread over a text; they do not overlap.

    Args:
      text: The text.
      tokenizer: The model's.
      count: Sequences.
      length: Tokens each, those that the tokenizer adds included.
      close: Whether the model expects what the tokenizer puts behind a text, too (an encoder).

    Returns:
      `(count, length)`, int32, without padding.

    Raises:
      ValueError: If the text is too short.

    Example:
      >>> import tokenizers
      >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"be": 0, "to": 1}, "to"))
      >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
      >>> sequences("to to to to be be be be", tokenizer, count=2, length=2)
      array([[1, 1], [0, 0]], dtype=int32)
    """
    special = special_tokens(tokenizer)
    begin, end = (special[:1], special[1:]) if close else (special, [])
    payload = length - len(begin) - len(end)
    stride = len(text) // count
    starts = [_next_word(text, i * stride) for i in range(count)]
    pieces = [text[start : start + min(stride, 16 * length)] for start in starts]
    encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    short = [i for i, piece in enumerate(encoded) if len(piece.ids) < payload]
    if short or payload < 1:
        raise ValueError(
            f"recipes.sequences: the text has {len(text)} characters, too few for {count} "
            f"sequences of {length} tokens side by side: {len(short)} of them came out shorter. "
            "Ask for fewer or shorter sequences, or give a longer text."
        )
    rows = [[*begin, *piece.ids[:payload], *end] for piece in encoded]
    return np.asarray(rows, np.int32)


def equal_batches(rows: np.ndarray, batch: int) -> list[np.ndarray]:
    """Batches of one size, so that one program serves all; the last is filled with its end."""
    missing = -len(rows) % batch
    filled = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
    return list(filled.reshape(-1, batch, *rows.shape[1:]))


def _next_word(text: str, position: int) -> int:
    """Where the next word begins, so that no sequence starts inside one."""
    if position == 0:
        return 0
    space = text.find(" ", position)
    return position if space < 0 else space + 1
