"""Perplexity of a language model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.recipes._download import Progress
from jaxweights.recipes._tokens import equal_batches


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


def perplexity(
    fn: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    tokens: np.ndarray,
    *,
    batch: int = 1,
    progress: Progress | None = None,
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
