"""Tensors that are made when they are read: the result of an earlier document."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxweights.checkpoint._tensor_table import fill_from
from jaxweights.stream._flow import make_entries
from jaxweights.stream._jobs import Job, cut

_BUDGET = 1 << 28


class Made:
    """Reads like a checkpoint.

    Args:
      jobs: One for each tensor.
    """

    def __init__(self, jobs: Sequence[Job]):
        """Makes nothing yet."""
        self._jobs = {job.name: job for job in jobs}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._jobs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._jobs[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor."""
        return self._jobs[name].dtype

    def read(self, name: str) -> np.ndarray:
        """Makes a tensor."""
        job = self._jobs[name]
        whole = np.empty(job.entries, job.dtype)
        readers = [operand.source.reader(operand.name) for operand in job.operands]
        pieces = list(cut(job, _BUDGET))

        def arrays(start: int, count: int, padded: int | None) -> list[np.ndarray]:
            found = []
            for operand, read in zip(job.operands, readers, strict=True):
                shape = operand.shape if padded is None else (padded,)
                array = np.zeros(shape, operand.dtype)
                read(start, array.reshape(-1) if padded is None else array[:count])
                found.append(array)
            return found

        again = job.survey is not None
        while again and job.survey is not None:
            for p in pieces:
                seen = job.survey.look(job, p.start, p.count, arrays(p.start, p.count, p.padded))
                job.survey.add(job, p.start, seen)
            again = job.survey.decide()
        for p in pieces:
            made = make_entries(p, arrays(p.start, p.count, p.padded))
            whole[p.start : p.start + p.count] = made.view(job.dtype)
        return whole.reshape(job.shape)

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        """A function that fills an array with a tensor's entries from a flat index on."""
        return fill_from(self.read(name))
