"""Tensors by name: what readers of files with many tensors share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

Info = TypeVar("Info")


class TensorTable(Mapping[str, Info], Generic[Info]):
    """What a file or folder says of its tensors, by name, in the order of the file.

    Args:
      path: The file or folder.
      infos: What it says.
    """

    def __init__(self, path: Path, infos: dict[str, Info]):
        """Made by readers, which check what they pass."""
        self.path = path
        self._infos = infos

    def __getitem__(self, name: str) -> Info:
        """What the file says of a tensor."""
        try:
            return self._infos[name]
        except KeyError:
            raise KeyError(f"{self.path}: holds no tensor {name!r}.") from None

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the file."""
        return iter(self._infos)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._infos)


def fill_from(whole: np.ndarray) -> Callable[[int, np.ndarray], None]:
    """A function that fills arrays with an array's entries from a flat index on."""
    flat = whole.reshape(-1)

    def fill(start: int, out: np.ndarray) -> None:
        np.copyto(out, flat[start : start + out.size].reshape(out.shape))

    return fill
