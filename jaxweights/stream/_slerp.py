"""Spherical interpolation slice by slice: lengths and distances are surveyed first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._models import compute_dtype
from jaxweights.merge._sphere import Arcs, slerp_factors
from jaxweights.stream._jobs import Job, Operand, Survey
from jaxweights.stream._sums import PartialSums, partial_sums, refuse_nonfinite


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
    survey = _Arcs()

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        del start
        found, wide = survey.arcs(), compute_dtype(arrays[0])
        place = jnp.asarray(t, wide)
        factors, antipodal = slerp_factors(found, place, lerp_cosine=lerp_cosine)
        if lerp_cosine is None and bool(antipodal):
            raise ValueError(
                f"{name!r}: the two tensors point in opposite directions, so that no single arc "
                "joins them. Merge them with 'linear', or leave one of them out."
            )
        merged, finite = _weighted(arrays[0], arrays[1], factors[:, 0].astype(wide), dtype)
        if not np.asarray(finite).all():
            refuse_nonfinite(name, operands, arrays)
        return np.asarray(merged)

    return Job(
        name, operands[0].shape, dtype, operands, compute, True, temporaries=12, survey=survey
    )


@jax.jit
def _squares(a: Any, b: Any) -> list[jax.Array]:
    wide = compute_dtype(a)
    a, b = a.astype(wide), b.astype(wide)
    return [partial_sums(x * x) for x in (a, b, a - b, a + b)]


def _weighted_slices(a: Any, b: Any, factors: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    stored = (factors[0] * a.astype(factors.dtype) + factors[1] * b.astype(factors.dtype)).astype(
        dtype
    )
    return stored, jnp.isfinite(stored)


_weighted = jax.jit(_weighted_slices, static_argnums=3)


class _Arcs(Survey):
    """Lengths of two tensors and of their difference and sum."""

    def __init__(self) -> None:
        self._sums = PartialSums()

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> np.ndarray:
        return np.stack([np.asarray(x) for x in _squares(*arrays)])

    def add(self, job: Job, start: int, seen: np.ndarray) -> None:
        self._sums.add(start, job.entries, seen)

    def decide(self) -> bool:
        return False

    def arcs(self) -> Arcs:
        """What the factors are made from."""
        squares = self._sums.total()
        first, second = np.sqrt(squares[:2])
        # |a/|a| ± b/|b||² = (|a ± b|² - (|a| - |b|)²) / (|a| |b|), which is accurate for small
        # angles because the difference of like tensors is.
        size = max(first * second, np.finfo(np.float64).tiny)
        apart, together = (np.maximum(squares[2:] - (first - second) ** 2, 0) / size).tolist()
        numbers = (first, second, min(apart, 4.0), min(together, 4.0))
        return Arcs(*(jnp.asarray([number], jnp.float32) for number in numbers))
