"""What is asked of the operating system: locks, renames in one step, bytes sent to the disk."""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing tells a dead writer's files from a live one's
    fcntl = None

HAS_LOCKS = fcntl is not None

# Quota and per-process file size limits end a write just as a full disk does.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("no space left on device", "disk quota exceeded", "file too large")
_MOST_FLUSHES = 8  # at the same time
NO_REPLACE, EXCHANGE = 1, 2  # RENAME_NOREPLACE and RENAME_EXCHANGE of Linux


def rename_at_once(source: Path, target: Path, flag: int) -> bool:
    """Linux's `renameat2`, in one step; False where the system or its disk has no such call."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD
    if renameat2(here, os.fsencode(source), here, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(target))


def lengthen(path: Path, length: int) -> None:
    """Gives a file its full length, and room on the disk where its file system can reserve some.

    What is written into reserved room takes two thirds of the time. The system call itself: the C
    library's function of that purpose writes to every block where a file system cannot.
    """
    os.truncate(path, length)
    if not sys.platform.startswith("linux") or not length:
        return
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    except (OSError, AttributeError):
        return
    descriptor = os.open(path, os.O_WRONLY)
    try:
        failed = fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(length))
        if failed and ctypes.get_errno() in _FULL:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(descriptor)


def allocated(folder: Path) -> int:
    """Bytes of the disk that the files of a folder take already."""
    return sum(512 * getattr(file.stat(), "st_blocks", 0) for file in folder.rglob("*"))


def take_lock(path: Path) -> int | None:
    """A descriptor that holds the lock on `path`; None where it is taken or cannot be had."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def flush(path: Path) -> None:
    """Sends files and directories to the disk: a rename must not outrun the bytes it names."""
    if not path.is_dir():
        fsync(path)
        return
    found = [os.path.join(root, name) for root, _, files in os.walk(path) for name in ("", *files)]
    # Each waits until the disk has emptied its own cache, which it does for several at once.
    with concurrent.futures.ThreadPoolExecutor(_MOST_FLUSHES) as pool:
        list(pool.map(fsync, found))


def fsync(path: str | Path) -> None:
    """Sends a file, or the names that a directory holds, to the disk."""
    if os.path.islink(path):
        return
    if os.name == "nt" and os.path.isdir(path):  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; array writers wrap the system's own error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return isinstance(error, Exception) and any(w in str(error).lower() for w in _FULL_WORDS)


def remove(path: Path) -> None:
    """Removes a file or a directory with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
