"""SCE slice by slice: variances are ranked, and energies summed, before deltas are added."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._models import compute_dtype
from jaxweights.merge._sce import (
    AGREEING,
    MERGEKIT_ENERGY,
    SceMerge,
    add_agreeing,
    count_selected,
    variance_of,
)
from jaxweights.merge._sphere import vectors_of
from jaxweights.stream._jobs import Job, Survey
from jaxweights.stream._leaf import Leaf
from jaxweights.stream._program import slice_program
from jaxweights.stream._ranks import Target, among
from jaxweights.stream._score_ranks import ScoreRanks
from jaxweights.stream._store import checked, stored
from jaxweights.stream._sums import PartialSums, folded
from jaxweights.stream._surveys import InTurn, OfBlocks

_RUN = 1 << 12  # entries that are summed together


def sce_job(leaf: Leaf, merge: SceMerge) -> Job | None:
    """The job that merges a leaf as `merge.sce` does.

    Args:
      leaf: The leaf.
      merge: What is done.

    Returns:
      The job; None where only the whole leaf can be merged.
    """
    matrices = leaf.matrices(merge.name)
    if matrices is None or merge.output.rounding != "nearest":
        return None
    wide = compute_dtype(leaf.operands[0])
    agreement = _Agreement(leaf, merge)
    survey = OfBlocks(
        functools.partial(_Layer, merge, agreement, matrices.block),
        matrices.before,
        matrices.block,
    )

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        base, *models = arrays
        own = survey.of(start)
        variance, bound = own.selected(leaf.name, start, arrays)
        weights = own.energies.shares(merge).astype(wide)
        merged = _merge_slice(base, models, variance, bound, weights, dtype=leaf.dtype)
        return checked(leaf.name, leaf.operands, arrays, merged)

    n = len(leaf.operands) - 1
    return leaf.job(
        compute,
        matrices,
        temporaries=8 * n + 24,
        survey=survey,
        unit=_RUN,
    )


@jax.jit
def _variance(base: Any, models: list[Any]) -> jax.Array:
    return variance_of(vectors_of(base, models, deltas=True))


def _variances(arrays: Sequence[Any]) -> np.ndarray:
    """What is ranked of a slice."""
    return np.asarray(_variance(arrays[0], list(arrays[1:])))


@jax.jit
def _changed(base: Any, models: list[Any]) -> jax.Array:
    deltas = vectors_of(base, models, deltas=True)
    return functools.reduce(jnp.logical_or, [jnp.any(delta != 0) for delta in deltas])


def _kept(base: Any, models: list[Any], variance: Any, bound: Any) -> list[jax.Array]:
    deltas = vectors_of(base, models, deltas=True)
    if variance is None:
        return deltas
    mask = among(variance, bound)
    return [jnp.where(mask, delta, 0) for delta in deltas]


@jax.jit
def _energies(
    base: Any, models: list[Any], variance: Any, bound: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """A unit, and the sums of squares in it of what was selected, by runs and in parts."""
    kept = _kept(base, models, variance, bound)
    top = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(delta)) for delta in kept])
    # A power of two, so that no square rounds otherwise than in another unit.
    bits = jax.lax.bitcast_convert_type(top.astype(jnp.float32), jnp.uint32)
    power = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)
    unit = jnp.where((power > 0) & jnp.isfinite(power), power, 1).astype(top.dtype)
    return unit, [folded(jnp.square(delta / unit).reshape(-1, _RUN)) for delta in kept]


@functools.partial(slice_program, static_argnames="dtype")
def _merge_slice(
    base: Any, models: list[Any], variance: Any, bound: Any, weights: jax.Array, *, dtype: Any
) -> jax.Array:
    kept = _kept(base, models, variance, bound)
    merged = add_agreeing(base, kept, [weights[i] for i in range(len(models))])
    return stored(merged, dtype, *vectors_of(base, models, deltas=True))


class _Agreement:
    """Warns of a tensor whose models hardly differ, when all its layers are counted."""

    def __init__(self, leaf: Leaf, merge: SceMerge):
        self._leaf, self._merge = leaf, merge
        self._counted = self._equal = 0
        self._changed = False

    def add(self, entries: int, varying: int, changed: bool) -> None:
        """Takes in what was counted in a layer."""
        self._counted += entries
        self._equal += entries - varying
        self._changed |= changed
        total = self._leaf.entries
        if self._counted == total and self._changed and self._equal > AGREEING * total:
            self._merge.warn([self._leaf.name])


class _Layer(InTurn):
    """Selection, where it selects, then energies of one layer."""

    def __init__(self, merge: SceMerge, agreement: _Agreement, entries: int):
        self.selection = _Selection(merge, agreement, entries) if merge.density < 1 else None
        self.energies = _Energies(self, entries)
        super().__init__(*([self.selection] if self.selection else []), self.energies)

    def selected(
        self, name: str, start: int, arrays: Sequence[Any]
    ) -> tuple[Any, np.ndarray | None]:
        """Variances of a slice, and the bound of those that are selected; None where all are."""
        if self.selection is None:
            return None, None
        scores = _variances(arrays)
        return scores, self.selection.bound_in(self.selection.target, name, start, scores)


class _Selection(ScoreRanks):
    """Finds the largest variances of one layer, ties to the first in flat order."""

    def __init__(self, merge: SceMerge, agreement: _Agreement, entries: int):
        self._merge, self._agreement, self._all = merge, agreement, entries
        self.target = Target(0, 0)  # how many is known after the first pass
        super().__init__(_variances, [self.target], entries)
        self._changed = False

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        return bool(_changed(arrays[0], list(arrays[1:]))), super().look(job, start, count, arrays)

    def add(self, job: Job, start: int, seen: Any) -> None:
        changed, ranked = seen
        self._changed |= changed
        super().add(job, start, ranked)

    def counted(self, positive: int, negative: int) -> None:
        del negative
        self._agreement.add(self._all, positive, self._changed)
        share = self._merge.density
        if self._merge.compat == "mergekit":
            self.target.k = int(np.floor(np.float32(share) * np.float32(positive)))
        else:
            self.target.k = int(count_selected(float(share), self._all))


class _Energies(Survey):
    """Sums of squares of each model's selected deltas."""

    def __init__(self, layer: _Layer, entries: int):
        self._layer, self._entries = layer, entries
        self._sums = PartialSums()

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> np.ndarray:
        variance, bound = self._layer.selected(job.name, start, arrays)
        unit, parts = _energies(arrays[0], list(arrays[1:]), variance, bound)
        real = -(-count // _RUN)
        sums = [np.asarray(part)[:real].sum(axis=1, dtype=np.float64) for part in parts]
        return np.stack(sums) * float(unit) ** 2

    def add(self, job: Job, start: int, seen: np.ndarray) -> None:
        del job, start
        self._sums.add(seen)

    def decide(self) -> bool:
        return False

    def shares(self, merge: SceMerge) -> np.ndarray:
        """Each model's share of the mean squares, `(models,)`."""
        energies = self._sums.total() / max(self._entries, 1)
        total = energies.sum()
        least = MERGEKIT_ENERGY if merge.compat == "mergekit" else 0
        if total <= 0 or total < least:
            return np.full(energies.size, 1 / energies.size)
        return energies / total
