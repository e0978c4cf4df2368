"""What `analyze.deltas` tells, of checkpoints that are read slice by slice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._rank_search import magnitude_bits
from jaxweights.merge._models import compute_dtype
from jaxweights.stream._flow import Flow, look_at, take_in
from jaxweights.stream._jobs import Job, Operand, Piece, cut
from jaxweights.stream._memory import Budget
from jaxweights.stream._meter import Meter, Progress
from jaxweights.stream._program import slice_program
from jaxweights.stream._ranks import RankSurvey, Target
from jaxweights.stream._store import refuse_nonfinite
from jaxweights.stream._sums import partial_sums

_TASK = "Comparing deltas"
_NOTHING = np.dtype("V0")  # what is written of a tensor
# A smaller sum of squares of a slice may have lost entries whose squares are below float32's range.
_SMALLEST_SQUARE = 1e-26


@dataclasses.dataclass(frozen=True)
class DeltaRequest:
    """One tensor whose deltas are compared.

    Args:
      name: What it is called.
      operands: The origin, then the models.
      kept: How many of its largest entries are asked after, for each model; None asks nothing.
    """

    name: str
    operands: tuple[Operand, ...]
    kept: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class DeltaStats:
    """Sums over one tensor, and what follows from them.

    Attributes:
      name: Name of the tensor.
      shape: Its shape.
      origin: What the origin's checkpoint is called.
      models: What the models' are called.
      origin_square: Sum of squares of the origin.
      gram: `(models, models)`, products of the deltas.
      conflicts: Number of entries that some model raises and another lowers.
      kept: Sum of squares of each delta's largest entries; None where it was not asked after.
    """

    name: str
    shape: tuple[int, ...]
    origin: str
    models: tuple[str, ...]
    origin_square: float
    gram: np.ndarray
    conflicts: int
    kept: np.ndarray | None

    @property
    def relative_norm(self) -> np.ndarray:
        """`(models,)`, |delta| / |origin|; infinite where only the origin is zero."""
        norms, whole = np.sqrt(np.diagonal(self.gram)), np.sqrt(self.origin_square)
        none = np.where(norms > 0, np.inf, 0)
        return norms / whole if whole > 0 else none

    @property
    def cosine(self) -> np.ndarray:
        """`(models, models)`; 0 where a delta is zero."""
        return cosines(self.gram)

    @property
    def sign_conflict(self) -> float:
        """Share of all entries that some model raises and another lowers."""
        return self.conflicts / max(int(np.prod(self.shape, dtype=np.int64)), 1)

    @property
    def kept_energy(self) -> np.ndarray | None:
        """`(models,)`, share of each delta's sum of squares; 1 for a delta of zeros."""
        if self.kept is None:
            return None
        squares = np.diagonal(self.gram)
        share = self.kept / np.where(squares > 0, squares, 1)
        return np.where(squares > 0, np.minimum(share, 1), 1)


def cosines(gram: np.ndarray) -> np.ndarray:
    """Cosines from products; 0 where one of the vectors is zero."""
    norms = np.sqrt(np.diagonal(gram))
    safe = np.where(norms > 0, norms, 1)
    found = np.clip(gram / safe[:, None] / safe[None, :], -1, 1)
    np.fill_diagonal(found, norms > 0)
    return found


def delta_stats(
    requests: Sequence[DeltaRequest],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[DeltaStats]:
    """Compares the deltas of every tensor, in one pass over the operands.

    Tensors that are longer than a slice and whose largest entries are asked after are read twice.

    Args:
      requests: The tensors.
      limit: Most bytes that slices in flight may hold; None gives them half a gigabyte.
      progress: Called with (task, bytes done, bytes in all).

    Returns:
      What was found, in the order of the requests.

    Raises:
      ValueError: If values are not finite.
    """
    budget = Budget(limit)
    surveys = [_Survey(request) for request in requests]
    once: list[Piece] = []  # no slice of these waits for another
    again: list[tuple[_Survey, list[Piece]]] = []
    for survey in surveys:
        pieces = list(cut(survey.job, budget.limit // 4))
        if len(pieces) > 1 and survey.ranks:
            again.append((survey, pieces))
        else:
            once += pieces
    jobs = [survey.job for survey in surveys]
    report = None if progress is None else lambda _, done, total: progress(_TASK, done, total)
    with Flow(budget, Meter(jobs, jobs, report)) as flow:
        flow.run_pieces(once, _look_once, _add_once)
        for survey, pieces in again:
            is_open = True
            while is_open:
                flow.run_pieces(pieces, look_at, take_in)
                is_open = survey.decide()
    return [survey.found() for survey in surveys]


def _look_once(piece: Piece, arrays: list[Any]) -> Any:
    """Looks at a slice; at a whole tensor as often as it takes."""
    if piece.start or not piece.is_last:
        return look_at(piece, arrays)
    survey = piece.job.survey
    assert survey is not None
    is_open = True
    while is_open:
        take_in(piece, look_at(piece, arrays))
        is_open = survey.decide()
    return None


def _add_once(piece: Piece, seen: Any) -> None:
    if seen is not None:
        take_in(piece, seen)


def _never(arrays: Sequence[Any], start: int) -> Any:
    raise AssertionError("what is only looked at is not made")


class _Survey(RankSurvey):
    """Sums over a tensor in the first pass; then what the largest entries hold."""

    def __init__(self, request: DeltaRequest):
        self._request = request
        operands = request.operands
        n = len(operands) - 1
        self.job = Job(
            request.name,
            operands[0].shape,
            _NOTHING,
            operands,
            _never,
            entrywise=True,
            temporaries=8 + (0 if request.kept is None else 6 * n),
            survey=self,
        )
        self._targets = [Target(i, k) for i, k in enumerate(request.kept or ())]
        self._energy = np.zeros(len(self._targets))
        self._counted = False
        self._square = 0.0
        self._gram = np.zeros((n, n))
        self._conflicts = 0
        super().__init__(_delta, self._targets, max(self.job.entries, 1))

    @property
    def ranks(self) -> bool:
        """Whether largest entries have yet to be found."""
        return bool(self._open)

    @property
    def samples(self) -> bool:
        """Never: the pass that samples sums up all entries, too."""
        return False

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        sums = None if self._counted else self._sums(arrays)
        highs = [target.high for target in self._open]
        above = None
        if self._open and not self._sampling:
            above = [
                _total(_squares_above(arrays[0], arrays[t.model + 1], jnp.uint32(high)))
                for t, high in zip(self._open, highs, strict=True)
            ]
        return sums, above, super().look(job, start, count, arrays)

    def add(self, job: Job, start: int, seen: Any) -> None:
        sums, above, ranked = seen
        if sums is not None:
            self._square += sums[0]
            self._gram += sums[1]
            self._conflicts += sums[2]
        if above is not None:
            for target, energy in zip(self._open, above, strict=True):
                self._energy[target.model] += energy
        super().add(job, start, ranked)

    def decide(self) -> bool:
        self._counted = True
        if self._sampling or not self._open:
            return super().decide()
        brackets = {
            target.model: (
                target.k - target.above,
                np.concatenate([seen.inside for seen in target.seen.values()]),
                *(target.at_ends()[:1]),
                target.high,
            )
            for target in self._open
        }
        is_open = super().decide()
        for model, (left, values, at_high, high) in brackets.items():
            target = self._targets[model]
            if target in self._open:  # the bracket missed, so all is counted again
                self._energy[model] = 0
                continue
            larger = values[values > target.threshold]
            topmost = at_high if high > target.threshold else 0
            ties = left - larger.size - topmost
            self._energy[model] += _square_sum(larger)
            for pattern, number in ((high, topmost), (target.threshold, ties)):
                square = _square_sum(np.array([pattern], np.uint32)) if number else 0
                self._energy[model] += number * square
        return is_open

    def found(self) -> DeltaStats:
        """What was found."""
        kept = None
        if self._request.kept is not None:
            kept = np.array(
                [
                    self._gram[t.model, t.model] if t.k >= self.job.entries else energy
                    for t, energy in zip(self._targets, self._energy, strict=True)
                ]
            )
        origin, *models = self._request.operands
        return DeltaStats(
            name=self._request.name,
            shape=self.job.shape,
            origin=origin.label,
            models=tuple(model.label for model in models),
            origin_square=self._square,
            gram=self._gram,
            conflicts=self._conflicts,
            kept=kept,
        )

    def _sums(self, arrays: Sequence[Any]) -> tuple[float, np.ndarray, int]:
        """The origin's sum of squares, products of all pairs of deltas, and conflicts."""
        base, *models = arrays
        n = len(models)
        gram = np.zeros((n, n))
        # Pair by pair: differences cost less than keeping them.
        for i in range(n):
            for j in range(i, n):
                gram[i, j] = gram[j, i] = _total(_products(base, models[i], models[j]))
        square = _total(_squares(base))
        squares = np.array([square, *np.diagonal(gram)])
        if not np.isfinite(squares).all() or ((squares > 0) & (squares < _SMALLEST_SQUARE)).any():
            square, gram = self._wide_sums(arrays)
        conflicts = 0
        if n > 1:
            conflicts = int(np.count_nonzero(np.asarray(_conflicts(base, tuple(models)))))
        return square, gram, conflicts

    def _wide_sums(self, arrays: Sequence[Any]) -> tuple[float, np.ndarray]:
        """In float64, for the few slices whose squares leave the range of float32."""
        base, *models = (np.asarray(array).astype(np.float64) for array in arrays)
        if not all(np.isfinite(array).all() for array in (base, *models)):
            refuse_nonfinite(self._request.name, self._request.operands, arrays)
        deltas = np.stack([model - base for model in models])
        return float(base @ base), deltas @ deltas.T


def _delta(arrays: Any, model: int) -> Any:
    base, other = arrays[0], arrays[model + 1]
    wide = compute_dtype(base)
    return (other.astype(wide) - base.astype(wide)).astype(np.float32)


def _difference(base: Any, model: Any) -> jax.Array:
    wide = compute_dtype(base)
    return model.astype(wide) - base.astype(wide)


@slice_program
def _products(base: Any, first: Any, second: Any) -> jax.Array:
    return partial_sums(_difference(base, first) * _difference(base, second))


@slice_program
def _squares(base: Any) -> jax.Array:
    return partial_sums(jnp.square(base.astype(compute_dtype(base))))


@slice_program
def _conflicts(base: Any, models: tuple[Any, ...]) -> jax.Array:
    raised = lowered = jnp.zeros(base.shape, bool)
    for model in models:
        delta = _difference(base, model)
        raised, lowered = raised | (delta > 0), lowered | (delta < 0)
    return raised & lowered


@slice_program
def _squares_above(base: Any, model: Any, high: jax.Array) -> jax.Array:
    delta = _delta((base, model), 0)
    return partial_sums(jnp.where(magnitude_bits(delta) > high, delta * delta, 0))


def _total(parts: jax.Array) -> float:
    with np.errstate(invalid="ignore"):  # what left the range of float32 is summed up anew
        return float(np.asarray(parts).sum(dtype=np.float64))


def _square_sum(patterns: np.ndarray) -> float:
    """Sum of squares of floats by their patterns."""
    values = patterns.view(np.float32).astype(np.float64)
    return float(values @ values)
