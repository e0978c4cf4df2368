"""Norms of deltas, and of what ranking keeps of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._delta_leaf import Row, delta_of
from jaxweights.stream._jobs import Job, Survey
from jaxweights.stream._norm_sums import norms_of_runs, run_norms
from jaxweights.stream._program import slice_program
from jaxweights.stream._ranks import among
from jaxweights.stream._sums import RUN, partial_sums, run_sums

Bounds = Callable[[Job, int, Sequence[Any]], np.ndarray]


def kept_by_rank(delta: jax.Array, bounds: Any, row: Row) -> jax.Array:
    """Which entries of a slice ranking keeps.

    Args:
      delta: A model's, flat.
      bounds: `(2, 2)`, of what is kept or dropped from the top, and of the latter.
      row: The method's row of the table.

    Returns:
      The mask.
    """
    through, top = bounds
    keep = among(delta, through)
    return keep & ~among(delta, top) if row.sparsifier == "outliers" else keep


class RankedNorms(Survey):
    """Finds the norms of each model's delta, and of what ranking keeps of it.

    Args:
      bounds: Gives those of a slice, when ranks are known.
      row: The method's row of the table.
    """

    def __init__(self, bounds: Bounds, row: Row):
        """Nothing is summed yet."""
        self._bounds = bounds
        self._row = row
        self._runs: list[np.ndarray] = []

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> np.ndarray:
        """What a slice adds to the norms, in runs."""
        del count
        base, *models = arrays
        bounds = self._bounds(job, start, arrays)
        pairs, kind = zip(models, bounds, strict=True), self._row.rescale
        if kind == "l1":
            norms = [_l1_norms(base, model, own, row=self._row) for model, own in pairs]
            return np.concatenate([run_sums(parts) for parts in norms])
        run = min(RUN, base.size)
        sizes = [_sizes(base, model, own, row=self._row) for model, own in pairs]
        return np.stack([run_norms(size, run, kind) for both in sizes for size in both])

    def add(self, job: Job, start: int, seen: np.ndarray) -> None:
        """Takes in what was seen."""
        del job, start
        self._runs.append(seen)

    def decide(self) -> bool:
        """One pass is enough."""
        return False

    def factors(self) -> np.ndarray:
        """What restores each norm, `(models,)`."""
        whole, left = norms_of_runs(self._runs, self._row.rescale).reshape(-1, 2).T
        return np.where(left > 0, whole / np.where(left > 0, left, 1), 1)


@functools.partial(slice_program, static_argnames="row")
def _l1_norms(base: Any, model: Any, bounds: Any, *, row: Row) -> tuple[jax.Array, jax.Array]:
    # See `_delta._partial_norms`.
    sums = partial_sums(jax.lax.complex(*_magnitudes(base, model, bounds, row)))
    return sums.real, sums.imag


@functools.partial(slice_program, static_argnames="row")
def _sizes(base: Any, model: Any, bounds: Any, *, row: Row) -> tuple[jax.Array, jax.Array]:
    return _magnitudes(base, model, bounds, row)


def _magnitudes(base: Any, model: Any, bounds: Any, row: Row) -> tuple[jax.Array, jax.Array]:
    """Magnitudes, and those that are kept."""
    delta = delta_of(base, model)
    size = jnp.abs(delta)
    return size, jnp.where(kept_by_rank(delta, bounds, row), size, 0)
