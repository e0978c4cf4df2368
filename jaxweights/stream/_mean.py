"""The weighted mean of tensors, slice by slice."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxweights.merge._mean import weighted_mean, with_first
from jaxweights.merge._models import check_weights, compute_dtype
from jaxweights.stream._jobs import Job, Operand
from jaxweights.stream._program import slice_program
from jaxweights.stream._store import checked, stored

# Wide copies that a compiler may make.
_WIDE_BYTES = 4


def mean_job(
    name: str,
    dtype: np.dtype,
    operands: tuple[Operand, ...],
    *,
    weights: Sequence[float],
    normalize: bool,
) -> Job:
    """The job that averages tensors, as `merge.mean` does.

    Args:
      name: Of the tensor that is written.
      dtype: Of it.
      operands: One tensor for each model.
      weights: One for each of them.
      normalize: Whether to divide by the sum of the weights.

    Returns:
      The job.

    Raises:
      ValueError: If the weights sum to zero and are to be normalised.
    """
    shares = check_weights("merge.mean", weights, normalize=normalize)
    pivot = int(np.argmax(np.abs(shares)))
    numbers = with_first(shares, pivot)

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        del start
        others = (*arrays[:pivot], *arrays[pivot + 1 :])
        wide = numbers.astype(compute_dtype(arrays[0]))
        merged = _mean(arrays[pivot], others, wide, normalize=normalize, dtype=dtype)
        return checked(name, operands, arrays, merged)

    temporaries = _WIDE_BYTES * (len(operands) + 1)
    return Job(name, operands[0].shape, dtype, operands, compute, True, temporaries)


@functools.partial(slice_program, static_argnames=("normalize", "dtype"))
def _mean(
    pivot: Any, others: tuple[Any, ...], weights: jax.Array, *, normalize: bool, dtype: Any
) -> jax.Array:
    return stored(weighted_mean(pivot, others, weights, normalize=normalize), dtype)
