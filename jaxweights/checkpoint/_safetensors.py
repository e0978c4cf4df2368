"""Reads safetensors, trusting nothing that a file says about itself."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._json import read_json_object
from jaxweights.checkpoint._mapped import MappedFile, MappedTensor
from jaxweights.checkpoint._safetensors_header import DTYPES, TensorInfo, read_header
from jaxweights.checkpoint._tensor_table import TensorTable
from jaxweights.checkpoint._untrusted import contained, refuse_pickle

_INDEX_SUFFIX = ".safetensors.index.json"


class SafetensorsReader(TensorTable[TensorInfo]):
    """The tensors of one safetensors file or folder; a mapping from names to `TensorInfo`.

    Args:
      path: The file or folder that was opened.
      infos: Tensors by name.
      metadata: Free text that the files carry, by key.
      maps: The files, by path.
    """

    def __init__(
        self,
        path: Path,
        infos: dict[str, TensorInfo],
        metadata: dict[str, str],
        maps: dict[Path, MappedFile],
    ):
        """Made by `open_safetensors`, which checks what it passes."""
        super().__init__(path, infos)
        self.metadata = metadata
        self._maps = maps

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes as stored, `(nbytes,)` uint8, without copying."""
        info = self[name]
        return self._maps[info.file].view(info.start, info.nbytes)

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only array that shares memory with the file where it is aligned.

        Args:
          name: Which tensor.

        Returns:
          The array, with the file's dtype and shape.

        Raises:
          KeyError: If there is no such tensor.
          ValueError: If NumPy cannot hold the dtype or a boolean is neither 0 nor 1.
        """
        info = self[name]
        where = f"open_safetensors: '{info.file}': tensor {name!r}"
        if info.dtype not in DTYPES:
            raise ValueError(
                f"{where} has the packed dtype {info.dtype}, which NumPy cannot hold. Read its "
                "bytes with raw() and unpack them as the program that wrote them packs them."
            )
        raw = self.raw(name)
        if info.dtype == "BOOL" and raw.size and raw.max() > 1:
            raise ValueError(f"{where} is BOOL but holds the byte {raw.max()}. It is damaged.")
        dtype = DTYPES[info.dtype]
        aligned = raw.ctypes.data % dtype.alignment == 0
        return (raw if aligned else raw.copy()).view(dtype).reshape(info.shape)

    def mapped(self, name: str) -> MappedTensor | None:
        """Where a tensor lies; None where its bytes are no entries or have to be checked."""
        info = self[name]
        if info.dtype not in DTYPES or info.dtype == "BOOL":
            return None
        return MappedTensor(self._maps[info.file], info.start, DTYPES[info.dtype].itemsize)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills a contiguous array with a tensor's entries from `start` on, in flat order."""
        info = self[name]
        self._maps[info.file].read_into(info.start + start * out.dtype.itemsize, out)


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsReader:
    """Opens a safetensors file, or a folder of them with or without an index.

    Only headers are read; tensors are mapped into memory when asked for. Files are taken to be
    hostile: every size, offset, dtype and path is checked before anything is read by it.

    Args:
      path: A `.safetensors` file or a folder.

    Returns:
      A mapping from names to `TensorInfo`, with `read(name)`.

    Raises:
      FileNotFoundError: If there is no such file, or the folder holds no safetensors.
      ValueError: If a file is damaged, incomplete or contradicts itself; if all there is is a
        pickle.

    Example:
      >>> import tempfile
      >>> from jaxweights.checkpoint import write_safetensors
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> write_safetensors(file, {"norm.weight": np.ones(4, np.float32)})
      >>> tensors = open_safetensors(file)
      >>> tensors["norm.weight"].dtype, tensors.read("norm.weight").sum()
      ('F32', np.float32(4.0))

    Differs: (1) the reference reader takes one file; (2) shards must hold exactly what the index
      says; (3) links may lead out of the folder only into the blobs of a Hugging Face cache.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"open_safetensors: '{path}' does not exist.")
    refuse_pickle("open_safetensors", path)
    if not path.is_dir():
        return _open_files(path, [path])
    indexes = sorted(path.glob(f"*{_INDEX_SUFFIX}"))
    preferred = path / f"model{_INDEX_SUFFIX}"
    if preferred in indexes:
        return _open_indexed(path, preferred)
    if len(indexes) > 1:
        raise ValueError(
            f"open_safetensors: '{path}' has several indexes, {[i.name for i in indexes]}. Keep "
            "the one to be read."
        )
    if indexes:
        return _open_indexed(path, indexes[0])
    files = sorted(path.glob("*.safetensors"))
    _refuse_incomplete(path, files)
    return _open_files(path, [contained(path, f.name, "open_safetensors") for f in files])


def _open_files(path: Path, files: list[Path]) -> SafetensorsReader:
    infos: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    maps: dict[Path, MappedFile] = {}
    for file in files:
        maps[file] = MappedFile(file, function="open_safetensors")
        found, notes = read_header(maps[file])
        twice = sorted(infos.keys() & found.keys())
        if twice:
            raise ValueError(
                f"open_safetensors: '{path}': {len(twice)} tensors are in '{file.name}' and in "
                f"'{infos[twice[0]].file.name}' too, such as {twice[0]!r}. Remove one of the "
                "files, or open the one that is meant."
            )
        infos |= found
        metadata |= notes
    return SafetensorsReader(path, infos, metadata, maps)


def _open_indexed(folder: Path, index: Path) -> SafetensorsReader:
    where = f"open_safetensors: '{index}'"
    content = read_json_object(contained(folder, index.name, "open_safetensors"), where=where)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{where}: has no 'weight_map' from tensor names to files.")
    wrong = {str(k): v for k, v in weight_map.items() if not isinstance(v, str)}
    if wrong:
        raise ValueError(f"{where}: 'weight_map' must name files; it holds {_some(wrong)}.")
    shards = {name: contained(folder, name, where) for name in dict.fromkeys(weight_map.values())}
    not_shards = sorted(name for name in shards if not name.endswith(".safetensors"))
    if not_shards:
        raise ValueError(f"{where}: names files that are not .safetensors: {_some(not_shards)}.")
    missing = sorted(name for name, file in shards.items() if not file.is_file())
    if missing:
        raise FileNotFoundError(
            f"{where}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}. The "
            "download is incomplete; fetch them again."
        )
    reader = _open_files(folder, list(shards.values()))
    lies = []
    for name, shard in weight_map.items():
        if name not in reader:
            lies.append(f"tensor {name!r} should be in '{shard}', but no shard holds it")
        elif reader[name].file != shards[shard]:
            lies.append(
                f"tensor {name!r} should be in '{shard}', but is in '{reader[name].file.name}'"
            )
    for name in reader.keys() - weight_map.keys():
        lies.append(f"tensor {name!r} is in '{reader[name].file.name}', but not in the index")
    if lies:
        raise ValueError(
            f"{where}: index and shards contradict each other: {'; '.join(sorted(lies)[:10])}"
            f"{f'; and {len(lies) - 10} more' if len(lies) > 10 else ''}. The files are of "
            "different versions; fetch them again."
        )
    return reader


def _refuse_incomplete(folder: Path, files: list[Path]) -> None:
    if not files:
        raise FileNotFoundError(
            f"open_safetensors: '{folder}' holds no *.safetensors file. Give the folder that does."
        )
    for file in files:
        numbered = re.fullmatch(r"(.*-)(\d+)-of-(\d+)\.safetensors", file.name)
        if not numbered:
            continue
        prefix, digits, count = numbered[1], len(numbered[2]), int(numbered[3])
        have = sum(f.name.startswith(prefix) for f in files)
        if have < count:
            raise FileNotFoundError(
                f"open_safetensors: '{folder}': '{file.name}' says that there are {count} shards, "
                f"but only {have} of '{prefix}{'N' * digits}-of-{numbered[3]}.safetensors' are "
                "there, and no index. The download is incomplete; fetch the others."
            )


def _some(names: Any) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
