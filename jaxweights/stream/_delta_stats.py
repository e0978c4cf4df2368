"""What `analyze.deltas` tells, of checkpoints that are read slice by slice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._select import magnitude_bits
from jaxweights.merge._models import compute_dtype
from jaxweights.stream._delta import _ranked_delta
from jaxweights.stream._jobs import Job, Operand, Piece, cut
from jaxweights.stream._memory import Budget
from jaxweights.stream._pipeline import (
    Progress,
    _add,
    _Flow,
    _look,
    _look_whole,
    _Meter,
    memory_limit,
)
from jaxweights.stream._ranks import RankSurvey, Target
from jaxweights.stream._sums import partial_sums, refuse_nonfinite

_TASK = "Comparing"
# Sums of squares within these bounds, of a slice, neither overflowed nor lost much to underflow.
_SAFE = (1e-26, 1e30)


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
    function: str,
    requests: Sequence[DeltaRequest],
    *,
    memory: int | None = None,
    progress: Progress | None = None,
) -> list[DeltaStats]:
    """Compares the deltas of every tensor, in one pass over the operands.

    Tensors that are longer than a slice and whose largest entries are asked after are read twice.

    Args:
      function: Start of the error messages.
      requests: The tensors.
      memory: Most bytes that the process may hold.
      progress: Called with (task, bytes done, bytes in all).

    Returns:
      What was found, in the order of the requests.

    Raises:
      ValueError: If values are not finite, or the memory is too small.
    """
    budget = Budget(memory_limit(function, memory))
    jobs = [_job(request) for request in requests]
    cuts = [list(cut(job, budget.limit // 4)) for job in jobs]
    meter = _Meter(jobs, jobs, progress and (lambda _, done, total: progress(_TASK, done, total)))
    with _Flow(budget, meter) as flow:
        # Tensors of which one look is enough go through together, without waiting for each other.
        short, long = [], []
        for job, pieces in zip(jobs, cuts, strict=True):
            (long if len(pieces) > 1 and _survey(job).ranks else short).append(pieces)
        whole = [piece for pieces in short for piece in pieces]
        flow.run(whole, _look_once, _add_once)
        for pieces in long:
            again = True
            while again:
                flow.run(pieces, _look, _add)
                again = _survey(pieces[0].job).decide()
    meter.finish()
    return [_survey(job).found(request) for job, request in zip(jobs, requests, strict=True)]
