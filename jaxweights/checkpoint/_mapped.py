"""Files mapped into memory for reading, with every access checked against their length."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import Any

import numpy as np


class MappedFile:
    """A regular file whose bytes are read where they are needed, without copying.

    Arrays made from it keep the mapping alive, so it needs no closing; they are read-only.
    """

    def __init__(self, path: Path, *, function: str):
        """Maps a file; `function` starts the error messages."""
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise FileNotFoundError(f"{function}: '{path}' does not exist.") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{function}: '{path}' is not a regular file.")
            self.size: int = status.st_size
            # An empty file cannot be mapped.
            self._map = (
                mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ) if self.size else b""
            )
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def view(self, start: int, count: int) -> np.ndarray:
        """Bytes `start` to `start + count`, `(count,)` uint8, without copying."""
        assert 0 <= start <= start + count <= self.size, "ranges are checked when a file is opened"
        return np.frombuffer(self._map, np.uint8, count, start)

    def read(self, start: int, count: int) -> bytes:
        """Bytes `start` to `start + count`, copied."""
        assert 0 <= start <= start + count <= self.size, "ranges are checked when a file is opened"
        return self._map[start : start + count]

    def forget(self, start: int, count: int) -> None:
        """Takes bytes that were looked at out of this process; looked at again, they come back."""
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is None or not isinstance(self._map, mmap.mmap) or not count:
            return
        first = start - start % mmap.PAGESIZE
        self._map.madvise(advice, first, start + count - first)

    def expect(self, start: int, count: int) -> None:
        """Lets the system read bytes ahead that will be looked at soon."""
        if hasattr(os, "posix_fadvise") and start < self.size and not self._at_hand(start):
            with contextlib.suppress(OSError):  # a file system that cannot
                os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_WILLNEED)

    def _at_hand(self, start: int) -> bool:
        """Whether a byte is in memory, where the system tells; asking it to read takes longer."""
        no_wait = getattr(os, "RWF_NOWAIT", None)
        if no_wait is None:
            return False
        try:
            return os.preadv(self._descriptor, [bytearray(1)], start, no_wait) == 1
        except OSError:  # it would have to be waited for, or the file system cannot tell
            return False

    def check_length(self) -> None:
        """Refuses a file that became shorter: looking at what is gone would end the process."""
        if os.fstat(self._descriptor).st_size < self.size:
            raise OSError(f"'{self.path}' became shorter while it was being read.")

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills a contiguous array with the bytes from `start` on, without mapping them."""
        target = out.reshape(-1).view(np.uint8).data
        assert 0 <= start <= start + len(target) <= self.size, "ranges are checked when opened"
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done:]], start + done)
            if not count:
                raise OSError(f"'{self.path}' became shorter while it was being read.")
            done += count


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """A tensor that can be read where it lies in a file, without copying.

    Args:
      file: The file.
      start: First byte.
      itemsize: Bytes of an entry.
    """

    file: MappedFile
    start: int
    itemsize: int

    def view(self, start: int, count: int) -> np.ndarray:
        """Bytes of `count` entries from a flat index on, uint8, read-only."""
        self.file.check_length()
        return self.file.view(self.start + start * self.itemsize, count * self.itemsize)

    def forget(self, start: int, count: int) -> None:
        """Takes entries that were looked at out of this process."""
        self.file.forget(self.start + start * self.itemsize, count * self.itemsize)

    def expect(self, start: int, count: int) -> None:
        """Lets the system read entries ahead."""
        self.file.expect(self.start + start * self.itemsize, count * self.itemsize)


def mapped_tensor(source: Any, name: str) -> MappedTensor | None:
    """Where a tensor of what reads like a checkpoint lies in a file; None if it tells of none."""
    find = getattr(source, "mapped", None)
    return None if find is None else find(name)
