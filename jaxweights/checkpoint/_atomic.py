"""Destinations that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxweights.checkpoint._check_destination import check_destination
from jaxweights.checkpoint._disk import (
    EXCHANGE,
    HAS_LOCKS,
    NO_REPLACE,
    allocated,
    flush,
    fsync,
    is_full,
    remove,
    rename_at_once,
    take_lock,
)

_MARK = ".jaxweights-partial-"
_LASTING = "resumable"


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


@contextlib.contextmanager
def atomic(
    function: str,
    destination: str | os.PathLike[str],
    *,
    directory: bool,
    overwrite: bool,
    needs_bytes: int = 0,
    resume: bool | None = None,
    flushes: bool = True,
) -> Iterator[Path]:
    """`atomic_directory` or `atomic_file` whose errors start with the caller's name.

    With `resume`, the hidden sibling outlives an interrupted run, and two runs for one destination
    refuse each other: True yields what an earlier run left, if anything, and False an empty one.
    Without `flushes`, the body sends to the disk what it writes.
    """
    target = Path(os.path.realpath(destination))
    made_parents = _make_parents(target.parent)
    lasting = None if resume is None else target.parent / f".{target.name}{_MARK}{_LASTING}"
    try:
        _recover(target, sparing=lasting if resume else None)
        check_destination(function, destination, overwrite=overwrite, directory=directory)
        free = shutil.disk_usage(target.parent).free + (allocated(lasting) if lasting else 0)
        if needs_bytes > free:
            raise OSError(
                errno.ENOSPC,
                f"{function}: '{destination}' needs {needs_bytes} bytes, but only {free} are free "
                "on its disk. Nothing was written. Free some space or choose another disk.",
            )
        if lasting is None:
            partial, lock = _make_partial(target, directory=directory)
        else:
            partial, lock = _claim_partial(function, destination, lasting)
        keep = False
        try:
            yield partial
            if flushes:
                flush(partial)
            _put_in_place(function, partial, target, overwrite=overwrite)
        except BaseException as error:
            keep = lasting is not None and isinstance(error, KeyboardInterrupt)
            if is_full(error):
                raise OSError(
                    errno.ENOSPC,
                    f"{function}: the disk is full while writing '{destination}'. What was there "
                    "before is untouched and the partial result was removed. Free some space or "
                    f"choose another disk ({_words(error):.200}).",
                ) from error
            raise
        finally:
            if not keep:
                remove(partial)
            if lock is not None:
                os.close(lock)
    except BaseException:
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _words(error: BaseException) -> str:
    """What the system said, without its number."""
    return str(getattr(error, "strerror", None) or error)


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
        lock = take_lock(partial)
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
    lock = take_lock(partial)
    if lock is None and HAS_LOCKS:
        raise FileExistsError(
            f"{function}: another run is writing '{destination}' at this moment. Nothing was "
            "written. Wait for it, or choose another destination."
        )
    return partial, lock


def _recover(target: Path, *, sparing: Path | None = None) -> None:
    """Removes what killed processes left, after putting back a destination caught mid-swap."""
    prefix = f".{target.name}{_MARK}"
    for path in [p for p in target.parent.iterdir() if p.name.startswith(prefix)]:
        lock = None if path == sparing else take_lock(path)
        if lock is None:
            continue
        try:
            if path.name.endswith(".old") and not os.path.lexists(target):
                os.rename(path, target)
            else:
                remove(path)
        finally:
            os.close(lock)


def _put_in_place(function: str, partial: Path, target: Path, *, overwrite: bool) -> None:
    """Renames the finished sibling; after it the sibling's name holds nothing or the old one."""
    try:
        if not os.path.lexists(target):
            if not rename_at_once(partial, target, NO_REPLACE):
                os.rename(partial, target)
        elif not overwrite:
            raise FileExistsError(errno.EEXIST, "appeared meanwhile")
        elif not partial.is_dir():
            os.replace(partial, target)
        elif not rename_at_once(partial, target, EXCHANGE):
            # Two steps: killed between them, the next run puts the old directory back.
            _swap_in_two_steps(partial, target)
    except FileExistsError:
        raise FileExistsError(
            f"{function}: '{target}' appeared while its replacement was being written, and was "
            "kept. Choose another destination or say overwrite=True."
        ) from None
    fsync(target.parent)


def _swap_in_two_steps(partial: Path, target: Path) -> None:
    lock = take_lock(target)  # else another process may take what is set aside for abandoned
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
    remove(old)
