"""A checkpoint that is filled tensor by tensor, and can be gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxweights.checkpoint._atomic import atomic
from jaxweights.checkpoint._check_destination import check_destination, refuse_unrelated
from jaxweights.checkpoint._disk import flush, fsync
from jaxweights.checkpoint._write_safetensors import copy_files

JOURNAL = "journal.jsonl"
_HASH_CHUNK = 1 << 24
_OPEN_FILES = 64
_FLUSHED = 1 << 26  # bytes after which a file's are sent to the disk


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie, in one file or in several.

    Args:
      nbytes: How many there are.
      locate: For a byte's number, the file that holds it, its number there, and how many bytes of
        the tensor follow there, itself included.
    """

    nbytes: int
    locate: Callable[[int], tuple[Path, int, int]]

    def spans(self, start: int, count: int) -> Iterator[tuple[Path, int, int]]:
        """File, first byte there and number of bytes of every part of a run of bytes."""
        while count:
            file, where, room = self.locate(start)
            length = min(room, count)
            yield file, where, length
            start, count = start + length, count - length


@dataclasses.dataclass(frozen=True)
class Finished:
    """A tensor that is written.

    Args:
      checksum: Of its bytes.
      inputs: Of what it was made of, by place.
    """

    checksum: str
    inputs: dict[str, str]


class Files(Protocol):
    """A format: the files that hold tensors, made before the tensors are and filled in any order.

    Attributes:
      nbytes: Bytes that they will take.
      names: What they are called in the folder, or the folders in it that hold them.
    """

    @property
    def nbytes(self) -> int:
        """Bytes that they will take."""
        ...

    @property
    def names(self) -> Collection[str]:
        """What they are called in the folder, or the folders in it that hold them."""
        ...

    def make(self, folder: Path, *, anew: bool) -> Mapping[str, Place]:
        """Makes the files in an empty folder, or finds those of an earlier run; says who is where.

        Args:
          folder: Where they lie.
          anew: Whether the folder is empty.

        Returns:
          The place of each tensor.
        """
        ...

    def finish(self, folder: Path, checksums: Mapping[str, str]) -> None:
        """Writes what can only be said when all tensors are there."""
        ...


class Destination:
    """The files of a checkpoint while they are filled.

    Args:
      folder: Where they lie until they are complete.
      places: Where each tensor goes.
      done: The tensors that an earlier run finished.

    Attributes:
      checksums: Of all tensors that are finished, by name.
      inputs: Of what they were made of, by place.
    """

    def __init__(self, folder: Path, places: Mapping[str, Place], done: Mapping[str, Finished]):
        """Made by `open_destination`."""
        self.folder = folder
        self.done = frozenset(done)
        self.checksums = {name: one.checksum for name, one in done.items()}
        self.inputs: dict[str, str] = {}
        for one in done.values():
            self.inputs |= one.inputs
        self._places = places
        self._files = _OpenFiles()
        self._open: dict[str, list[Any]] = {}  # bytes written and running checksum
        self._journal = os.open(folder / JOURNAL, os.O_WRONLY | os.O_APPEND)
        os.write(self._journal, b"\n")  # an earlier run's last line may be torn

    def append(self, name: str, data: np.ndarray, inputs: Mapping[str, str] | None = None) -> None:
        """Writes the next bytes of a tensor; the last ones finish it.

        Different tensors may be written by different threads at the same time.

        Args:
          name: The tensor.
          data: Its bytes, `(n,)` uint8.
          inputs: With the last ones: checksums of what it was made of.
        """
        import xxhash

        place = self._places[name]
        position, digest = self._open.setdefault(name, [0, xxhash.xxh3_128()])
        assert position + data.size <= place.nbytes, "more bytes than planned"
        digest.update(data)
        done = 0
        for file, where, count in place.spans(position, data.size):
            with self._files.opened(file) as opened:
                opened.write(data[done : done + count].data, where)
            done += count
        self._open[name][0] += data.size
        if position + data.size == place.nbytes:
            del self._open[name]
            finished = Finished(f"xxh3:{digest.hexdigest()}", dict(inputs or {}))
            self.checksums[name] = finished.checksum
            self.inputs |= finished.inputs
            line = json.dumps({"tensor": name, **dataclasses.asdict(finished)})
            os.write(self._journal, f"{line}\n".encode())

    def close(self) -> None:
        """Closes the files."""
        self._files.close()
        os.close(self._journal)


class _OpenFile:
    """A file that several threads write to."""

    def __init__(self, path: Path):
        self.users = 0
        self.unflushed = 0
        self.descriptor = os.open(path, os.O_WRONLY)
        self._lock = threading.Lock()

    def write(self, data: memoryview, where: int) -> None:
        """Writes bytes from a place on."""
        # The system lets one thread write to a file, and others burn their time until they may.
        with self._lock:
            done = 0
            while done < len(data):
                done += os.pwrite(self.descriptor, data[done:], where + done)
            self.unflushed += done


class _OpenFiles:
    """Files that are written to, of which few are open at a time.

    A thread sends what was written to the disk meanwhile, so that little is left for the end.
    """

    def __init__(self) -> None:
        self._open: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._flusher = threading.Thread(target=self._flush, daemon=True)
        self._flusher.start()

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[_OpenFile]:
        """A file, which stays open until the end of the block."""
        with self._lock:
            idle = [p for p, file in self._open.items() if not file.users and p != path]
            while len(self._open) >= _OPEN_FILES and idle:
                os.close(self._open.pop(idle.pop(0)).descriptor)
            file = self._open[path] if path in self._open else _OpenFile(path)
            self._open[path] = file
            file.users += 1
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1
                if file.unflushed >= _FLUSHED:
                    file.unflushed = 0
                    self._ready.put(path)

    def _flush(self) -> None:
        while (path := self._ready.get()) is not None:
            # Whatever fails here fails again, and is told, when all is flushed at the end.
            with contextlib.suppress(OSError), self.opened(path) as file:
                os.fsync(file.descriptor)

    def close(self) -> None:
        """Closes all of them."""
        self._ready.put(None)
        self._flusher.join()
        for file in self._open.values():
            os.close(file.descriptor)
        self._open = {}


@contextlib.contextmanager
def open_destination(
    function: str,
    destination: str | os.PathLike[str],
    files: Files,
    *,
    identity: Mapping[str, Any],
    companions: Callable[[Destination], Mapping[str, str | bytes | os.PathLike[str]]],
    overwrite: bool,
    resume: bool,
) -> Iterator[Destination]:
    """Makes the files of a checkpoint, which appear under their name when all is written.

    Args:
      function: Start of the error messages.
      destination: The folder to make.
      files: Those that hold the tensors.
      identity: What decides about every byte that is written, as JSON: a run goes on with what an
        earlier one left only if theirs are equal.
      companions: Gives the files that travel along, once all tensors are written.
      overwrite: Whether an existing checkpoint may be replaced, at the end.
      resume: Whether to go on where an earlier run with this destination was killed.

    Yields:
      The destination to write to.
    """
    destination = Path(destination)
    check_destination(function, destination, overwrite=overwrite, directory=True)
    refuse_unrelated(function, destination)
    with atomic(
        function,
        destination,
        directory=True,
        overwrite=overwrite,
        needs_bytes=files.nbytes,
        resume=resume,
        flushes=False,
    ) as folder:
        done = _read_journal(function, destination, folder, identity) if resume else {}
        # What an earlier run wrote behind its last tensor is written again.
        _empty(folder, sparing=(JOURNAL, *files.names) if done else ())
        if not done:
            (folder / JOURNAL).write_text(json.dumps({"identity": identity}) + "\n")
        places = files.make(folder, anew=not done)
        target = Destination(folder, places, _verified(done, places))
        try:
            yield target
        finally:
            target.close()
        files.finish(folder, target.checksums)
        copy_files(function, folder, companions(target))
        # Long for a big model, and a run that is killed meanwhile can be gone on with.
        flush(folder)
        (folder / JOURNAL).unlink()
        fsync(folder)


def _read_journal(
    function: str, destination: Path, folder: Path, identity: Mapping[str, Any]
) -> dict[str, Finished]:
    """What an earlier run finished, by tensor; nothing where there was none."""
    try:
        lines = (folder / JOURNAL).read_text().splitlines()
        earlier = json.loads(lines[0])["identity"]
    except (OSError, IndexError, ValueError, KeyError):
        return {}
    here = json.loads(json.dumps(identity))
    if earlier != here:
        keys = sorted(k for k in earlier.keys() | here.keys() if earlier.get(k) != here.get(k))
        raise ValueError(
            f"{function}: what was left of an earlier run for '{destination}' differs in "
            f"{', '.join(keys)}, so it cannot be gone on with. Start anew, without resuming."
        )
    done = {}
    for line in lines[1:]:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be torn
            entry = json.loads(line)
            done[entry["tensor"]] = Finished(entry["checksum"], entry["inputs"])
    return done


def _verified(done: dict[str, Finished], places: Mapping[str, Place]) -> dict[str, Finished]:
    """Those finished tensors whose bytes are really there: a machine may have lost its power."""
    return {
        name: one
        for name, one in done.items()
        if name in places and _checksum(places[name]) == one.checksum
    }


def _checksum(place: Place) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for path, start, left in place.spans(0, place.nbytes):
        with path.open("rb") as file:
            file.seek(start)
            while left and (data := file.read(min(left, _HASH_CHUNK))):
                digest.update(data)
                left -= len(data)
    return f"xxh3:{digest.hexdigest()}"


def _empty(folder: Path, *, sparing: Collection[str]) -> None:
    for entry in folder.iterdir():
        if entry.name not in sparing:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
