"""A folder of safetensors that is filled tensor by tensor, and can be gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._atomic import atomic, check_destination, refuse_unrelated
from jaxweights.checkpoint._write_safetensors import (
    TensorPlan,
    copy_files,
    head_of,
    plan_shards,
    shard_name,
    write_index,
)

JOURNAL = "journal.jsonl"
_HASH_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: `nbytes` bytes of a file from `start` on."""

    file: Path
    start: int
    nbytes: int


class Destination:
    """The files of a checkpoint while they are filled.

    Args:
      folder: Where they lie until they are complete.
      places: Where each tensor goes.
      done: Checksums of the tensors that an earlier run finished.
    """

    def __init__(self, folder: Path, places: Mapping[str, Place], done: dict[str, str]):
        """Made by `open_destination`."""
        self.folder = folder
        self.done = done
        self.checksums: dict[str, str] = dict(done)
        self._places = places
        self._files: dict[Path, int] = {}
        self._open: dict[str, list[Any]] = {}  # bytes written and running checksum
        self._journal = os.open(folder / JOURNAL, os.O_WRONLY | os.O_APPEND)

    def append(self, name: str, data: np.ndarray) -> None:
        """Writes the next bytes of a tensor, `(n,)` uint8; the last ones finish it."""
        import xxhash

        place = self._places[name]
        position, digest = self._open.setdefault(name, [0, xxhash.xxh3_128()])
        assert position + data.size <= place.nbytes, "more bytes than planned"
        digest.update(data)
        view, done = data.data, 0
        while done < data.size:
            where = place.start + position + done
            done += os.pwrite(self._descriptor(place.file), view[done:], where)
        self._open[name][0] += data.size
        if position + data.size == place.nbytes:
            del self._open[name]
            self.checksums[name] = f"xxh3:{digest.hexdigest()}"
            line = json.dumps({"tensor": name, "checksum": self.checksums[name]})
            os.write(self._journal, f"{line}\n".encode())

    def close(self) -> None:
        """Closes the files."""
        for descriptor in (*self._files.values(), self._journal):
            os.close(descriptor)
        self._files = {}

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_WRONLY)
        return self._files[file]


@contextlib.contextmanager
def open_destination(
    function: str,
    destination: str | os.PathLike[str],
    plans: Sequence[TensorPlan],
    *,
    identity: Mapping[str, Any],
    files: Callable[[Destination], Mapping[str, str | bytes | os.PathLike[str]]],
    max_shard_bytes: int,
    overwrite: bool,
    resume: bool,
) -> Iterator[Destination]:
    """Makes the files of a checkpoint, which appear under their name when all is written.

    Args:
      function: Start of the error messages.
      destination: The folder to make.
      plans: The tensors, in the order in which they are cut into shards.
      identity: What decides about every byte that is written, as JSON: a run goes on with what an
        earlier one left only if theirs are equal.
      files: Gives the files that travel along, once all tensors are written.
      max_shard_bytes: Most bytes of tensors a file.
      overwrite: Whether an existing checkpoint may be replaced, at the end.
      resume: Whether to go on where an earlier run with this destination was killed.

    Yields:
      The destination to write to.
    """
    destination = Path(destination)
    check_destination(function, destination, overwrite=overwrite, directory=True)
    refuse_unrelated(function, destination)
    total = sum(plan.nbytes for plan in plans)
    shards = plan_shards(list(plans), max_shard_bytes)
    with atomic(
        function,
        destination,
        directory=True,
        overwrite=overwrite,
        needs_bytes=total,
        resume=resume,
    ) as folder:
        done = _read_journal(function, destination, folder, identity) if resume else {}
        if not done:
            _empty(folder)
            (folder / JOURNAL).write_text(json.dumps({"identity": identity}) + "\n")
        places: dict[str, Place] = {}
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = folder / shard_name(i, len(shards))
            head, starts = head_of(shard, {"format": "pt"})
            if not done:
                file.write_bytes(head)
            for plan, start in starts:
                places[plan.name] = Place(file, start, plan.nbytes)
            os.truncate(file, len(head) + sum(plan.nbytes for plan in shard))
            weight_map |= {plan.name: file.name for plan in shard}
        target = Destination(folder, places, _verified(done, places))
        try:
            yield target
        finally:
            target.close()
        if len(shards) > 1:
            write_index(folder, weight_map, total)
        copy_files(function, folder, files(target))
        (folder / JOURNAL).unlink()


def _read_journal(
    function: str, destination: Path, folder: Path, identity: Mapping[str, Any]
) -> dict[str, str]:
    """Checksums by tensor of what an earlier run finished; nothing where there was none."""
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
            done[entry["tensor"]] = entry["checksum"]
    return done


def _verified(done: dict[str, str], places: Mapping[str, Place]) -> dict[str, str]:
    """Those finished tensors whose bytes are really there: a machine may have lost its power."""
    return {
        name: checksum
        for name, checksum in done.items()
        if name in places and _checksum(places[name]) == checksum
    }


def _checksum(place: Place) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with place.file.open("rb") as file:
        file.seek(place.start)
        left = place.nbytes
        while left and (data := file.read(min(left, _HASH_CHUNK))):
            digest.update(data)
            left -= len(data)
    return f"xxh3:{digest.hexdigest()}"


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
