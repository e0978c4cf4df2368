"""Memory of a stream: how much may be held, and buffers that are used again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# XLA reads an array in place where it lies on such a boundary, and copies it elsewhere.
ALIGNMENT = 64
_DEFAULT = 512 << 20


def resident_bytes() -> int:
    """What this process holds now; 0 where the system does not tell."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except (OSError, ImportError, IndexError, ValueError):
        return 0


def keep_freed_pages() -> None:
    """Lets the C library use freed memory again instead of giving it back to the system.

    Every result of a compiled function is a fresh allocation. glibc maps and unmaps those above
    32 MB at most, and the system clears every page anew, which takes longer than computing what is
    written to it. This is a setting of the whole process, so it is for programs, not libraries.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def release_freed_pages() -> None:
    """Gives memory that is free, but kept by the C library, back to the system.

    A compiler leaves a hundred megabytes behind; they would count beside what is used later.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def aligned(nbytes: int) -> np.ndarray:
    """Uninitialised bytes that XLA reads in place, `(nbytes,)` uint8."""
    block = np.empty(nbytes + ALIGNMENT, np.uint8)
    skip = -block.ctypes.data % ALIGNMENT
    return block[skip : skip + nbytes]


class Budget:
    """Bytes that pieces in flight may hold.

    Args:
      limit: Most bytes. None gives half a gigabyte to what can be cut into pieces, and lets a
        tensor that cannot be cut have all that it needs, alone.
    """

    def __init__(self, limit: int | None):
        """Starts with nothing taken."""
        self.limit = _DEFAULT if limit is None else limit
        self._taken = 0
        self._changed = threading.Condition()

    def take(self, cost: int, *, unless: threading.Event) -> bool:
        """Waits until there is room; what costs more than the limit waits for all others.

        Args:
          cost: Bytes.
          unless: Ends the waiting, after `wake`.

        Returns:
          Whether there was room.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: unless.is_set() or not self._taken or self._taken + cost <= self.limit
            )
            if not unless.is_set():
                self._taken += cost
            return not unless.is_set()

    def give(self, cost: int) -> None:
        """Makes room."""
        with self._changed:
            self._taken -= cost
            self._changed.notify_all()

    @contextlib.contextmanager
    def holding(self, cost: int) -> Iterator[None]:
        """Holds so much through a block that begins when nothing else is held."""
        with self._changed:
            self._taken += cost
        try:
            yield
        finally:
            self.give(cost)

    def wake(self) -> None:
        """Lets those who wait look again."""
        with self._changed:
            self._changed.notify_all()


class Buffers:
    """Aligned buffers that are used again: fresh pages cost more than filling them.

    Args:
      keep: Most bytes that are kept while nobody uses them.
    """

    def __init__(self, keep: int):
        """Starts with none."""
        self._keep = keep
        self._free: dict[int, list[np.ndarray]] = {}
        self._kept = 0
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """An uninitialised array and the buffer that holds it, for `give`."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        size = _rounded(nbytes)
        with self._lock:
            free = self._free.get(size)
            buffer = free.pop() if free else None
            self._kept -= size if buffer is not None else 0
        if buffer is None:
            buffer = aligned(size)
        return buffer[:nbytes].view(dtype).reshape(shape), buffer

    def give(self, buffer: np.ndarray) -> None:
        """Takes a buffer back that nothing reads any more."""
        with self._lock:
            if self._kept + buffer.size <= self._keep:
                self._free.setdefault(buffer.size, []).append(buffer)
                self._kept += buffer.size


def _rounded(nbytes: int) -> int:
    """The next of four sizes between powers of two, so that tensors of like size share buffers."""
    if nbytes <= 4096:
        return 4096
    step = 1 << max(nbytes.bit_length() - 3, 0)
    return -(-nbytes // step) * step
