"""What the layers pass on of the calibration tokens, in files: one set of them for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.recipes.onload._sealed import SEAL_BYTES, is_sealed, write_sealed


class HiddenStates:
    """The arrays between two layers, of all batches.

    Those of the next layer are written while those of this one are read, so that a killed run has
    either.

    Args:
      folder: Where the files lie.
      shapes: Shapes and dtypes of the arrays of each batch.
    """

    def __init__(self, folder: Path, shapes: Sequence[Sequence[Any]]):
        """Writes nothing yet."""
        self.folder = folder
        self._shapes = [[(tuple(x.shape), np.dtype(x.dtype)) for x in one] for one in shapes]

    @property
    def nbytes(self) -> int:
        """Bytes of one set."""
        return SEAL_BYTES + sum(
            math.prod(shape) * dtype.itemsize for one in self._shapes for shape, dtype in one
        )

    def write(self, stream: int, layer: int, batches: Iterable[Sequence[Any]]) -> None:
        """Writes what a layer reads, batch by batch as it is made."""
        pieces = (np.asarray(array) for arrays in batches for array in arrays)
        write_sealed(self._path(stream, layer), pieces)

    def read(self, stream: int, layer: int) -> Iterator[list[np.ndarray]]:
        """What a layer reads, batch by batch."""
        with self._path(stream, layer).open("rb", buffering=0) as file:
            for one in self._shapes:
                arrays = [np.empty(shape, dtype) for shape, dtype in one]
                for array in arrays:
                    _fill(file, array.reshape(-1).view(np.uint8))
                yield arrays

    def are_there(self, stream: int, layer: int) -> bool:
        """Whether a set is there and whole."""
        path = self._path(stream, layer)
        return path.is_file() and path.stat().st_size == self.nbytes and is_sealed(path)

    def drop(self, stream: int, layer: int) -> None:
        """Removes a set, if it is there."""
        self._path(stream, layer).unlink(missing_ok=True)

    def _path(self, stream: int, layer: int) -> Path:
        return self.folder / f"states-{stream}-{layer:05d}"


def _fill(file: Any, target: np.ndarray) -> None:
    done = 0
    while done < target.size:
        count = file.readinto(target[done:].data)
        if not count:
            raise OSError(f"'{file.name}' became shorter while it was being read.")
        done += count
