"""Blocks that are done, one file each, until all are and the checkpoint is written from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.checkpoint._manifest import array_records, build_tree, encode_tree, object_at
from jaxweights.core import Path as LeafPath
from jaxweights.recipes.onload._sealed import is_sealed, write_sealed

_LENGTH = 8  # bytes of the header's length


class BlockFiles:
    """The leaves of each layer that were changed, represented as they are, bit for bit.

    Args:
      folder: Where the files lie.
    """

    def __init__(self, folder: Path):
        """Writes nothing yet."""
        self._folder = folder
        self._newest: tuple[int, dict[str, Any], int] | None = None

    def write(self, layer: int, leaves: Mapping[LeafPath, Any], said: Any) -> None:
        """Writes a layer that is done.

        Args:
          layer: Its number.
          leaves: The leaves that were changed.
          said: What is known of them, as JSON.
        """
        tree = {path: jax.tree.map(np.asarray, leaf) for path, leaf in leaves.items()}
        node, arrays = encode_tree(tree)
        header = json.dumps({"tree": node, "said": said}).encode()
        records = array_records(node)[0]
        self._newest = None
        write_sealed(
            self._path(layer),
            [
                len(header).to_bytes(_LENGTH, "little"),
                header,
                *(arrays[record.parts] for record in records),
            ],
        )

    def is_there(self, layer: int) -> bool:
        """Whether a layer is done and its file whole."""
        return is_sealed(self._path(layer))

    def said(self, layer: int) -> Any:
        """What was said of a layer."""
        return self._header(layer)[0]["said"]

    def paths(self, layer: int) -> list[LeafPath]:
        """The leaves of a layer that were changed."""
        return [path for path, _ in self._header(layer)[0]["tree"]["items"]]

    def read(self, layer: int, path: LeafPath) -> Any:
        """A leaf of a layer, of NumPy arrays."""
        header, start = self._header(layer)
        arrays = {}
        with self._path(layer).open("rb") as file:
            for record in array_records(header["tree"])[0]:
                count = int(np.prod(record.shape, dtype=np.int64)) * record.dtype.itemsize
                if record.parts[0] == path:
                    file.seek(start)
                    data = np.frombuffer(file.read(count), np.uint8)
                    arrays[record.parts] = data.view(record.dtype).reshape(record.shape)
                start += count
        return build_tree(object_at(header["tree"], (path,)), arrays, (path,))

    def _header(self, layer: int) -> tuple[dict[str, Any], int]:
        """A file's header, and where the arrays begin."""
        if self._newest is None or self._newest[0] != layer:
            with self._path(layer).open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH), "little")
                self._newest = layer, json.loads(file.read(length)), _LENGTH + length
        return self._newest[1:]

    def _path(self, layer: int) -> Path:
        return self._folder / f"block-{layer:05d}"
