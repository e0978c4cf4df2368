"""One way to read a checkpoint, whatever its format."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.checkpoint._checkpoint import Checkpoint
from jaxweights.checkpoint._gguf import GGUFReader, GGUFTensorInfo
from jaxweights.checkpoint._gguf_parts import first_part, open_gguf_parts
from jaxweights.checkpoint._manifest import Parts, build_tree, digest_of, leaf_parts, object_at
from jaxweights.checkpoint._raw_arrays import CheckedSlices
from jaxweights.checkpoint._safetensors_checkpoint import SafetensorsCheckpoint, companions
from jaxweights.checkpoint._saved_tree import CONFIG, MANIFEST, SavedTree
from jaxweights.checkpoint._untrusted import contained, refuse_pickle
from jaxweights.checkpoint.exchange._gguf_codes import INTEGER_TYPES, unpack_gguf
from jaxweights.checkpoint.exchange._module import Represented


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint of any format that this library reads.

    Args:
      path: A `.safetensors` or `.gguf` file, of a split model any of its parts; a folder with
        safetensors files, with one GGUF model, or made by `save_tree`.

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
        raise FileNotFoundError(f"open_checkpoint: '{path}' does not exist. Check the path.")
    refuse_pickle("open_checkpoint", path)
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF" or path.suffix == ".gguf":
            return _GGUFCheckpoint(path, {})
        if path.suffix == ".safetensors":
            return SafetensorsCheckpoint(path, path.parent)
        raise ValueError(
            f"open_checkpoint: '{path}' starts with {magic!r} and is neither .safetensors nor "
            ".gguf. Give one of these, or a folder."
        )
    if (path / MANIFEST).is_file():
        return _OrbaxCheckpoint(path)
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return SafetensorsCheckpoint(path, path)
    ggufs = sorted(path.glob("*.gguf"))
    first = ggufs[0] if len(ggufs) == 1 else first_part(ggufs)
    if first is not None:
        file = contained(path, first.name, "open_checkpoint")
        return _GGUFCheckpoint(file, companions(path))
    if ggufs:
        raise ValueError(
            f"open_checkpoint: '{path}' holds {len(ggufs)} GGUF files that are not the parts of "
            f"one model, {[file.name for file in ggufs[:5]]}. Give the one that is meant."
        )
    raise FileNotFoundError(
        f"open_checkpoint: '{path}' holds no safetensors, no GGUF file and no {MANIFEST}. Give a "
        "folder that does."
    )


class _GGUFCheckpoint(Checkpoint):
    """A GGUF file, or several of one model."""

    format = "gguf"

    def __init__(self, path: Path, files: dict[str, Path]):
        parts = open_gguf_parts(path)
        self._owners: dict[str, GGUFReader] = {name: part for part in parts for name in part}
        path, given = parts[0].path, parts[0].metadata
        # What says that it is split is of the files, and would be untrue of a copy in one.
        metadata = {k: v for k, v in given.items() if not k.startswith("split.")}
        config = {k: v for k, v in metadata.items() if not k.startswith("tokenizer.")}
        super().__init__(path, config, metadata, files)

    def _owner(self, name: str) -> GGUFReader:
        if name not in self._owners:
            raise KeyError(f"{self.path}: holds no tensor {name!r}.")
        return self._owners[name]

    def _info(self, name: str) -> GGUFTensorInfo:
        return self._owner(name)[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._info(name).dtype

    def read(self, name: str) -> np.ndarray:
        return self._owner(name).read(name)

    def represented(self, name: str) -> np.ndarray | Represented:
        info = self._info(name)
        if info.block_type.name in INTEGER_TYPES and len(info.shape) == 2:
            rows, columns = info.shape
            return unpack_gguf(info.block_type.name, self._owner(name).raw(name), (rows, columns))
        return self._owner(name).read(name)

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        return functools.partial(self._owner(name).read_into, name)

    def _stored(self, name: str) -> tuple[str, np.ndarray]:
        return self._info(name).block_type.name, self._owner(name).raw(name).reshape(-1)


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
