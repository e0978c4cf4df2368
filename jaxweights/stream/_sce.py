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
from jaxweights.stream._ranks import RankSurvey, Target, among
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
    return Job(
        leaf.name,
        leaf.shape,
        leaf.dtype,
        leaf.operands,
        compute,
        entrywise=True,
        temporaries=8 * n + 24,
        survey=survey,
        unit=_RUN,
        block=matrices.block if matrices.before > 1 else None,
    )


@jax.jit
def _variance(base: Any, models: list[Any]) -> jax.Array:
    return variance_of(vectors_of(base, models, deltas=True))


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


@functools.partial(jax.jit, static_argnames="dtype")
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
        variance = np.asarray(_variance(arrays[0], list(arrays[1:])))
        return variance, self.selection.bound_in(name, start, variance)


class _Selection(RankSurvey):
    """Finds the largest variances of one layer, ties to the first in flat order.

    Variances are computed by one program wherever they are compared. Entries without variance are
    counted, not ranked: there may be more of them than can be kept.
    """

    def __init__(self, merge: SceMerge, agreement: _Agreement, entries: int):
        self._merge, self._agreement, self._all = merge, agreement, entries
        self._target = Target(0, 1)  # how many is known after the first pass
        super().__init__(_itself, [self._target], entries)
        self._counting = True
        self._changed = False
        self._varying: dict[int, int] = {}  # entries with a variance, by slice
        self._sizes: dict[int, int] = {}

    def reads(self, model: int) -> tuple[int, ...]:
        """The variances alone."""
        return (0,)

    @property
    def samples(self) -> bool:
        """Never: the pass that samples counts all entries, too."""
        return False

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        base, models = arrays[0], list(arrays[1:])
        variance = np.asarray(_variance(base, models))
        counted = None
        if self._counting:
            varying = int(np.count_nonzero(variance[:count]))
            counted = count, varying, bool(_changed(base, models))
            if not self._sampling:
                return counted, None
        return counted, super().look(job, start, count, [variance])

    def add(self, job: Job, start: int, seen: Any) -> None:
        counted, ranked = seen
        if counted is not None:
            self._sizes[start], self._varying[start], changed = counted
            self._changed |= changed
        if ranked is not None:
            super().add(job, start, ranked)

    def decide(self) -> bool:
        if not self._counting:
            return super().decide()
        self._counting = False
        varying = sum(self._varying.values())
        self._agreement.add(self._all, varying, self._changed)
        share = self._merge.density
        if self._merge.compat == "mergekit":
            self._wanted = int(np.floor(np.float32(share) * np.float32(varying)))
        else:
            self._wanted = int(count_selected(float(share), self._all))
        self._target.k = self._wanted
        if not 0 < self._wanted < varying:
            self._open = []
            return False
        return super().decide() if self._sampling else True

    def bound_in(self, name: str, start: int, variance: np.ndarray) -> np.ndarray:
        """What `among` tells the selected entries of a slice by."""
        varying = sum(self._varying.values())
        if self._wanted < varying or self._wanted == 0:
            threshold = self._target.threshold
            last = self.last(self._target, (name, start), [variance])
        else:
            # All that vary, and the first of the others.
            pairs = ((self._sizes[s], self._varying[s]) for s in self._sizes if s < start)
            left = self._wanted - varying - sum(size - number for size, number in pairs)
            equal = np.flatnonzero(variance[: self._sizes[start]] == 0)
            taken = min(max(left, 0), equal.size)
            threshold, last = 0, int(equal[taken - 1]) if taken else -1
        return np.array([threshold, last], np.int64).astype(np.uint32)


def _itself(arrays: Sequence[Any], model: int) -> Any:
    del model
    return arrays[0]  # a function that all surveys share, so that they share its programs


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
