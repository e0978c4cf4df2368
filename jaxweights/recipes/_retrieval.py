"""Retrieval: how well a sentence encoder finds the passage that belongs to a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxweights.recipes._download import Progress

# Words of a document that ask, and those right behind them that must be found.
_QUERY, _TARGET = slice(200, 240), slice(240, 280)
WORDS_NEEDED = 280
# Encoders see at most this many tokens of a passage, as sentence-transformers gives MiniLM.
_MAX_PASSAGE_TOKENS = 256
_WIDTH = 16


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
    progress: Progress | None = None,
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
