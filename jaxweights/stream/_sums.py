"""Sums over slices that lose little."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

RUN = 1 << 17  # entries that are summed together; it divides every piece that is not smaller
# XLA adds long slices faster than it reduces on a CPU, and four better than eight.
_FOLDS = (4, 4, 4)


def partial_sums(x: jax.Array) -> jax.Array:
    """Sums of 64 entries each, `(runs, sums)`: so short that float32 loses little."""
    return folded(x.reshape(-1, min(RUN, x.size)))


def folded(rows: jax.Array) -> jax.Array:
    """Sums of up to 64 entries each along the axis 1, which becomes so much shorter."""
    for fold in _FOLDS:
        if rows.shape[1] % fold:
            break
        length = rows.shape[1] // fold
        slices = [rows[:, i * length : (i + 1) * length] for i in range(fold)]
        # The barrier keeps XLA from making one huge loop body of all.
        rows = jax.lax.optimization_barrier(functools.reduce(jnp.add, slices))
    return rows


class PartialSums:
    """Sums of a tensor from partial sums of its slices, the same however its runs are cut apart."""

    def __init__(self) -> None:
        """Nothing is summed yet."""
        self._runs: list[np.ndarray] = []

    def add(self, seen: np.ndarray) -> None:
        """Takes in the next slice's `run_sums`."""
        self._runs.append(seen)

    def total(self) -> np.ndarray:
        """`(sums,)` float64."""
        return np.concatenate(self._runs, axis=1).sum(axis=1)


def run_sums(parts: Sequence[jax.Array]) -> np.ndarray:
    """Sums of every run, `(sums, runs)` float64, from several `partial_sums`."""
    return np.stack([np.asarray(part).sum(axis=1, dtype=np.float64) for part in parts])
