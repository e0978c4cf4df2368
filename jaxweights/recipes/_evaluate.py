"""Measures: perplexity of a language model, retrieval of a sentence encoder."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Report = Callable[[str, int, int], None]

# Words of a document that ask, and those right behind them that must be found.
_QUERY, _TARGET = slice(200, 240), slice(240, 280)
WORDS_NEEDED = 280
# Encoders see at most this many tokens of a passage, as sentence-transformers gives MiniLM.
_MAX_PASSAGE_TOKENS = 256
_WIDTH = 16


@dataclasses.dataclass(frozen=True)
class PerplexityScore:
    """Perplexity and what it was measured on.

    Attributes:
      perplexity: exp of `nll`.
      nll: Mean negative log-likelihood, in nats a token.
      error: Standard error of `nll` over windows; 0 for one window.
      tokens: Tokens that were predicted.
      windows: Mean negative log-likelihood of each window.
    """

    perplexity: float
    nll: float
    error: float
    tokens: int
    windows: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class RetrievalScore:
    """Retrieval and what it was measured on.

    Attributes:
      recall_at_1: Share of the queries whose own passage came first.
      mrr: Mean of 1 / rank of the own passage.
      cosine: Mean cosine between these embeddings and the reference's; 1 without a reference.
      documents: Passages that were searched.
    """

    recall_at_1: float
    mrr: float
    cosine: float
    documents: int


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


def perplexity(
    fn: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    tokens: np.ndarray,
    *,
    batch: int = 1,
    progress: Report | None = None,
    task: str = "Measuring perplexity",
) -> PerplexityScore:
    """Exponential of the mean negative log-likelihood over windows that do not overlap.

    Every token of a window but its first is predicted from those before it in the same window;
    the mean is over all predicted tokens.

    Args:
      fn: `fn(params, tokens)` gives logits `(batch, time, vocab)`; for represented weights, lift
        it first. One function is compiled once, for all models of its architecture.
      params: What `fn` takes.
      tokens: `(windows, time)`, integers.
      batch: Windows at a time.
      progress: Called with (task, windows done, windows in all).
      task: What progress calls it.

    Returns:
      The score.

    Raises:
      ValueError: If the model gives logits that are not finite.

    Example:
      >>> def uniform(params, tokens):
      ...     return jnp.zeros((*tokens.shape, 50))
      >>> round(perplexity(uniform, {}, np.zeros((2, 8), np.int32)).perplexity, 4)
      50.0
    """
    count = len(tokens)
    batch = min(batch, count)
    found: list[float] = []
    for rows in equal_batches(tokens, batch):
        found += np.asarray(_nll_of(fn, params, jnp.asarray(rows)), np.float64).tolist()
        if progress is not None:
            progress(task, min(len(found), count), count)
    # The last batch is filled up.
    return score_windows(np.asarray(found[:count]), tokens.shape[1])


def score_windows(nll: np.ndarray, length: int) -> PerplexityScore:
    """The score of windows of so many tokens.

    Args:
      nll: Mean negative log-likelihood of each, `(windows,)`.
      length: Tokens of each.

    Returns:
      The score.

    Raises:
      ValueError: If one is not finite.

    Example:
      >>> score_windows(np.array([1.0, 2.0]), 5).tokens
      8
    """
    count = len(nll)
    if not np.isfinite(nll).all():
        raise ValueError(
            f"recipes.perplexity: {int((~np.isfinite(nll)).sum())} of {count} windows gave a "
            "likelihood that is not finite. Some weight is not finite, or far too large."
        )
    mean = float(nll.mean())
    error = float(nll.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0
    scored = count * (length - 1)
    # exp overflows beyond 709 nats, which only a broken model reaches.
    return PerplexityScore(math.exp(min(mean, 700.0)), mean, error, scored, tuple(nll.tolist()))


@functools.partial(jax.jit, static_argnums=0)
def _nll_of(fn: Callable[[Any, jax.Array], jax.Array], params: Any, window: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of each window, `(batch,)`."""
    return nll_of_logits(fn(params, window), window)


def nll_of_logits(logits: jax.Array, window: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of windows `(batch, time)` under logits, `(batch,)`."""
    logits = logits[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, window[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked, axis=-1)


def relative_change(before: PerplexityScore, after: PerplexityScore) -> tuple[float, float]:
    """How much larger one perplexity is than another of the same windows.

    Both saw the same text, so what is hard in it cancels: the change is surer than either.

    Args:
      before: The reference.
      after: The other.

    Returns:
      The relative change, and its standard error over windows (0 for one window).

    Raises:
      ValueError: If they are of different windows.

    Example:
      >>> old = PerplexityScore(2.718, 1.0, 0.0, 2, (0.5, 1.5))
      >>> new = PerplexityScore(4.482, 1.5, 0.0, 2, (1.0, 2.0))
      >>> change, error = relative_change(old, new)
      >>> round(change, 3), error
      (0.649, 0.0)
    """
    if len(before.windows) != len(after.windows):
        raise ValueError(
            f"recipes.relative_change: {len(before.windows)} and {len(after.windows)} windows. "
            "Compare scores of the same windows."
        )
    differences = np.subtract(after.windows, before.windows)
    ratio = math.exp(min(float(differences.mean()), 700.0))
    count = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return ratio - 1.0, ratio * error


def passages(documents: Sequence[str], *, count: int) -> tuple[list[str], list[str]]:
    """Queries and the passages right behind them, one pair a document.

    Args:
      documents: Documents; those of fewer than 280 words are passed over.
      count: How many are wanted.

    Returns:
      Words 200 to 240 of each document, and its words 240 to 280.

    Raises:
      ValueError: If there are too few documents of that length.

    Example:
      >>> queries, targets = passages([" ".join(str(i) for i in range(300))], count=1)
      >>> targets[0].split()[0]
      '240'
    """
    split = [document.split() for document in documents]
    fitting = [words for words in split if len(words) >= WORDS_NEEDED]
    if len(fitting) < count:
        raise ValueError(
            f"recipes.passages: {count} documents of at least {WORDS_NEEDED} words are asked for, "
            f"but the text has {len(fitting)}. Ask for fewer documents, or take another text."
        )
    join = lambda part: [" ".join(words[part]) for words in fitting[:count]]  # noqa: E731
    return join(_QUERY), join(_TARGET)


def embed(
    fn: Callable[[Any, jax.Array, jax.Array], jax.Array],
    params: Any,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    batch: int = 50,
    progress: Report | None = None,
    task: str = "Embedding",
) -> np.ndarray:
    """Embeds texts, a few compiled programs serving all of them.

    Args:
      fn: `fn(params, tokens, attention_mask)` gives `(batch, hidden)`.
      params: What `fn` takes.
      texts: Texts; of each, the first 256 tokens are read.
      tokenizer: The model's.
      batch: Texts at a time.
      progress: Called with (task, texts done, texts in all).
      task: What progress calls it.

    Returns:
      `(texts, hidden)`, float32.

    Example:
      >>> import tokenizers
      >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"be": 0, "to": 1}, "to"))
      >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
      >>> table = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> mean = lambda table, tokens, mask: jnp.einsum(
      ...     "bth,bt->bh", table[tokens], mask / mask.sum(1, keepdims=True)
      ... )
      >>> embed(mean, table, ["to be", "be be be"], tokenizer, batch=2)
      array([[0.5, 0.5],
             [1. , 0. ]], dtype=float32)
    """
    encoded = [_truncated(item.ids) for item in tokenizer.encode_batch(list(texts))]
    compiled = jax.jit(fn)
    # Like lengths go together, in widths that are multiples of 16: little padding, few programs.
    order = np.argsort([len(ids) for ids in encoded], kind="stable")
    found: list[np.ndarray] = [np.empty(0)] * len(encoded)
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        width = -(-max(len(encoded[i]) for i in members) // _WIDTH) * _WIDTH
        tokens = np.zeros((batch, width), np.int32)
        mask = np.zeros((batch, width), bool)
        for row, i in enumerate(members):
            tokens[row, : len(encoded[i])] = encoded[i]
            mask[row, : len(encoded[i])] = True
        mask[len(members) :, 0] = True  # rows that only fill the last batch
        rows = np.asarray(compiled(params, tokens, mask), np.float32)
        for row, i in enumerate(members):
            found[i] = rows[row]
        if progress is not None:
            progress(task, start + len(members), len(order))
    return np.stack(found)


def retrieval(
    queries: np.ndarray, targets: np.ndarray, *, reference: np.ndarray | None = None
) -> RetrievalScore:
    """Scores how well each query finds its own target among all by cosine.

    A target that ties with others ranks behind them: embeddings that collapse to one point find
    nothing.

    Args:
      queries: `(n, hidden)`, of unit length.
      targets: `(n, hidden)`, of unit length; row i belongs to query i.
      reference: `(2n, hidden)`: queries and targets of the model that these are compared with.

    Returns:
      The score.

    Raises:
      ValueError: If an embedding is not finite.

    Example:
      >>> retrieval(np.eye(3), np.eye(3)).recall_at_1
      1.0
    """
    both = np.concatenate([queries, targets])
    if not np.isfinite(both).all():
        raise ValueError(
            "recipes.retrieval: some embeddings are not finite. Some weight is not finite, or far "
            "too large."
        )
    similarity = queries @ targets.T
    own = np.diagonal(similarity)[:, None]
    rank = (similarity >= own).sum(axis=1)
    cosine = 1.0 if reference is None else float((both * reference).sum(axis=1).mean())
    return RetrievalScore(
        recall_at_1=float((rank == 1).mean()),
        mrr=float((1.0 / rank).mean()),
        cosine=cosine,
        documents=len(queries),
    )


def _truncated(ids: list[int]) -> list[int]:
    if len(ids) <= _MAX_PASSAGE_TOKENS:
        return ids
    return [*ids[: _MAX_PASSAGE_TOKENS - 1], ids[-1]]  # the closing token stays


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
