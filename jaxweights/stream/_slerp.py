"""Spherical interpolation slice by slice: lengths and distances are surveyed first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._models import compute_dtype
from jaxweights.merge._sphere import Arcs, slerp_factors
from jaxweights.stream._jobs import Job, Operand, Survey
from jaxweights.stream._store import checked, stored
from jaxweights.stream._sums import PartialSums, partial_sums, run_sums


def slerp_job(
    name: str,
    dtype: np.dtype,
    operands: tuple[Operand, Operand],
    *,
    t: float,
    lerp_cosine: float | None,
) -> Job:
    """The job that interpolates between two tensors.

    Args:
      name: Of the tensor that is written.
      dtype: Of it.
      operands: The points t = 0 and t = 1.
      t: Place on the arc.
      lerp_cosine: Interpolates linearly where |cos Ω| is larger.

    Returns:
      The job.
    """
    wide = compute_dtype(operands[0])

    def factors(found: Arcs) -> np.ndarray:
        both, antipodal = slerp_factors(found, jnp.asarray(t, wide), lerp_cosine=lerp_cosine)
        if lerp_cosine is None and bool(antipodal):
            raise ValueError(
                f"{name!r}: the two tensors point in opposite directions, so that no single arc "
                "joins them. Merge them with 'linear', or leave one of them out."
            )
        return np.asarray(both[:, 0].astype(wide))

    survey = _Factors(factors)

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        del start
        merged = _weighted(arrays[0], arrays[1], survey.found, dtype)
        return checked(name, operands, arrays, merged)

    return Job(
        name, operands[0].shape, dtype, operands, compute, True, temporaries=12, survey=survey
    )


@jax.jit
def _squares(a: Any, b: Any) -> list[jax.Array]:
    wide = compute_dtype(a)
    a, b = a.astype(wide), b.astype(wide)
    return [partial_sums(x * x) for x in (a, b, a - b)]


@jax.jit
def _squares_of_sum(a: Any, b: Any) -> list[jax.Array]:
    wide = compute_dtype(a)
    both = a.astype(wide) + b.astype(wide)
    return [partial_sums(both * both)]


@functools.partial(jax.jit, static_argnums=3)
def _weighted(a: Any, b: Any, factors: jax.Array, dtype: Any) -> jax.Array:
    wide = factors.dtype
    return stored(factors[0] * a.astype(wide) + factors[1] * b.astype(wide), dtype)


class _Factors(Survey):
    """Factors of two tensors, from their lengths and those of their difference and sum.

    Args:
      make: Gives the factors.
    """

    def __init__(self, make: Callable[[Arcs], np.ndarray]):
        self.found = np.zeros(2)
        self._make = make
        self._sums = PartialSums()
        self._summed: PartialSums | None = None  # of the sum of both, where it is needed

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> np.ndarray:
        return run_sums((_squares if self._summed is None else _squares_of_sum)(*arrays))

    def add(self, job: Job, start: int, seen: np.ndarray) -> None:
        (self._sums if self._summed is None else self._summed).add(seen)

    def decide(self) -> bool:
        a, b, difference = self._sums.total()
        together = 2 * (a + b) - difference
        if self._summed is not None:
            [together] = self._summed.total()
        elif together < (a + b) / 2:
            # Near opposite directions little of it is left, so it is summed itself.
            self._summed = PartialSums()
            return True
        self.found = self._make(_arcs(a, b, difference, together))
        self._sums, self._summed = PartialSums(), None  # a tensor may be made once more
        return False


def _arcs(a: float, b: float, difference: float, both: float) -> Arcs:
    """What the factors are made from, by squares of lengths."""
    first, second = math.sqrt(a), math.sqrt(b)
    # |a/|a| ± b/|b||² = (|a ± b|² - (|a| - |b|)²) / (|a| |b|), which is accurate for small
    # angles because the difference of like tensors is.
    size = max(first * second, np.finfo(np.float64).tiny)
    apart, together = (max(x - (first - second) ** 2, 0) / size for x in (difference, both))
    numbers = (first, second, min(apart, 4.0), min(together, 4.0))
    return Arcs(*(jnp.asarray([number], jnp.float32) for number in numbers))
