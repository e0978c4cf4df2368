"""Files that end with a checksum of what they hold, which tells whole ones from torn ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SEAL_BYTES = 16
_CHUNK = 1 << 24


def write_sealed(path: Path, pieces: Iterable[np.ndarray | bytes]) -> None:
    """Writes a file that has its name only when all of it is there.

    Args:
      path: Where.
      pieces: What it holds: bytes, or arrays whose bytes follow each other.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        for piece in pieces:
            held = piece if isinstance(piece, bytes) else _bytes_of(piece)
            digest.update(held)
            file.write(held)
        file.write(digest.digest())
    os.replace(partial, path)


def is_sealed(path: Path) -> bool:
    """Whether a file is there and holds what was written."""
    import xxhash

    if not path.is_file() or (left := path.stat().st_size - SEAL_BYTES) < 0:
        return False
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while left and (data := file.read(min(left, _CHUNK))):
            digest.update(data)
            left -= len(data)
        return not left and file.read() == digest.digest()


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
