"""The delta merges of `jaxweights.merge`, slice by slice: ranks and norms are surveyed first."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._delta import DeltaMerge
from jaxweights.merge._delta_leaf import LeafPlan, Row, add_deltas, delta_of
from jaxweights.merge._delta_tree import Thinning
from jaxweights.merge._models import compute_dtype
from jaxweights.stream._delta_settings import DeltaSettings, delta_settings
from jaxweights.stream._draws import drawn_bits, kept, words_of
from jaxweights.stream._jobs import Job, Operand, Survey
from jaxweights.stream._leaf import Leaf
from jaxweights.stream._program import slice_program
from jaxweights.stream._ranked_norms import RankedNorms, kept_by_rank
from jaxweights.stream._ranks import RankSurvey, Target
from jaxweights.stream._signs import Signs, sum_of
from jaxweights.stream._store import checked, stored
from jaxweights.stream._sums import PartialSums, partial_sums, run_sums
from jaxweights.stream._surveys import InTurn, OfBlocks

# Bits of draws that are kept from the survey of a tensor until it is made; more are drawn anew.
_MOST_KEPT = 1 << 27


def delta_job(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    operands: Sequence[Operand],
    settings: DeltaSettings,
    ranks: DeltaRanks | None = None,
    layers: int = 1,
) -> Job:
    """The job that merges a tensor of the base, the first operand, with those of the models.

    Args:
      name: Of the tensor that is written.
      shape: Of it.
      dtype: Of it.
      operands: The base's tensor and those of the models.
      settings: What is done.
      ranks: What ranks this tensor together with others; None ranks it by itself.
      layers: Number of equal parts of it that are ranked each by itself.

    Returns:
      The job.
    """
    row, block = settings.row, math.prod(shape) // max(layers, 1)
    survey: DeltaRanks | OfBlocks[_Layer] | _DeltaNorms | None = ranks
    thins = [density < 1 for density in settings.density]
    ranked = row.sparsifier in ("magnitude", "outliers") and any(thins)
    if survey is None and (ranked or row.asks_majority):
        survey = OfBlocks(functools.partial(_Layer, settings, block), layers, block)
    elif row.sparsifier == "bernoulli" and row.rescale == "l1" and any(thins):
        survey = _DeltaNorms(settings, name, math.prod(shape))
    n = len(settings.weights)

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        base, *models = arrays
        wide = compute_dtype(base)
        count = base.size
        bounds = np.zeros((n, 2, 2), np.uint32)
        masks: list[Any] = [None] * n
        factors, sign = np.ones(n), None
        layer = survey.of(start) if isinstance(survey, OfBlocks) else None
        own = survey if isinstance(survey, DeltaRanks) else layer and layer.ranks
        if own is not None:
            bounds = own.bounds(job, start, arrays)
            sign = own.sign if layer is None or layer.signs is None else layer.signs.sign
        norms = survey if isinstance(survey, _DeltaNorms) else layer and layer.norms
        if norms is not None:
            factors = norms.factors()
        if row.sparsifier == "bernoulli":
            drawn = survey.drawn(start) if isinstance(survey, _DeltaNorms) else None
            masks = drawn or _drawn(settings, name, start, count)
            if row.rescale == "inverse_density":
                factors = np.array([1 / chance if chance else 0 for chance in settings.density])
        numbers = _Numbers(
            np.asarray(settings.weights, wide),
            np.asarray(factors, wide),
            np.asarray(settings.scale, wide),
            bounds,
        )
        merged = _merge_slice(
            base, tuple(models), numbers, tuple(masks), sign, row=row, dtype=dtype
        )
        return checked(name, operands, arrays, merged)

    job = Job(
        name,
        shape,
        dtype,
        tuple(operands),
        compute,
        entrywise=True,
        temporaries=10 * n,
        survey=survey,
        kept=-(-n // 8) if isinstance(survey, _DeltaNorms) and survey.keeps else 0,
        block=block if layers > 1 else None,
    )
    return job


def layered_delta_job(leaf: Leaf, merge: DeltaMerge) -> Job | None:
    """The job that merges a leaf whose layers are ranked each by itself.

    Args:
      leaf: The leaf.
      merge: What is done.

    Returns:
      The job; None where only the whole leaf can be merged.
    """
    row = merge.row
    if (
        row.scope != "leaf"
        or row.sparsifier not in ("magnitude", "outliers")
        or row.rescale == "inverse_density"
        or merge.output.rounding != "nearest"
    ):
        return None
    matrices = leaf.matrices(merge.name)  # which refuses what only these methods cannot merge
    if matrices is None:
        return None
    operands = leaf.operands
    settings = delta_settings(merge, [operand.label for operand in operands[1:]], leaf.seed)
    layers = matrices.before
    return delta_job(leaf.name, leaf.shape, leaf.dtype, operands, settings, layers=layers)


def _drawn(settings: DeltaSettings, name: str, start: int, count: int) -> list[np.ndarray | None]:
    """What chance keeps of each model's slice, as `words_of`; None where that is all."""

    def words(density: float, model: str) -> np.ndarray | None:
        if density >= 1:
            return None
        bits = drawn_bits(density, settings.seed, name, model, start, count)
        return words_of(bits, start, count)

    return list(map(words, settings.density, settings.models))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Numbers:
    # Host arrays: placing each by itself takes longer than the call that reads them.
    weights: Any  # (models,)
    factors: Any  # (models,), rescaling what was kept
    scale: Any
    bounds: Any  # (models, 2, 2): of what is kept or dropped from the top, and of the latter


@functools.partial(slice_program, static_argnames=("row", "dtype"))
def _merge_slice(
    base: Any,
    models: tuple[Any, ...],
    numbers: _Numbers,
    masks: tuple[Any, ...],
    sign: jax.Array | None,
    *,
    row: Row,
    dtype: Any,
) -> jax.Array:
    deltas = [delta_of(base, model) for model in models]
    sparse = [_thinned(delta, i, numbers, masks[i], row) for i, delta in enumerate(deltas)]
    new = add_deltas(
        base, sparse, numbers.weights, numbers.scale, row=row, plan=LeafPlan((), ()), sign=sign
    )
    return stored(new, dtype, *(deltas if row.drops_entries else ()))


def _thinned(delta: jax.Array, i: int, numbers: _Numbers, mask: Any, row: Row) -> jax.Array:
    if mask is not None:
        return kept(delta, mask) * numbers.factors[i]
    if row.sparsifier not in ("magnitude", "outliers"):
        return delta
    keep = kept_by_rank(delta, numbers.bounds[i], row)
    return jnp.where(keep, delta, 0) * numbers.factors[i]


def _ranked_delta(arrays: Sequence[Any], i: int) -> Any:
    base, model = arrays[0], arrays[i + 1]
    wide = compute_dtype(base)
    return (model.astype(wide) - base.astype(wide)).astype(np.float32)


class DeltaRanks(RankSurvey):
    """Which entries of each delta are among the largest, and which sign most entries elect.

    Args:
      settings: What is done.
      entries: Number of entries that are ranked together.
      elects: Whether signs are elected by what ranking leaves, where most of them decide.
    """

    def __init__(self, settings: DeltaSettings, entries: int, *, elects: bool = True):
        """Starts with nothing seen."""
        self._settings = settings
        self._elects = elects and settings.row.asks_majority
        self._skipped: list[Target] = []
        self._through: list[Target] = []
        for i, (density, outliers) in enumerate(
            zip(settings.density, settings.outliers, strict=True)
        ):
            skip, kept = 0, entries
            if density < 1:
                thinning = Thinning(density=density, outliers=outliers, trim=1.0)
                skip, kept = thinning.counts(entries, density, settings.row.compat)
            self._skipped.append(Target(i, skip))
            self._through.append(Target(i, skip + kept))
        super().__init__(_ranked_delta, [*self._skipped, *self._through], entries)
        self._electing = False
        self._sum = 0.0

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        """As in `RankSurvey`; then the sum of the elected signs of a slice."""
        if not self._electing:
            return super().look(job, start, count, arrays)
        return sum_of(self.elected(np.ones(len(arrays) - 1), job, start, arrays), count)

    def elected(
        self, factors: np.ndarray, job: Job, start: int, arrays: Sequence[Any]
    ) -> jax.Array:
        """Signs that the entries of a slice elect when what ranking leaves has some factors."""
        base, *models = arrays
        wide, row = compute_dtype(base), self._settings.row
        numbers = _Numbers(
            np.asarray(self._settings.weights, wide),
            np.asarray(factors, wide),
            np.asarray(1, wide),
            self.bounds(job, start, arrays),
        )
        return _elected(base, tuple(models), numbers, row=row)

    def add(self, job: Job, start: int, seen: Any) -> None:
        """Takes in what was seen."""
        if self._electing:
            self._sum += seen
        else:
            super().add(job, start, seen)

    def decide(self) -> bool:
        """As in `RankSurvey`; signs are elected by what ranking leaves, in a pass of their own."""
        if self._electing:
            return False
        if super().decide():
            return True
        self._electing = self._elects
        return self._electing

    @property
    def sign(self) -> jax.Array | None:
        """Sum of the elected signs of all entries, where it decides about those that tie."""
        return jnp.float32(self._sum) if self._elects else None

    def bounds(self, job: Job, start: int, arrays: Sequence[Any]) -> np.ndarray:
        """What tells the kept entries of a slice from others, as `_Numbers.bounds`."""
        found = [
            [self.bound(target, job, start, arrays) for target in (through, top)]
            for through, top in zip(self._through, self._skipped, strict=True)
        ]
        return np.array(found, np.int64).astype(np.uint32)


class _Layer(InTurn):
    """What is known of one layer before it is made: ranks, and norms where they are restored.

    Where most signs decide, they are elected by what is restored.
    """

    def __init__(self, settings: DeltaSettings, entries: int):
        row = settings.row
        restores = row.rescale in ("l1", "l2", "linf")
        self.ranks = DeltaRanks(settings, entries, elects=not restores)
        self.norms = RankedNorms(self.ranks.bounds, row) if restores else None
        self.signs = Signs(self._elected) if restores and row.asks_majority else None
        also = (survey for survey in (self.norms, self.signs) if survey is not None)
        super().__init__(self.ranks, *also)

    def _elected(self, job: Job, start: int, arrays: Sequence[Any]) -> jax.Array:
        assert self.norms is not None
        return self.ranks.elected(self.norms.factors(), job, start, arrays)


@functools.partial(slice_program, static_argnames="row")
def _elected(base: Any, models: tuple[Any, ...], numbers: _Numbers, *, row: Row) -> jax.Array:
    """Sign of the weighted sum of the thinned deltas, int8."""
    total = sum(
        numbers.weights[i] * _thinned(delta_of(base, model), i, numbers, None, row)
        for i, model in enumerate(models)
    )
    return jnp.sign(jnp.asarray(total)).astype(jnp.int8)


class _DeltaNorms(Survey):
    """L1 norms of each delta, and of what chance leaves of it; keeps the draws of small tensors."""

    def __init__(self, settings: DeltaSettings, name: str, entries: int):
        self._settings = settings
        self._name = name
        self.keeps = entries * len(settings.weights) <= _MOST_KEPT
        self._sums = PartialSums()
        self._drawn: dict[int, list[np.ndarray | None]] = {}

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> np.ndarray:
        base, *models = arrays
        drawn = _drawn(self._settings, self._name, start, base.size)
        if self.keeps:
            self._drawn[start] = drawn
        norms = [
            _partial_norms(base, model, words) for model, words in zip(models, drawn, strict=True)
        ]
        return np.concatenate([run_sums(parts) for parts in norms])

    def add(self, job: Job, start: int, seen: np.ndarray) -> None:
        self._sums.add(seen)

    def decide(self) -> bool:
        return False

    def drawn(self, start: int) -> list[np.ndarray | None] | None:
        """The masks of a slice, once; None where they were not kept."""
        return self._drawn.pop(start, None)

    def factors(self) -> np.ndarray:
        """What restores each norm."""
        whole, left = self._sums.total().reshape(-1, 2).T
        return np.where(left > 0, whole / np.where(left > 0, left, 1), 1)


@slice_program
def _partial_norms(base: Any, model: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    """Sums of |delta| in parts, and of what a mask keeps of it.

    Both are the parts of one complex sum: a CPU's program for two sums would read and widen
    everything twice, or write the widened deltas to memory.
    """
    size = jnp.abs(delta_of(base, model))
    if mask is None:
        sums = partial_sums(size)
        return sums, sums
    sums = partial_sums(jax.lax.complex(size, kept(size, mask)))
    return sums.real, sums.imag
