"""One way to read a checkpoint, whatever its format."""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.checkpoint._gguf import GGUFReader, open_gguf
from jaxweights.checkpoint._json import dump_json, read_json_object
from jaxweights.checkpoint._manifest import Parts, build_tree, digest_of, leaf_parts, object_at
from jaxweights.checkpoint._mapped import MappedTensor
from jaxweights.checkpoint._raw_arrays import CheckedSlices
from jaxweights.checkpoint._safetensors import SafetensorsReader, open_safetensors
from jaxweights.checkpoint._safetensors_header import DTYPES
from jaxweights.checkpoint._saved_tree import CONFIG, MANIFEST, SavedTree
from jaxweights.checkpoint._tensor_table import fill_from
from jaxweights.checkpoint._untrusted import contained, refuse_pickle
from jaxweights.checkpoint.exchange._gguf_codes import INTEGER_TYPES, unpack_gguf
from jaxweights.checkpoint.exchange._module import Part, Represented
from jaxweights.checkpoint.exchange._settings import Module, UnknownFormat, quantized_modules

# What travels along with the weights of a Hugging Face checkpoint.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE",
)
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
    """

    format: str
    tree: dict[str, Any] | None = None  # what the manifest says of an Orbax checkpoint's tree
    quantization: dict[str, Any]
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


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint of any format that this library reads.

    Args:
      path: A `.safetensors` or `.gguf` file; a folder with safetensors files, with one GGUF file,
        or made by `save_tree`.

    Returns:
      The checkpoint, of which nothing but headers is read yet.

    Raises:
      FileNotFoundError: If there is no such path, or nothing to read in the folder.
      ValueError: If a file is damaged, or is a pickle.

    Example:
      >>> import tempfile
      >>> from jaxweights.checkpoint import write_safetensors
      >>> folder = Path(tempfile.mkdtemp()) / "model"
      >>> config = '{"model_type": "llama"}'
      >>> write_safetensors(folder, {"norm": np.ones(4)}, files={"config.json": config})
      >>> checkpoint = open_checkpoint(folder)
      >>> checkpoint.names, checkpoint.shape("norm"), checkpoint.config
      (('norm',), (4,), {'model_type': 'llama'})
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"open_checkpoint: '{path}' does not exist.")
    refuse_pickle("open_checkpoint", path)
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF" or path.suffix == ".gguf":
            return _GGUFCheckpoint(path, {})
        if path.suffix == ".safetensors":
            return _SafetensorsCheckpoint(path, path.parent)
        raise ValueError(
            f"open_checkpoint: '{path}' starts with {magic!r} and is neither .safetensors nor "
            ".gguf. Give one of these, or a folder."
        )
    if (path / MANIFEST).is_file():
        return _OrbaxCheckpoint(path)
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return _SafetensorsCheckpoint(path, path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        file = contained(path, ggufs[0].name, "open_checkpoint")
        return _GGUFCheckpoint(file, _companions(path))
    if ggufs:
        raise ValueError(
            f"open_checkpoint: '{path}' holds {len(ggufs)} GGUF files, "
            f"{[file.name for file in ggufs[:5]]}. Give the one that is meant; a model split over "
            "several must be joined first with llama.cpp's `llama-gguf-split --merge`."
        )
    raise FileNotFoundError(
        f"open_checkpoint: '{path}' holds no safetensors, no GGUF file and no {MANIFEST}. Give a "
        "folder that does."
    )


class _SafetensorsCheckpoint(Checkpoint):
    """Safetensors, with the files that Hugging Face puts beside them.

    The tensors of a quantized module appear as the one weight that they stand for.
    """

    format = "safetensors"

    def __init__(self, path: Path, folder: Path):
        self._reader: SafetensorsReader = open_safetensors(path)
        files: dict[str, Any] = _companions(folder)
        config = _config(files)
        super().__init__(path, config, dict(self._reader.metadata), files)
        self.modules: dict[str, Module] = {}
        given = config.get("quantization_config")
        if isinstance(given, dict):
            try:
                self.modules = quantized_modules(given, self._reader)
            except UnknownFormat as error:
                self.unread = str(error)
                return
            self.quantization = given
            self.config = {k: v for k, v in config.items() if k != "quantization_config"}
            self.files = {**files, CONFIG: dump_json(self.config)}
        self._refuse_twice()

    @functools.cached_property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        owner = {t: name for name, m in self.modules.items() for t in m.tensors.values()}
        return tuple(dict.fromkeys(owner.get(name, name) for name in self._reader))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.modules:
            return self._reader[name].shape
        with self._blaming(name):
            return self.modules[name].shape(self._parts(name))

    def dtype(self, name: str) -> np.dtype:
        if name in self.modules:
            return self._module_dtype(name)
        stored = self._reader[name].dtype
        # A packed dtype has no NumPy equal; reading it says so in full.
        return DTYPES[stored] if stored in DTYPES else self._reader.read(name).dtype

    def read(self, name: str) -> np.ndarray:
        if name not in self.modules:
            return self._reader.read(name)
        weight = self.represented(name)
        return weight if isinstance(weight, np.ndarray) else np.asarray(weight.materialize())

    def represented(self, name: str) -> np.ndarray | Represented:
        if name not in self.modules:
            return self._reader.read(name)
        with self._blaming(name):
            return self.modules[name].unpack(self._parts(name))

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        # The bytes of booleans are checked when they are read as a whole.
        if name in self.modules or self._reader[name].dtype == "BOOL":
            return super().reader(name)
        return functools.partial(self._reader.read_into, name)

    def mapped(self, name: str) -> MappedTensor | None:
        return None if name in self.modules else self._reader.mapped(name)

    def _stored(self, name: str) -> tuple[str, np.ndarray]:
        if name not in self.modules:
            return self._reader[name].dtype, self._reader.raw(name)
        tensors = sorted(self.modules[name].tensors.items())
        kinds = [f"{part} {self._reader[t].dtype} {self._reader[t].shape}" for part, t in tensors]
        return "; ".join(kinds), np.concatenate([self._reader.raw(t) for _, t in tensors])

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in the files."""
        module = self.modules.get(name)
        tensors = (name,) if module is None else tuple(module.tensors.values())
        return sum(self._reader[tensor].nbytes for tensor in tensors)

    def _module_dtype(self, name: str) -> np.dtype:
        """What a module materialises to: told by its scales, or else by reading it."""
        for suffix, tensor in self.modules[name].tensors.items():
            stored = DTYPES.get(self._reader[tensor].dtype)
            if "scale" in suffix and stored is not None and stored.kind != "u":
                return stored
        return np.dtype(self.represented(name).dtype)

    def _parts(self, name: str) -> dict[str, Part]:
        def part(tensor: str) -> Part:
            info = self._reader[tensor]
            dtype = DTYPES.get(info.dtype, np.dtype(np.void))
            return Part(info.shape, dtype, functools.partial(self._reader.read, tensor))

        return {suffix: part(tensor) for suffix, tensor in self.modules[name].tensors.items()}

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"open_checkpoint: '{self.path}': {name!r}: {error}.") from None

    def _refuse_twice(self) -> None:
        parts = {t for module in self.modules.values() for t in module.tensors.values()}
        twice = [name for name in self.modules if name in self._reader and name not in parts]
        if twice:
            raise ValueError(
                f"open_checkpoint: '{self.path}': {twice[:5]} are there both quantized and dense. "
                "Remove one of the two."
            )


class _GGUFCheckpoint(Checkpoint):
    """A GGUF file."""

    format = "gguf"

    def __init__(self, path: Path, files: dict[str, Path]):
        self._reader: GGUFReader = open_gguf(path)
        metadata = self._reader.metadata
        config = {k: v for k, v in metadata.items() if not k.startswith("tokenizer.")}
        super().__init__(path, config, metadata, files)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._reader)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._reader[name].dtype

    def read(self, name: str) -> np.ndarray:
        return self._reader.read(name)

    def represented(self, name: str) -> np.ndarray | Represented:
        info = self._reader[name]
        if info.block_type.name in INTEGER_TYPES and len(info.shape) == 2:
            rows, columns = info.shape
            return unpack_gguf(info.block_type.name, self._reader.raw(name), (rows, columns))
        return self._reader.read(name)

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        return functools.partial(self._reader.read_into, name)

    def _stored(self, name: str) -> tuple[str, np.ndarray]:
        return self._reader[name].block_type.name, self._reader.raw(name).reshape(-1)


class _OrbaxCheckpoint(Checkpoint):
    """What `save_tree` made; represented weights are read as the dense ones they stand for."""

    format = "orbax"

    def __init__(self, path: Path):
        self._saved = SavedTree(path, function="open_checkpoint")
        self.tree = self._saved.node
        self._leaves = {"/".join(parts): parts for parts in leaf_parts(self._saved.node)}
        metadata = {"provenance": self._saved.provenance}
        files = dict(self._saved.files)
        if (path / CONFIG).exists():
            files[CONFIG] = path / CONFIG
        super().__init__(path, self._saved.config or {}, metadata, files)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._leaves)

    @property
    def leaves(self) -> Mapping[str, Parts]:
        return self._leaves

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._dense(name)["shape"])

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(jax.numpy.dtype(self._dense(name)["dtype"]))

    def read(self, name: str) -> np.ndarray:
        parts = self._parts(name)
        leaf = build_tree(object_at(self._saved.node, parts), self._arrays(parts), parts)
        return np.asarray(leaf.materialize() if hasattr(leaf, "materialize") else leaf)

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        record = next((r for r in self._saved.records if r.parts == self._parts(name)), None)
        raw = None if record is None else self._saved.raw(record)
        if record is None or raw is None:
            return super().reader(name)
        return CheckedSlices(raw, record.checksum, f"'{self.path}': {name!r}").read_into

    def fingerprint(self, *, sampled: bool = False) -> str:
        if sampled and all(record.checksum for record in self._saved.records):
            return f"sampled-sha256:{digest_of(self._saved.node)}"  # it has the checksums
        return super().fingerprint(sampled=sampled)

    def _stored(self, name: str) -> tuple[str, np.ndarray]:
        arrays = self._arrays(self._parts(name))
        data = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.values()]
        return str(self._describe(name)), np.concatenate(data) if data else np.empty(0, np.uint8)

    def _describe(self, name: str) -> Any:
        return object_at(self._saved.node, self._parts(name))

    def _dense(self, name: str) -> dict[str, Any]:
        node = self._describe(name)
        return node.get("dense", node)

    def _parts(self, name: str) -> tuple[str, ...]:
        try:
            return self._leaves[name]
        except KeyError:
            raise KeyError(f"{self.path}: holds no tensor {name!r}.") from None

    def _arrays(self, parts: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
        wanted = [r for r in self._saved.records if r.parts[: len(parts)] == parts]
        return self._saved.read(wanted)


def _companions(folder: Path) -> dict[str, Path]:
    return {
        name: contained(folder, name, "open_checkpoint")
        for name in _COMPANIONS
        if (folder / name).is_file()
    }


def _config(files: dict[str, Path]) -> dict[str, Any]:
    if CONFIG not in files:
        return {}
    return read_json_object(files[CONFIG], where=f"open_checkpoint: '{files[CONFIG]}'")
