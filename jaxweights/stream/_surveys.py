"""Surveys of surveys: one after the other, and one for each layer of a stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from jaxweights.stream._jobs import Job, Survey

One = TypeVar("One", bound=Survey)


class InTurn(Survey):
    """Surveys that each begin when the one before has decided; finished, they look no more.

    Args:
      *surveys: In their order.
    """

    def __init__(self, *surveys: Survey):
        """Begins with the first."""
        self._left = list(surveys)

    @property
    def samples(self) -> bool:
        """As the survey whose turn it is."""
        return bool(self._left) and self._left[0].samples

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        """As the survey whose turn it is."""
        return self._left[0].look(job, start, count, arrays) if self._left else None

    def add(self, job: Job, start: int, seen: Any) -> None:
        """As the survey whose turn it is."""
        if self._left:
            self._left[0].add(job, start, seen)

    def decide(self) -> bool:
        """Whether this survey needs another pass, or the next one its first."""
        if not self._left:
            return False
        if not self._left[0].decide():
            self._left.pop(0)
        return bool(self._left)


class OfBlocks(Survey, Generic[One]):
    """A survey of its own for each layer of a tensor, whose pieces cross no layer's end.

    Args:
      make: Makes one.
      blocks: Number of layers.
      block: Entries of each.
    """

    def __init__(self, make: Callable[[], One], blocks: int, block: int):
        """Starts all of them."""
        self._block = max(block, 1)
        self._own = [make() for _ in range(max(blocks, 1))]
        self._open = [True] * len(self._own)

    def of(self, start: int) -> One:
        """The survey of the layer that holds an entry."""
        return self._own[start // self._block]

    @property
    def samples(self) -> bool:
        """Whether any of them does; all begin alike."""
        return any(
            own.samples for own, is_open in zip(self._own, self._open, strict=True) if is_open
        )

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        """As the layer's own."""
        if not self._open[start // self._block]:
            return None
        return self.of(start).look(job, start, count, arrays)

    def add(self, job: Job, start: int, seen: Any) -> None:
        """As the layer's own."""
        if self._open[start // self._block]:
            self.of(start).add(job, start, seen)

    def decide(self) -> bool:
        """Whether any layer needs another pass."""
        pairs = zip(self._own, self._open, strict=True)
        self._open = [is_open and own.decide() for own, is_open in pairs]
        return any(self._open)
