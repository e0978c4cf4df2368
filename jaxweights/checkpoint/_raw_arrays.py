"""Arrays in Orbax's files whose bytes are written by whoever has them, piece by piece.

Each array is a folder of uncompressed chunks, every one a run of the array's bytes: it can be
filled from any byte on without holding more, which TensorStore's own writers cannot, and read by
every reader of Orbax and zarr.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._array_store import save_arrays, storage_key, stored_dtype
from jaxweights.checkpoint._json import read_json_object
from jaxweights.checkpoint._manifest import ArrayRecord, Parts

# Readers hold a chunk at a time; a model of 10 GB is a few hundred files.
CHUNK_BYTES = 1 << 26
# What Orbax itself notes about when it wrote: a run that was gone on with has no one such time.
_TIMES = ("init_timestamp_nsecs", "commit_timestamp_nsecs")


@dataclasses.dataclass(frozen=True)
class RawArray:
    """One array, cut into chunks that are runs of its bytes.

    Args:
      folder: The array's own folder.
      shape: Its shape.
      dtype: Its dtype.
      limit: Most bytes of a chunk.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    limit: int = CHUNK_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk: part of one axis, one entry of those before it, all of those behind."""
        if not self.shape:
            return ()
        axis, length = self._cut
        return (*[1] * axis, length, *self.shape[axis + 1 :])

    def locate(self, position: int) -> tuple[Path, int, int]:
        """The file of a byte, its number there, and how many bytes of the array follow there."""
        if not self.shape:
            return self.folder / "0", position, self.nbytes - position
        axis, length = self._cut
        block, whole = length * self._row(axis), self.shape[axis] * self._row(axis)
        outer, inside = divmod(position, whole)
        number, offset = divmod(inside, block)
        before = np.unravel_index(outer, self.shape[:axis]) if axis else ()
        indices = (*map(int, before), number, *[0] * (len(self.shape) - axis - 1))
        room = min(block, whole - number * block) - offset
        return self.folder / ".".join(map(str, indices)), offset, room

    @property
    def metadata(self) -> dict[str, Any]:
        """What zarr is told of it."""
        return {
            "shape": list(self.shape),
            "chunks": list(self.chunk),
            "compressor": None,
            "dimension_separator": ".",
        }

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills a contiguous array with entries from `start` on, in flat order."""
        target = out.reshape(-1).view(np.uint8)
        done, position = 0, start * self.dtype.itemsize
        while done < target.size:
            file, where, room = self.locate(position + done)
            count = min(room, target.size - done)
            with file.open("rb", buffering=0) as opened:
                opened.seek(where)
                read = opened.readinto(target[done : done + count].data)
            if not read:
                raise OSError(f"'{file}' is shorter than its array says.")
            done += read

    def make(self) -> None:
        """Makes the folder, with every chunk at its full length."""
        import tensorstore as ts

        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(self.folder.resolve())},
            "metadata": self.metadata,
        }
        ts.open(spec, dtype=ts.dtype(self.dtype.name), create=True, delete_existing=True).result()
        length, position = math.prod(self.chunk) * self.dtype.itemsize, 0
        while position < self.nbytes:
            file, _, room = self.locate(position)
            with file.open("wb") as made:
                made.truncate(length)  # the last chunk along an axis may be longer than the array
            position += room

    @property
    def _cut(self) -> tuple[int, int]:
        """The axis that is cut, and how much of it a chunk holds; chunks are of like size."""
        axis = next(i for i in range(len(self.shape)) if self._row(i) <= self.limit)
        most = self.limit // self._row(axis)
        count = -(-self.shape[axis] // most)
        return axis, -(-self.shape[axis] // count)

    def _row(self, axis: int) -> int:
        """Bytes of one entry of an axis."""
        return math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize


def find_raw_array(folder: Path, record: ArrayRecord) -> RawArray | None:
    """An array of a checkpoint that a stream made; None where it is stored in another way."""
    array = RawArray(folder / ".".join(storage_key(record.parts)), record.shape, record.dtype)
    about = array.folder / ".zarray"
    if not about.is_file():
        return None
    said = read_json_object(about, where=f"'{about}'")
    wanted = array.metadata | {"order": "C", "filters": None}
    return array if all(said.get(key) == value for key, value in wanted.items()) else None


class CheckedSlices:
    """An array that is read in slices, and refused at its end if it is not what was saved.

    Args:
      array: The array.
      checksum: What the manifest says of its bytes, if it does.
      where: Start of the error message.
    """

    def __init__(self, array: RawArray, checksum: str | None, where: str):
        """Begins before the first entry."""
        import xxhash

        self._array, self._checksum, self._where = array, checksum, where
        self._digest, self._next = xxhash.xxh3_128(), 0

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills a contiguous array; slices that follow each other from the first are summed up."""
        self._array.read_into(start, out)
        if start != self._next or self._checksum is None:
            return
        self._next = start + out.size
        self._digest.update(out.reshape(-1).view(np.uint8).data)
        done = self._next * out.itemsize == self._array.nbytes
        if done and f"xxh3:{self._digest.hexdigest()}" != self._checksum:
            raise ValueError(
                f"{self._where}: the values are not those that were saved. The files are damaged; "
                "copy them again."
            )


def raw_arrays(
    folder: Path, arrays: Mapping[Parts, tuple[tuple[int, ...], np.dtype]]
) -> dict[Parts, RawArray]:
    """Where arrays of some shapes and dtypes lie; empty ones lie nowhere."""
    return {
        parts: RawArray(folder / ".".join(storage_key(parts)), shape, stored_dtype(dtype))
        for parts, (shape, dtype) in arrays.items()
        if math.prod(shape)
    }


def make_raw_arrays(folder: Path, arrays: Mapping[Parts, RawArray]) -> None:
    """Makes what Orbax finds the arrays by, and the arrays, filled with zeros."""
    # Orbax describes a tree only while it writes one, so it writes one of single numbers.
    save_arrays(folder, {parts: np.zeros(1, a.dtype) for parts, a in arrays.items()}, packed=False)
    for array in arrays.values():
        assert array.folder.is_dir(), "Orbax names an array's folder by its keys, with dots"
        for file in array.folder.iterdir():
            file.unlink()
        array.make()
    about = folder / "_CHECKPOINT_METADATA"
    if about.exists():
        said = json.loads(about.read_text())
        about.write_text(json.dumps(said | {time: 0 for time in _TIMES if time in said}))
    success = folder / "commit_success.txt"  # it holds the name of a temporary folder
    if success.exists():
        os.truncate(success, 0)
