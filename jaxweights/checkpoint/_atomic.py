"""Destinations that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing tells a dead writer's files from a live one's
    fcntl = None

_MARK = ".jaxweights-partial-"
_LASTING = "resumable"
# Quota and per-process file size limits end a write just as a full disk does.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("no space left on device", "disk quota exceeded", "file too large")


@contextlib.contextmanager
def atomic_directory(
    destination: str | os.PathLike[str], *, overwrite: bool = False, needs_bytes: int = 0
) -> Iterator[Path]:
    """Fills a directory that appears under its name only when it is complete.

    The body writes into a hidden sibling. When it ends, everything is flushed to the disk and the
    sibling is renamed; when it fails or the process is killed, the destination is as before. What
    killed processes left behind is removed by the next run with the same destination.

    Args:
      destination: Directory to make. Missing parents are made too.
      overwrite: Whether an existing directory may be replaced, in one step, at the end.
      needs_bytes: Bytes that will be written, if known: less free space is refused at once.

    Yields:
      The path of an empty directory to write into.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False.
      OSError: If the disk is full; the destination is untouched.
      ValueError: If overwriting would remove the working directory or a directory above it.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> with atomic_directory(folder / "model") as partial:
      ...     _ = (partial / "config.json").write_text("{}")
      >>> [file.name for file in (folder / "model").iterdir()]
      ['config.json']
    """
    with atomic(
        "atomic_directory",
        destination,
        directory=True,
        overwrite=overwrite,
        needs_bytes=needs_bytes,
    ) as partial:
        yield partial


@contextlib.contextmanager
def atomic_file(
    destination: str | os.PathLike[str], *, overwrite: bool = False, needs_bytes: int = 0
) -> Iterator[Path]:
    """Writes a file that appears under its name only when it is complete.

    Args:
      destination: File to make. Missing parents are made too.
      overwrite: Whether an existing file may be replaced, in one step, at the end.
      needs_bytes: Bytes that will be written, if known: less free space is refused at once.

    Yields:
      The path of an empty file to write to.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False, or is a directory.
      OSError: If the disk is full; the destination is untouched.

    Example:
      >>> import tempfile
      >>> report = Path(tempfile.mkdtemp()) / "report.html"
      >>> with atomic_file(report) as partial:
      ...     _ = partial.write_text("<html></html>")
      >>> report.read_text()
      '<html></html>'
    """
    with atomic(
        "atomic_file",
        destination,
        directory=False,
        overwrite=overwrite,
        needs_bytes=needs_bytes,
    ) as partial:
        yield partial


def check_destination(
    function: str, destination: str | os.PathLike[str], *, overwrite: bool, directory: bool
) -> Path:
    """Refuses a destination that may not be written, before any work is done for it.

    Args:
      function: Start of the error messages.
      destination: Where something shall be written.
      overwrite: Whether an existing destination may be replaced.
      directory: Whether a directory, not a file, shall be written.

    Returns:
      The destination with links resolved, so that its siblings lie on the same disk.
    """
    path = Path(os.path.realpath(destination))
    _refuse_unwritable(function, destination, path.parent)
    if not os.path.lexists(path):
        return path
    if not overwrite:
        raise FileExistsError(
            f"{function}: '{destination}' exists and nothing was written. Choose another "
            "destination, remove it, or say overwrite=True."
        )
    if path.is_dir() != directory:
        is_now, wanted = ("directory", "file") if path.is_dir() else ("file", "directory")
        raise FileExistsError(
            f"{function}: '{destination}' is a {is_now} and a {wanted} cannot replace it. Nothing "
            "was written. Choose another destination."
        )
    if any(place.is_relative_to(path) for place in _places_in_use()):
        raise ValueError(
            f"{function}: overwriting '{destination}' would remove the working directory or the "
            "home directory. Nothing was written. Choose another destination."
        )
    return path


def _refuse_unwritable(function: str, destination: str | os.PathLike[str], parent: Path) -> None:
    """Refuses a destination whose folder cannot be made or written to."""
    nearest = next(place for place in (parent, *parent.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"{function}: '{destination}' cannot be made, because '{nearest}' is no folder. "
            "Nothing was written. Choose another destination."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{function}: '{destination}' cannot be made, because '{nearest}' may not be written "
            "to. Nothing was written. Choose another destination, or change its permissions."
        )


def refuse_unrelated(function: str, destination: str | os.PathLike[str]) -> None:
    """Refuses to overwrite a folder that is no checkpoint: all that it holds would be lost."""
    path = Path(destination)
    known = ("jaxweights.json", "*.safetensors", "*.safetensors.index.json")
    if not path.is_dir() or any(next(path.glob(pattern), None) for pattern in known):
        return
    entries = sorted(entry.name for entry in path.iterdir())
    if entries:
        raise FileExistsError(
            f"{function}: '{destination}' is a folder that holds no checkpoint but {entries[:5]}, "
            "which overwriting would remove. Nothing was written. Choose another destination, or "
            "remove the folder yourself."
        )


def _places_in_use() -> list[Path]:
    places = []
    for find in (Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):  # neither need exist in a container
            places.append(find())
    return places


@contextlib.contextmanager
def atomic(
    function: str,
    destination: str | os.PathLike[str],
    *,
    directory: bool,
    overwrite: bool,
    needs_bytes: int = 0,
    resume: bool | None = None,
) -> Iterator[Path]:
    """`atomic_directory` or `atomic_file` whose errors start with the caller's name.

    With `resume`, the hidden sibling outlives an interrupted run, and two runs for one destination
    refuse each other: True yields what an earlier run left, if anything, and False an empty one.
    """
    target = Path(os.path.realpath(destination))
    made_parents = _make_parents(target.parent)
    lasting = None if resume is None else target.parent / f".{target.name}{_MARK}{_LASTING}"
    try:
        _recover(target, sparing=lasting if resume else None)
        check_destination(function, destination, overwrite=overwrite, directory=directory)
        free = shutil.disk_usage(target.parent).free + (_allocated(lasting) if lasting else 0)
        if needs_bytes > free:
            raise OSError(
                errno.ENOSPC,
                f"{function}: '{destination}' needs {needs_bytes} bytes, but only {free} are free "
                "on its disk. Nothing was written. Free some space or choose another disk",
            )
        if lasting is None:
            partial, lock = _make_partial(target, directory=directory)
        else:
            partial, lock = _claim_partial(function, destination, lasting)
        keep = False
        try:
            yield partial
            flush(partial)
            _put_in_place(function, partial, target, overwrite=overwrite)
        except BaseException as error:
            keep = lasting is not None and isinstance(error, KeyboardInterrupt)
            if _is_full(error):
                raise OSError(
                    errno.ENOSPC,
                    f"{function}: the disk is full while writing '{destination}'. What was there "
                    "before is untouched and the partial result was removed. Free some space or "
                    f"choose another disk ({error!s:.200})",
                ) from error
            raise
        finally:
            if not keep:
                _remove(partial)
            if lock is not None:
                os.close(lock)
    except BaseException:
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _make_parents(parent: Path) -> list[Path]:
    """Makes missing parents; returns them deepest first, for removal should the writing fail."""
    made = []
    for path in (parent, *parent.parents):
        if path.exists():
            break
        made.append(path)
    parent.mkdir(parents=True, exist_ok=True)
    return made


def _make_partial(target: Path, *, directory: bool) -> tuple[Path, int | None]:
    """Makes the hidden sibling and locks it for as long as this process lives.

    The kernel drops the lock when the process dies, however it dies: an unlocked sibling is
    nobody's. Process ids would not do: they are used again, and differ between containers.
    """
    while True:
        partial = target.parent / f".{target.name}{_MARK}{secrets.token_hex(8)}"
        partial.mkdir() if directory else partial.touch(exist_ok=False)
        lock = _lock(partial)
        # Between making and locking, another process may have taken it for an abandoned one.
        if partial.exists():
            return partial, lock
        if lock is not None:
            os.close(lock)


def _claim_partial(
    function: str, destination: str | os.PathLike[str], partial: Path
) -> tuple[Path, int | None]:
    """Makes or takes over the hidden sibling of a fixed name, and locks it."""
    partial.mkdir(exist_ok=True)
    lock = _lock(partial)
    if lock is None and fcntl is not None:
        raise FileExistsError(
            f"{function}: another run is writing '{destination}' at this moment. Nothing was "
            "written. Wait for it, or choose another destination."
        )
    return partial, lock


def _allocated(folder: Path) -> int:
    """Bytes of the disk that the files of a folder take already."""
    return sum(512 * getattr(file.stat(), "st_blocks", 0) for file in folder.rglob("*"))


def _lock(path: Path) -> int | None:
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


def _recover(target: Path, *, sparing: Path | None = None) -> None:
    """Removes what killed processes left, after putting back a destination caught mid-swap."""
    prefix = f".{target.name}{_MARK}"
    for path in [p for p in target.parent.iterdir() if p.name.startswith(prefix)]:
        lock = None if path == sparing else _lock(path)
        if lock is None:
            continue
        try:
            if path.name.endswith(".old") and not os.path.lexists(target):
                os.rename(path, target)
            else:
                _remove(path)
        finally:
            os.close(lock)


def flush(path: Path) -> None:
    """Sends files and directories to the disk: a rename must not outrun the bytes it names."""
    if path.is_dir():
        for root, _, files in os.walk(path, topdown=False):
            for name in files:
                _fsync(os.path.join(root, name))
            _fsync(root)
    else:
        _fsync(path)


def _fsync(path: str | Path) -> None:
    if os.path.islink(path):
        return
    if os.name == "nt" and os.path.isdir(path):  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(function: str, partial: Path, target: Path, *, overwrite: bool) -> None:
    """Renames the finished sibling; after it the sibling's name holds nothing or the old one."""
    try:
        if not os.path.lexists(target):
            if not _rename(partial, target, _NO_REPLACE):
                os.rename(partial, target)
        elif not overwrite:
            raise FileExistsError(errno.EEXIST, "appeared meanwhile")
        elif not partial.is_dir():
            os.replace(partial, target)
        elif not _rename(partial, target, _EXCHANGE):
            # Two steps: killed between them, the next run puts the old directory back.
            _swap_in_two_steps(partial, target)
    except FileExistsError:
        raise FileExistsError(
            f"{function}: '{target}' appeared while its replacement was being written, and was "
            "kept. Choose another destination or say overwrite=True."
        ) from None
    _fsync(target.parent)


def _swap_in_two_steps(partial: Path, target: Path) -> None:
    lock = _lock(target)  # else another process may take what is set aside for abandoned
    old = partial.with_name(f"{partial.name}.old")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _remove(old)


_NO_REPLACE, _EXCHANGE = 1, 2  # RENAME_NOREPLACE and RENAME_EXCHANGE of Linux


def _rename(source: Path, target: Path, flag: int) -> bool:
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


def _is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; array writers wrap the system's own error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return isinstance(error, Exception) and any(w in str(error).lower() for w in _FULL_WORDS)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
