"""Spherical merges slice by slice: lengths and distances of vectors are surveyed first.

One vector may be a whole tensor, or a row, a column or a layer of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._models import compute_dtype
from jaxweights.merge._sphere import LEAST_SQUARE, Length, Measuring, Vectors
from jaxweights.merge._spherical import SphereMerge
from jaxweights.stream._grouping import Grouping
from jaxweights.stream._jobs import Job, Operand, Survey
from jaxweights.stream._program import slice_program
from jaxweights.stream._store import checked, stored
from jaxweights.stream._sums import folded

# Of so many models, lengths and distances take one pass over the operands instead of two.
_MOST_PAIRED = 4
# Where what is left of a difference is less, it is measured itself.
_LEFT = 1 / 16


def sphere_job(
    name: str,
    dtype: np.dtype,
    operands: Sequence[Operand],
    merge: SphereMerge,
    grouping: Grouping,
) -> Job:
    """The job that merges a tensor of the tree, the first operand, with those of the models.

    Args:
      name: Of the tensor that is written.
      dtype: Of it.
      operands: The tree's tensor, and those of the models.
      merge: What is done.
      grouping: What one vector is.

    Returns:
      The job.
    """
    tree, *models = operands
    merge.check_count(len(models))
    # The tree is read where it takes part.
    read = tuple(operands if merge.deltas or merge.tree_is_model else models)
    wide = compute_dtype(tree)
    survey = _Lengths(name, merge, grouping, len(read) - merge.deltas, wide)

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        base, others = _apart(arrays, merge)
        factors = _of_runs(survey.factors, grouping, start, arrays[0].size)
        merged = _weighted(base, others, factors, dtype=dtype)
        return checked(name, read, arrays, merged)

    return Job(
        name,
        tree.shape,
        dtype,
        read,
        compute,
        entrywise=True,
        temporaries=wide.itemsize * (len(read) + 1),
        survey=survey,
        unit=grouping.unit,
        block=None if grouping.fits else grouping.block,
    )


def _apart(arrays: Sequence[Any], merge: SphereMerge) -> tuple[Any, tuple[Any, ...]]:
    """The base, where deltas to it are merged, and the models."""
    return (arrays[0], tuple(arrays[1:])) if merge.deltas else (None, tuple(arrays))


def _of_runs(factors: np.ndarray, grouping: Grouping, start: int, entries: int) -> np.ndarray:
    """Factors `(models, blocks, behind)` of a slice's runs, `(models, runs, 1, behind)`.

    One run stands for all where they belong to one block.
    """
    found = grouping.blocks(start, entries)
    found = found if grouping.fits else found[:1]
    # Runs behind the tensor's end hold zeros.
    return factors[:, np.minimum(found, grouping.before - 1), None, :]


def _vectors(base: Any, models: Sequence[Any], run: int, behind: int, wide: Any) -> list[jax.Array]:
    """The models, or their differences to the base, as `(runs, along, behind)`."""
    shaped = [x.reshape(-1, run // behind, behind).astype(wide) for x in models]
    if base is None:
        return shaped
    origin = base.reshape(-1, run // behind, behind).astype(wide)
    return [x - origin for x in shaped]


@functools.partial(slice_program, static_argnames=("asked", "run", "behind"))
def _squares(
    base: Any,
    models: tuple[Any, ...],
    factors: list[Any],
    *,
    asked: tuple[tuple[int, ...], ...],
    run: int,
    behind: int,
) -> list[jax.Array]:
    """Squares of sums of the models that are asked after, added up: `(runs, parts, behind)` each.

    One program for all questions compiles faster than one for each, and starts once a slice.
    """
    vectors = _vectors(base, models, run, behind, factors[0].dtype)
    totals = [
        sum(vectors[i] * f for i, f in zip(which, own, strict=True))
        for which, own in zip(asked, factors, strict=True)
    ]
    return [folded(jnp.square(total)) for total in totals]


@functools.partial(slice_program, static_argnames="dtype")
def _weighted(base: Any, models: tuple[Any, ...], factors: jax.Array, *, dtype: Any) -> jax.Array:
    run, behind = models[0].size // factors.shape[1], factors.shape[3]
    vectors = _vectors(base, models, run, behind, factors.dtype)
    total = jnp.asarray(sum(x * f for x, f in zip(vectors, factors, strict=True)))
    if base is not None:
        total = base.reshape(total.shape).astype(total.dtype) + total
    return stored(total, dtype)


class _Lengths(Survey):
    """Answers what a merge asks about lengths, and keeps its factors.

    Sums over slices are in float64, so that squares of single models and of their differences tell
    those of any other sum, unless little is left of it: then it is asked of the slices itself.

    Args:
      name: Name of the tensor.
      merge: What is done.
      grouping: What one vector is.
      models: How many are merged.
      wide: Dtype of the computation.
    """

    def __init__(self, name: str, merge: SphereMerge, grouping: Grouping, models: int, wide: Any):
        self._name = name
        self._merge = merge
        self._grouping = grouping
        self._vectors = Vectors(models, grouping.vectors, np.dtype(wide))
        self.factors = self._shaped(np.zeros((models, grouping.vectors)))
        self._begin()

    def _begin(self) -> None:
        """Asks for squares of all models, and of their differences; a tensor may be made again."""
        n = self._vectors.models
        pairs = [(i, j) for i in range(n) for j in range(i)] if n <= _MOST_PAIRED else []
        self._known: dict[tuple[int, ...], np.ndarray] = {}
        self._measuring: Measuring[Any] | None = None
        self._ask(
            [
                (models, np.broadcast_to([[1], [-1]][: len(models)], (len(models), self._count)))
                for models in [*((i,) for i in range(n)), *pairs]
            ]
        )

    @property
    def _count(self) -> int:
        return self._vectors.count

    def _shaped(self, factors: Any) -> np.ndarray:
        grouping = self._grouping
        return np.asarray(factors).reshape(-1, grouping.before, grouping.behind)

    def _ask(self, questions: list[tuple[tuple[int, ...], Any]]) -> None:
        """Sets what the next pass finds out."""
        wide, shape = self._vectors.dtype, (self._grouping.before, self._grouping.behind)
        self._asked = [(models, self._shaped(f).astype(wide)) for models, f in questions]
        self._sums = np.zeros((len(questions), *shape))

    def look(
        self, job: Job, start: int, count: int, arrays: Sequence[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        base, models = _apart(arrays, self._merge)
        grouping, entries = self._grouping, arrays[0].size
        parts = _squares(
            base,
            models,
            [_of_runs(factors, grouping, start, entries) for _, factors in self._asked],
            asked=tuple(which for which, _ in self._asked),
            run=grouping.run(entries),
            behind=grouping.behind,
        )
        found = [np.asarray(part).sum(axis=1, dtype=np.float64) for part in parts]
        return grouping.blocks(start, entries), np.stack(found)

    def add(self, job: Job, start: int, seen: tuple[np.ndarray, np.ndarray]) -> None:
        blocks, sums = seen
        real = blocks < self._grouping.before
        for total, runs in zip(self._sums, sums, strict=True):
            np.add.at(total, blocks[real], runs[real])

    def decide(self) -> bool:
        with np.errstate(all="ignore"):  # what is not finite is told by what is made of it
            return self._decide()

    def _decide(self) -> bool:
        if self._measuring is None:
            self._known = dict(zip((models for models, _ in self._asked), self._sums, strict=True))
            self._measuring = self._merge.factors(self._vectors)
            self._questions = next(self._measuring)
            self._answers = [self._told(one) for one in self._questions]
        else:
            found = iter(self._sums)  # of the questions that were open, in their order
            self._answers = [next(found) if x is None else x for x in self._answers]
        while not (open := self._unanswered()):
            answers = [
                answer.reshape(-1).astype(self._vectors.dtype)
                for answer in self._answers
                if answer is not None  # none is, as no question is open
            ]
            try:
                self._questions = self._measuring.send(answers)
            except StopIteration as end:
                self._settle(*end.value)
                return False
            self._answers = [self._told(one) for one in self._questions]
        self._ask([(one.models, one.factors) for one in open])
        return True

    def _unanswered(self) -> list[Length]:
        pairs = zip(self._questions, self._answers, strict=True)
        return [one for one, answer in pairs if answer is None]

    def _told(self, question: Length) -> np.ndarray | None:
        """What is known already tells of it: |Σ f v|² = Σ f |v|² Σ f - Σ_{i<j} f f |v - v|²."""
        factors, models = self._shaped(question.factors).astype(np.float64), question.models
        squares = [self._known[i,] for i in models]
        if len(models) == 1 and (factors == 1).all():
            return squares[0]
        pairs = [(a, b) for a in range(len(models)) for b in range(a)]
        if any((models[a], models[b]) not in self._known for a, b in pairs):
            return None
        whole = factors.sum(axis=0)
        terms = [f * whole * square for f, square in zip(factors, squares, strict=True)]
        terms += [-factors[a] * factors[b] * self._known[models[a], models[b]] for a, b in pairs]
        total, size = sum(terms), sum(map(np.abs, terms))
        exact = total >= _LEFT * size
        for factor, square in zip(factors, squares, strict=True):
            exact &= (factor == 0) | (square >= LEAST_SQUARE)
        return np.asarray(total) if np.all(exact) else None

    def _settle(self, factors: jax.Array, odd: jax.Array | None) -> None:
        if odd is not None and self._merge.report is not None and bool(odd):
            self._merge.report([self._name])
        self.factors = self._shaped(factors).astype(self._vectors.dtype)
        self._begin()
