"""What every checkpoint offers, whatever its format."""

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._manifest import Parts
from jaxweights.checkpoint._mapped import MappedTensor
from jaxweights.checkpoint._tensor_table import fill_from
from jaxweights.checkpoint.exchange._module import Represented

_HASH_CHUNK = 1 << 24
_SAMPLE_BYTES = 1 << 12


class Checkpoint(abc.ABC):
    """A checkpoint of any format, read tensor by tensor.

    Args:
      path: The file or folder.
      format: `safetensors`, `gguf` or `orbax`.
      config: The model's configuration: `config.json`, or the metadata of a GGUF file without
        its tokenizer; empty where there is none. `quantization_config` is taken out where the
        tensors that it speaks of are read.
      metadata: What else the files say of themselves.
      files: Files to travel along, by name: configuration, tokenizer, licence. They fit what
        `read` gives: a config of quantized weights is replaced by its text without them.
      quantization: `quantization_config` where `represented` understands it; empty elsewhere.
      activations: Names, beside `names`, of tensors by which a runtime rounds activations and its
        cache: `read` gives them, and no weight needs them.
    """

    format: str
    tree: dict[str, Any] | None = None  # what the manifest says of an Orbax checkpoint's tree
    quantization: dict[str, Any]
    activations: tuple[str, ...] = ()
    unread: str | None = None  # why a `quantization_config` is not understood

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        metadata: dict[str, Any],
        files: dict[str, Any],
    ):
        """Made by `open_checkpoint`."""
        self.quantization = {}
        self.path = path
        self.config = config
        self.metadata = metadata
        self.files = files

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""

    @property
    def leaves(self) -> Mapping[str, Parts]:
        """Where tensors are in an Orbax checkpoint's tree, by name; empty for other formats."""
        return {}

    @property
    def is_torch(self) -> bool:
        """Whether names and orientations are those of torch, not those of a tree of parameters."""
        dotted = any("." in name for name in self.names)
        return not any("/" in name for name in self.names) and (dotted or self.format != "orbax")

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """Dtype that `read` gives, without reading it."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A tensor; quantized ones as the numbers they stand for."""

    def represented(self, name: str) -> np.ndarray | Represented:
        """A tensor as it is stored: quantized ones as represented weights of NumPy arrays."""
        return self.read(name)

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        """A function that fills an array with a tensor's entries from a flat index on.

        Where the format has no slices, the tensor is read as a whole once and held.
        """
        return fill_from(self.read(name))

    def mapped(self, name: str) -> MappedTensor | None:
        """Where a tensor's entries lie in a file as they are; None where they do not."""
        del name
        return None

    @abc.abstractmethod
    def _stored(self, name: str) -> tuple[str, np.ndarray]:
        """How a tensor is stored, in words, and its bytes, `(n,)` uint8."""

    def fingerprint(self, *, sampled: bool = False) -> str:
        """A hash of all names, shapes, dtypes and bytes, the same however they are sharded.

        Args:
          sampled: Whether only the first and last 4096 bytes of each tensor count, which is
            quick and still tells any two trained models apart.

        Returns:
          `sha256:` or `sampled-sha256:` and 64 hexadecimal digits.
        """
        total = hashlib.sha256()
        for name in sorted(self.names):
            stored, data = self._stored(name)
            if sampled and data.size > 2 * _SAMPLE_BYTES:
                data = np.concatenate([data[:_SAMPLE_BYTES], data[-_SAMPLE_BYTES:]])
            inner = hashlib.sha256()
            for start in range(0, data.size, _HASH_CHUNK):
                inner.update(data[start : start + _HASH_CHUNK].data)
            # repr quotes the name, so that no two lists of tensors give one text.
            line = f"{name!r} {self.shape(name)} {stored} {inner.hexdigest()}\n"
            total.update(line.encode("utf-8"))
            # Looked at once; where it lies mapped it would stay in this process.
            if (place := self.mapped(name)) is not None:
                place.forget(0, math.prod(self.shape(name)))
        return f"{'sampled-' if sampled else ''}sha256:{total.hexdigest()}"

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """Names and tensors, one tensor read at a time."""
        for name in self.names:
            yield name, self.read(name)
