"""Threads that each hold a piece of a tensor take turns in the order of the pieces."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator

from jaxweights.stream._jobs import Piece


class Stopped(Exception):
    """Another thread failed, so that a turn will never come."""


class Turns:
    """Lets pieces through one after the other.

    Pieces are begun in their order, so that whoever waits waits for one that is under way.
    """

    def __init__(self) -> None:
        """Nothing has had its turn."""
        self.stopped = threading.Event()
        self._next: dict[Hashable, int] = {}
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, key: Hashable, piece: Piece) -> Iterator[None]:
        """Waits until all pieces before have been through.

        Args:
          key: What the turns are about, such as a tensor.
          piece: Whose turn it is; the last one of a tensor lets another round begin.

        Raises:
          Stopped: If `stop` was called.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.stopped.is_set() or self._next.get(key, 0) == piece.start
            )
        if self.stopped.is_set():
            raise Stopped
        yield
        with self._changed:
            if piece.is_last:
                self._next.pop(key, None)
            else:
                self._next[key] = piece.start + piece.count
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self.stopped.set()
            self._changed.notify_all()
