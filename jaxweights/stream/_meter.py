"""Progress of a stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from jaxweights.stream._jobs import Job

Progress = Callable[[str, int, int], None]
_TASK = "Streaming"


class Meter:
    """Progress in bytes read and written."""

    def __init__(self, jobs: Sequence[Job], todo: Sequence[Job], progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._total = sum(job.bytes_read + job.nbytes for job in jobs)
        self._done = self._total - sum(job.bytes_read + job.nbytes for job in todo)
        self.add(0)

    def add(self, nbytes: int) -> None:
        with self._lock:
            # Padding and second looks would lead beyond the end.
            self._done = min(self._done + nbytes, self._total)
            if self._progress is not None:
                self._progress(_TASK, self._done, self._total)
