"""Which sign most entries elect, where that decides about those that tie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxweights.stream._jobs import Job, Survey

# Gives the elected signs of a slice, int8, from the job, the first entry and the arrays.
Elected = Callable[[Job, int, Sequence[Any]], Any]


class Signs(Survey):
    """Sums up the signs that the entries of one layer elect.

    Args:
      elected: Gives those of a slice.
    """

    def __init__(self, elected: Elected):
        """Nothing is counted yet."""
        self._elected = elected
        self._sum = 0

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> int:
        """The sum of a slice's."""
        return sum_of(self._elected(job, start, arrays), count)

    def add(self, job: Job, start: int, seen: int) -> None:
        """Takes in what was seen."""
        del job, start
        self._sum += seen

    def decide(self) -> bool:
        """One pass is enough."""
        return False

    @property
    def sign(self) -> np.float32:
        """Their sum, whose sign decides."""
        return np.float32(self._sum)


def sum_of(signs: Any, count: int) -> int:
    """The sum of a slice's signs, of which those behind `count` entries are of padding."""
    found = np.asarray(signs)[:count]
    return int(np.count_nonzero(found > 0)) - int(np.count_nonzero(found < 0))
