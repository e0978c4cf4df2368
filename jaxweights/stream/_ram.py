"""RAM+ slice by slice: what models share and have alone is counted before deltas are added."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._ram import RamMerge, add_changed, counts_of, enlargements
from jaxweights.merge._sphere import vectors_of
from jaxweights.stream._jobs import Job, Survey
from jaxweights.stream._leaf import Leaf
from jaxweights.stream._program import slice_program
from jaxweights.stream._store import checked, stored
from jaxweights.stream._surveys import InTurn, OfBlocks


def ram_job(leaf: Leaf, merge: RamMerge) -> Job | None:
    """The job that merges a leaf as `merge.ram_plus` does.

    Args:
      leaf: The leaf.
      merge: What is done.

    Returns:
      The job; None where only the whole leaf can be merged.
    """
    matrices = leaf.matrices(merge.name)
    if matrices is None or merge.output.rounding != "nearest":
        return None
    make = functools.partial(_Layer, len(leaf.operands) - 1, merge.epsilon)
    survey = OfBlocks(make, matrices.before, matrices.block)

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        factors = _factors(*survey.of(start).counts.total, enlarge=merge.enlarge)
        base, *models = arrays
        merged = _merge_slice(base, models, factors, epsilon=merge.epsilon, dtype=leaf.dtype)
        return checked(leaf.name, leaf.operands, arrays, merged)

    return leaf.job(
        compute,
        matrices,
        temporaries=6 * len(leaf.operands) + 8,
        survey=survey,
    )


@functools.partial(jax.jit, static_argnames="epsilon")
def _counts(base: Any, models: list[Any], *, epsilon: float) -> tuple[jax.Array, jax.Array]:
    return counts_of(vectors_of(base, models, deltas=True), epsilon, (0,))


@functools.partial(jax.jit, static_argnames="enlarge")
def _factors(shared: Any, alone: Any, *, enlarge: tuple[float, float]) -> jax.Array:
    return enlargements(jnp.asarray(shared), jnp.asarray(alone), enlarge)


@functools.partial(slice_program, static_argnames=("epsilon", "dtype"))
def _merge_slice(
    base: Any, models: list[Any], factors: jax.Array, *, epsilon: float, dtype: Any
) -> jax.Array:
    deltas = vectors_of(base, models, deltas=True)
    return stored(add_changed(base, deltas, epsilon, factors), dtype, *deltas)


class _Layer(InTurn):
    """Counts the entries of one layer, once."""

    def __init__(self, models: int, epsilon: float):
        self.counts = _Counts(models, epsilon)
        super().__init__(self.counts)


class _Counts(Survey):
    """How many entries each model shares with others, and how many it alone has changed."""

    def __init__(self, models: int, epsilon: float):
        self._epsilon = epsilon
        self.total = np.zeros((2, models, 1), np.int64)

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> np.ndarray:
        del job, start, count  # what pads a slice has no deltas
        base, *models = arrays
        return np.asarray(_counts(base, models, epsilon=self._epsilon))

    def add(self, job: Job, start: int, seen: np.ndarray) -> None:
        del job, start
        self.total += seen

    def decide(self) -> bool:
        return False
