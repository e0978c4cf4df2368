"""Arcee fusion by slices of whole rows: quartiles of importances are found before any is copied."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._arcee_fusion import FusionMerge, cut_above, importance_of, quartile_ranks
from jaxweights.merge._delta_leaf import Compat
from jaxweights.merge._models import compute_dtype
from jaxweights.merge._per_leaf import check_count
from jaxweights.stream._jobs import Job
from jaxweights.stream._leaf import Leaf
from jaxweights.stream._ranks import Target
from jaxweights.stream._score_ranks import ScoreRanks, Scores
from jaxweights.stream._store import checked, stored
from jaxweights.stream._surveys import OfBlocks


def fusion_job(leaf: Leaf, merge: FusionMerge) -> Job | None:
    """The job that merges a leaf as `merge.arcee_fusion` does.

    Args:
      leaf: The leaf.
      merge: What is done.

    Returns:
      The job; None where only the whole leaf can be merged.
    """
    matrices, rows = leaf.matrices(merge.name), leaf.grouping(merge.name, "output")
    if matrices is None or rows is None or merge.output.rounding != "nearest":
        return None
    check_count(merge.name, len(leaf.operands) - 1, 1, 1, merge.remedy)
    along, behind = rows.along, rows.behind

    def scores(arrays: Sequence[Any]) -> np.ndarray:
        base, model = arrays
        return np.asarray(_scores(base, model, along=along, behind=behind, compat=merge.compat))

    survey = OfBlocks(
        functools.partial(_Quartiles, scores, matrices.block, merge.compat),
        matrices.before,
        matrices.block,
    )
    whisker = np.asarray(merge.whisker, compute_dtype(leaf.operands[0]))

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        low, median, high = survey.of(start).found()
        cut = _cut(low, median, high, whisker)
        merged = _copy_above(*arrays, scores(arrays), cut, dtype=leaf.dtype)
        return checked(leaf.name, leaf.operands, arrays, merged)

    return leaf.job(
        compute,
        matrices,
        temporaries=100,
        survey=survey,
        unit=along * behind,
    )


class _Quartiles(ScoreRanks):
    """Finds the quartiles of one layer's importances."""

    def __init__(self, scores: Scores, entries: int, compat: Compat):
        self._ranks = quartile_ranks(entries)
        self._targets = [Target(0, entries - rank + 1) for rank in self._ranks]
        # mergekit's divergences may be rounding noise.
        super().__init__(scores, self._targets, entries, signed=compat == "mergekit")

    def counted(self, positive: int, negative: int) -> None:
        for target, rank in zip(self._targets, self._ranks, strict=True):
            if rank <= negative:  # by magnitude, the smallest is the largest
                target.model, target.k = 1, rank

    def found(self) -> list[np.float32]:
        """The lower one, the median, and the upper one."""
        return [self.threshold(target) for target in self._targets]


@functools.partial(jax.jit, static_argnames=("along", "behind", "compat"))
def _scores(base: Any, model: Any, *, along: int, behind: int, compat: Compat) -> jax.Array:
    rows = [x.reshape(-1, along, behind) for x in (base, model)]
    return importance_of(*rows, axes=(1,), compat=compat).reshape(-1)


@jax.jit
def _cut(low: Any, median: Any, high: Any, whisker: Any) -> jax.Array:
    return cut_above(*(jnp.asarray(x) for x in (low, median, high, whisker)))


@functools.partial(jax.jit, static_argnames="dtype")
def _copy_above(base: Any, model: Any, scores: Any, cut: jax.Array, *, dtype: Any) -> jax.Array:
    old, new = (x.astype(scores.dtype) for x in (base, model))
    return stored(jnp.where(scores >= cut, new, old), dtype, old, new)
