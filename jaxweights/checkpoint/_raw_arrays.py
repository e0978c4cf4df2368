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

import numpy as np

from jaxweights.checkpoint._array_store import save_arrays, storage_key, stored_dtype
from jaxweights.checkpoint._manifest import Parts

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

    def make(self) -> None:
        """Makes the folder, with every chunk at its full length."""
        import tensorstore as ts

        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(self.folder.resolve())},
            "metadata": {
                "shape": list(self.shape),
                "chunks": list(self.chunk),
                "compressor": None,
                "dimension_separator": ".",
            },
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
