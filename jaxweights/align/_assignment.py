"""The exact linear assignment, on the host."""

from __future__ import annotations

import numpy as np


def best_assignment(similarity: np.ndarray) -> tuple[np.ndarray, float]:
    """Pairs rows with columns so that the sum of the pairs' similarities is largest.

    Args:
      similarity: `(n, n)`, finite.

    Returns:
      The column of every row, int32, and how much more than the diagonal the pairs sum to, in
      float64. Where nothing is gained, the pairs are the diagonal and the gain is 0.

    Source: Crouse 2016, On implementing 2D rectangular assignment algorithms, as in SciPy.
    Differs: (1) if every row's largest entry is in a column of its own, no search is made.
      (2) rows and columns are first reduced by their best entries, which changes no optimum and
      spares much of the search.
    """
    n = len(similarity)
    rows = np.arange(n, dtype=np.int32)
    best = similarity.argmax(axis=1).astype(np.int32)
    if np.bincount(best, minlength=n).max(initial=0) > 1:
        best = _solve(similarity)
    diagonal = similarity.diagonal().astype(np.float64)
    gain = float((similarity[rows, best].astype(np.float64) - diagonal).sum())
    scale = float(np.abs(diagonal).sum() + np.abs(similarity[rows, best]).sum(dtype=np.float64))
    # Relative, so that the unit of the weights does not matter.
    return (best, gain) if gain > 1e-12 * scale else (rows, 0.0)


def _solve(similarity: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    # A difference of two float32 is taken in float64, where it loses next to nothing.
    cost = similarity.max(axis=1, keepdims=True).astype(np.float64) - similarity
    cost -= cost.min(axis=0)
    return linear_sum_assignment(cost)[1].astype(np.int32)
