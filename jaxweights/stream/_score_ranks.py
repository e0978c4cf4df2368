"""Exact ranks of scores that one program computes of all operands, wherever they are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxweights.stream._jobs import Job
from jaxweights.stream._ranks import RankSurvey, Target
from jaxweights.stream._sums import RUN

Scores = Callable[[Sequence[Any]], np.ndarray]


class ScoreRanks(RankSurvey):
    """Finds the largest scores of a layer, ties to the first in flat order.

    Scores that are zero are counted, not ranked: there may be more of them than can be held.

    Args:
      scores: Gives those of a slice, flat.
      targets: How many are wanted of the largest above zero, which are those of model 0, or of the
        largest magnitudes below, which are those of model 1; `counted` may still say.
      entries: Of the layer.
      signed: Whether scores may be negative.
    """

    def __init__(
        self, scores: Scores, targets: Sequence[Target], entries: int, *, signed: bool = False
    ):
        """Starts with counting, and with a sample where there is enough to sample from."""
        super().__init__(_only, targets, entries)
        self._scores = scores
        self._open = list(targets)
        self._signed = signed
        self._models = self._operands = [0, 1] if signed else [0]
        self._counting = True
        # Entries of a slice, those above zero, and those below.
        self._counts: dict[int, tuple[int, int, int]] = {}

    def reads(self, model: int) -> tuple[int, ...]:
        """The scores of one sign alone."""
        return (model,)

    @property
    def samples(self) -> bool:
        """Never: the pass that samples counts all entries, too."""
        return False

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        """A count and a sample; then as in `RankSurvey`."""
        sides = self._sides(self._scores(arrays))
        if not self._counting:
            return super().look(job, start, count, sides)
        numbers = [int(np.count_nonzero(side[:count])) for side in sides]
        sample = super().look(job, start, count, sides) if self._sampling else None
        return (count, *numbers, *[0] * (2 - len(numbers))), sample

    def add(self, job: Job, start: int, seen: Any) -> None:
        """Takes in what was seen."""
        if not self._counting:
            super().add(job, start, seen)
            return
        self._counts[start], sample = seen
        if sample is not None:
            super().add(job, start, sample)

    def decide(self) -> bool:
        """Ranks what is left to rank when all is counted."""
        if self._counting:
            self._counting = False
            self.counted(*self._found)
            self._open = [t for t in self._open if 0 < t.k <= self._found[t.model]]
            again = bool(self._open) and (super().decide() if self._sampling else True)
        else:
            again = super().decide()
        for target in self._open:
            target.low = max(target.low, 1)  # no wanted score is zero
            target.high = max(target.high, 1)
        return again

    def _sides(self, scores: np.ndarray) -> list[np.ndarray]:
        """What is ranked: the scores, or those above zero and those below, in whole runs."""
        scores = scores.astype(np.float32, copy=False)
        if scores.size > RUN:
            scores = np.pad(scores, (0, -scores.size % RUN))
        return [np.maximum(scores, 0), np.maximum(-scores, 0)] if self._signed else [scores]

    def counted(self, positive: int, negative: int) -> None:
        """Called when it is known how many scores are above zero, and how many below."""

    @property
    def _found(self) -> tuple[int, int]:
        """How many scores are above zero, and how many below."""
        _, positive, negative = np.sum(list(self._counts.values()), axis=0).tolist()
        return positive, negative

    def threshold(self, target: Target) -> np.float32:
        """The smallest score of a target, which wants one at least."""
        pattern = target.threshold if target.k <= self._found[target.model] else 0
        size = np.uint32(pattern).view(np.float32)
        return -size if target.model else size

    def bound_in(self, target: Target, name: str, start: int, scores: np.ndarray) -> np.ndarray:
        """What `among` tells the target's entries of a slice by, where no score is negative."""
        positive, _ = self._found
        if not target.k:
            threshold, last = 0x7FFFFFFF, -1
        elif target.k <= positive:
            threshold = target.threshold
            last = self.last(target, (name, start), self._sides(scores))
        else:  # all above zero, and the first of the others
            before = (n - above for s, (n, above, _) in self._counts.items() if s < start)
            left = target.k - positive - sum(before)
            zeros = np.flatnonzero(scores[: self._counts[start][0]] == 0)
            taken = min(max(left, 0), zeros.size)
            threshold, last = 0, int(zeros[taken - 1]) if taken else -1
        return np.array([threshold, last], np.int64).astype(np.uint32)


def _only(arrays: Any, model: int) -> Any:
    return arrays[model]
