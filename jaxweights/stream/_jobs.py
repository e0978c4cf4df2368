"""What a stream does: one job for every tensor that is written, cut into pieces."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

# A piece takes a few milliseconds: long beside what starting it costs, short beside a disk's
# bandwidth times the memory that pieces in flight may hold.
PIECE_ENTRIES = 1 << 20
# Ends of tensors are cut into pieces of an eighth, so that two programs serve all shapes.
_SMALL = 8
_SMALLEST = 1 << 10


class Tensors(Protocol):
    """Where operands come from: a `Checkpoint`, or what reads like one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, without reading it."""
        ...

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        """A function that fills an array with the tensor's entries from a flat index on."""
        ...


@dataclasses.dataclass(frozen=True)
class Operand:
    """One tensor that a job reads.

    Args:
      source: What holds it.
      name: Its name there.
      label: What reports call the source.
    """

    source: Tensors
    name: str
    label: str = "base"

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.source.shape(self.name)

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return self.source.dtype(self.name)


Compute = Callable[[Sequence[Any], int], Any]


class Survey(Protocol):
    """What has to be known of whole tensors before slices of them can be made.

    Passes over the operands alternate with decisions. `look` runs in threads; `add` gets what it
    returned in the order of the entries.
    """

    @property
    def samples(self) -> bool:
        """Whether the next pass looks at few of the entries, so that slices are not padded."""
        return False

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        """Looks at a slice of the operands, padded behind `count` entries.

        The arrays are NumPy's, and valid until it returns.
        """
        ...

    def add(self, job: Job, start: int, seen: Any) -> None:
        """Takes in what was seen."""
        ...

    def decide(self) -> bool:
        """Ends a pass; whether another one is needed."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor that is written.

    Args:
      name: Its name.
      shape: Its shape.
      dtype: Its dtype.
      operands: What it is made of, all of the job's shape where entries are merged.
      compute: `compute(arrays, start)` makes it from the operands' NumPy arrays, valid until it
        returns: from flat slices of them that begin at entry `start` where `entrywise`, else from
        all of them. None copies the only operand's bytes.
      entrywise: Whether flat slices of the result depend on the same slices of the operands only.
      temporaries: Bytes for each entry that `compute` needs at most, besides operands and result.
      survey: What must be known before `compute` is called; jobs may share one, and then stand
        next to each other.
      kept: Bytes for each entry of the tensor that the survey keeps until it is made.
      unit: Pieces hold a multiple of so many entries, where they do not end what they are cut from.
      block: No piece reaches over a multiple of so many entries; None lets all of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    operands: tuple[Operand, ...]
    compute: Compute | None = None
    entrywise: bool = False
    temporaries: int = 0
    survey: Survey | None = None
    kept: int = 0
    unit: int = 1
    block: int | None = None

    @functools.cached_property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return self.entries * self.dtype.itemsize

    @functools.cached_property
    def itemsizes(self) -> int:
        """Bytes of one entry of every operand."""
        return sum(operand.dtype.itemsize for operand in self.operands)

    @functools.cached_property
    def bytes_read(self) -> int:
        """Bytes that are read."""
        return sum(math.prod(o.shape) * o.dtype.itemsize for o in self.operands)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A flat slice of a job's tensor, or all of it.

    Args:
      job: The job.
      start: First entry.
      count: Number of entries.
      padded: Number of entries that operands are padded to; None where they keep their shapes.
    """

    job: Job
    start: int
    count: int
    padded: int | None

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with it."""
        return self.start + self.count >= self.job.entries

    @property
    def cost(self) -> int:
        """Bytes that are held while it is made."""
        job = self.job
        entries = job.entries if self.padded is None else self.padded
        return self.cost_of_operands + entries * (job.dtype.itemsize + job.temporaries)

    @property
    def cost_of_operands(self) -> int:
        """Bytes of them that its operands take."""
        if self.padded is None:
            return self.job.bytes_read
        return self.padded * self.job.itemsizes


def cut(job: Job, budget: int) -> Iterator[Piece]:
    """Cuts a job into pieces of which each costs at most the budget, where it can be cut."""
    if not job.entrywise and job.compute is not None:
        yield Piece(job, 0, job.entries, None)
        return
    size = _multiple(PIECE_ENTRIES, job.unit)
    while size > max(_SMALLEST, job.unit) and Piece(job, 0, size, size).cost > budget:
        size = _multiple(size // 2, job.unit)
    small = _multiple(size // _SMALL, job.unit)
    block = job.block or max(job.entries, 1)
    for first in range(0, max(job.entries, 1), block):
        end = min(first + block, job.entries)
        for padded, start in _runs(first, end, size, small):
            yield Piece(job, start, min(padded, end - start), padded)


def _runs(start: int, end: int, size: int, small: int) -> Iterator[tuple[int, int]]:
    """Lengths and starts of the pieces of a block, which is one piece where it is empty."""
    while True:
        # Padding a large piece costs no more than the last two small ones.
        padded = size if end - start > size - 2 * small else small
        yield padded, start
        start += padded
        if start >= end:
            return


def _multiple(size: int, unit: int) -> int:
    """The largest multiple of a unit that is no larger than a size, and the unit at least."""
    return max(size // unit, 1) * unit
