"""Ranks of magnitudes within rows that lie whole in a slice."""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 16  # entries that are ranked together, so that they stay in a core's cache


def row_ranks(patterns: np.ndarray, along: int, behind: int) -> np.ndarray:
    """Sum of the first and the last rank, from 0, of the entries that equal each one.

    So equal magnitudes share the mean of their ranks, as `merge._delta_leaf.rank_shares` has it.

    Args:
      patterns: Unsigned patterns that order as the magnitudes do, flat, `(entries,)` uint32.
      along: Length of a row.
      behind: Number of rows whose entries lie among each other.

    Returns:
      `(entries,)` int32.
    """
    found = np.empty(patterns.size, np.int32)
    ours, theirs = (x.reshape(-1, along, behind) for x in (patterns, found))
    if behind == 1:
        step = max(_CHUNK // along, 1)
        for i in range(0, len(ours), step):
            theirs[i : i + step, :, 0] = _ranks(ours[i : i + step, :, 0])
        return found
    step = max(_CHUNK // along, 1)
    for block, out in zip(ours, theirs, strict=True):
        for i in range(0, behind, step):
            out[:, i : i + step] = _ranks(np.ascontiguousarray(block[:, i : i + step].T)).T
    return found


def _ranks(patterns: np.ndarray) -> np.ndarray:
    """Those of rows, `(rows, along)`."""
    n = patterns.shape[1]
    # Sorted with their places, in one number each: NumPy sorts integers by vector instructions.
    sorted_ = (patterns.astype(np.uint64) << np.uint64(32)) | np.arange(n, dtype=np.uint64)
    sorted_.sort(axis=1)
    places = (sorted_ & np.uint64(0xFFFFFFFF)).astype(np.int64)
    values = (sorted_ >> np.uint64(32)).astype(np.uint32)
    differs = values[:, 1:] != values[:, :-1]
    edge = np.ones((len(values), 1), bool)
    place = np.arange(n, dtype=np.int32)
    first = np.maximum.accumulate(np.where(np.hstack([edge, differs]), place, 0), axis=1)
    ends = np.where(np.hstack([differs, edge]), place, n)
    last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    found = np.empty(patterns.shape, np.int32)
    np.put_along_axis(found, places, first + last, axis=1)
    return found
