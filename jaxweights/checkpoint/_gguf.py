"""Reads GGUF, the single-file format of llama.cpp, trusting nothing that a file says."""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._gguf_blocks import BLOCK_TYPES, OTHER_TYPES, BlockType, dequantize
from jaxweights.checkpoint._mapped import MappedFile
from jaxweights.checkpoint._tensor_table import TensorTable

# Metadata value types by number: struct codes of the fixed-size ones.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_NAME_BYTES = 65535  # of a metadata key, by the format's own rule
_MAX_RANK = 4  # GGML_MAX_DIMS
_MAX_ARRAY_DEPTH = 4


@dataclasses.dataclass(frozen=True)
class GGUFTensorInfo:
    """Where a tensor lies and how to read it.

    Args:
      name: Its name in the file.
      block_type: How it is stored.
      shape: Its shape in NumPy's order, which is the reverse of the file's.
      start: First byte, counted from the start of the file.
      nbytes: Number of bytes.
    """

    name: str
    block_type: BlockType
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        """What `read` gives: float32, or the file's own dtype where float32 cannot hold it."""
        stored = self.block_type.dtype
        if stored is None or (stored.itemsize < 4 and stored.kind not in "iu"):
            return np.dtype(np.float32)
        return stored


class GGUFReader(TensorTable[GGUFTensorInfo]):
    """The tensors of a GGUF file; a mapping from names to `GGUFTensorInfo`.

    Args:
      path: The file.
      version: Version of the format.
      metadata: Its key-value pairs; arrays are lists. Bytes of a string that are not UTF-8 are
        kept as `surrogateescape` keeps them.
      infos: Tensors by name.
      kinds: Type of every metadata value, and that of an array's elements, by the format's numbers.
    """

    def __init__(
        self,
        file: MappedFile,
        version: int,
        metadata: dict[str, Any],
        infos: dict[str, GGUFTensorInfo],
        kinds: dict[str, tuple[int, int | None]],
    ):
        """Made by `open_gguf`, which checks what it passes."""
        super().__init__(file.path, infos)
        self.version = version
        self.metadata = metadata
        self.kinds = kinds
        self._file = file

    def raw(self, name: str) -> np.ndarray:
        """A tensor's blocks as stored, `(blocks, bytes of a block)` uint8, without copying."""
        info = self[name]
        return self._file.view(info.start, info.nbytes).reshape(-1, info.block_type.nbytes)

    def read(self, name: str) -> np.ndarray:
        """A tensor as numbers.

        Args:
          name: Which tensor.

        Returns:
          Float32 values, in NumPy's order of axes. Integers and float64, which float32 cannot
          hold, keep their dtype.

        Raises:
          KeyError: If there is no such tensor.
        """
        return _numbers(self[name], self.raw(name)).reshape(self[name].shape)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills a contiguous array with a tensor's numbers from `start` on, in flat order."""
        info = self[name]
        values, nbytes = info.block_type.values, info.block_type.nbytes
        first, last = start // values, -(-(start + out.size) // values)
        blocks = np.empty((last - first, nbytes), np.uint8)
        self._file.read_into(info.start + first * nbytes, blocks)
        skip = start - first * values
        np.copyto(out, _numbers(info, blocks)[skip : skip + out.size].reshape(out.shape))


def _numbers(info: GGUFTensorInfo, blocks: np.ndarray) -> np.ndarray:
    """What blocks stand for, flat."""
    dtype = info.block_type.dtype
    if dtype is None:
        return dequantize(info.block_type, blocks).reshape(-1)
    aligned = blocks.ctypes.data % dtype.alignment == 0
    return (
        (blocks if aligned else blocks.copy())
        .reshape(-1)
        .view(dtype)
        .astype(info.dtype, copy=False)
    )


def open_gguf(path: str | os.PathLike[str]) -> GGUFReader:
    """Opens a GGUF file of version 2 or 3.

    Metadata and the tensors' places are read, tensors only when asked for. The file is taken to
    be hostile: every count, length, offset and type is checked before anything is read by it.

    Args:
      path: The file.

    Returns:
      A mapping from names to `GGUFTensorInfo`, with `metadata` and `read(name)`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is damaged or incomplete, is of another version or byte order, or
        has a tensor of a type that is not known.

    Example:
      >>> import tempfile
      >>> from jaxweights.checkpoint import write_gguf
      >>> file = Path(tempfile.mkdtemp()) / "model.gguf"
      >>> write_gguf(file, {"a": np.ones((2, 3), np.float32)}, {"general.name": "tiny"})
      >>> reader = open_gguf(file)
      >>> reader.metadata["general.name"], reader["a"].shape
      ('tiny', (2, 3))

    Source: the format's specification, `docs/gguf.md` in the ggml repository.
    Differs: (1) one file is read; `open_checkpoint` finds the other parts of a split model.
    """
    file = MappedFile(Path(path), function="open_gguf")
    cursor = _Cursor(file)
    version, tensor_count, pair_count = _preamble(cursor)
    # A pair takes at least 8 + 4 + 1 bytes, a tensor 8 + 4 + 4 + 8.
    cursor.expect(pair_count, 13, "metadata pairs")
    metadata: dict[str, Any] = {}
    kinds: dict[str, tuple[int, int | None]] = {}
    for _ in range(pair_count):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise cursor.error(f"the metadata key {key!r} appears twice")
        cursor.place = f"metadata {key!r}"
        kind = cursor.number("I")
        kinds[key] = (kind, cursor.coming("I") if kind == _ARRAY else None)
        metadata[key] = cursor.value(kind)
    cursor.place = "tensor table"
    cursor.expect(tensor_count, 24, "tensors")
    entries = _tensor_table(cursor, tensor_count)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment={alignment!r} is not a power of two")
    start = -(-cursor.position // alignment) * alignment
    infos = {
        entry.name: _checked_info(cursor, entry, start, alignment) for entry in entries.values()
    }
    _check_overlap(cursor, infos)
    return GGUFReader(file, version, metadata, infos, kinds)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A row of the tensor table as the file has it."""

    name: str
    dims: tuple[int, ...]
    number: int
    offset: int


class _Cursor:
    """Reads a file's structure in order, never past its end."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.position = 0
        self.place = "header"

    def error(self, what: str) -> ValueError:
        return ValueError(f"open_gguf: '{self.file.path}': {self.place}: {what}.")

    def take(self, count: int) -> bytes:
        left = self.file.size - self.position
        if count > left:
            raise self.error(
                f"{count} bytes are needed at byte {self.position}, but only {left} are left. The "
                "file is truncated or damaged; fetch it again"
            )
        self.position += count
        return self.file.read(self.position - count, count)

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuses a count that the rest of the file cannot hold, before a list is made for it."""
        left = self.file.size - self.position
        if count * least > left:
            raise self.error(
                f"claims {count} {what}, which need at least {count * least} bytes, but only "
                f"{left} are left. The file is truncated or damaged; fetch it again"
            )

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def coming(self, code: str) -> Any:
        """The next number, which stays there to be read."""
        place = self.position
        number = self.number(code)
        self.position = place
        return number

    def name(self, what: str) -> str:
        length = self.number("Q")
        if not 0 < length <= _MAX_NAME_BYTES:
            raise self.error(f"{what} of {length} bytes; 1 to {_MAX_NAME_BYTES} are allowed")
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8: {data[:80]!r}") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _BOOL:
            return self.booleans(1)[0]
        if kind == _STRING:
            return self.take(self.number("Q")).decode("utf-8", "surrogateescape")
        if kind == _ARRAY:
            return self.array(depth)
        raise self.error(f"has the unknown value type {kind}; 0 to 12 are known")

    def booleans(self, count: int) -> list[bool]:
        data = self.take(count)
        if count and max(data) > 1:
            raise self.error(f"a boolean is neither 0 nor 1, but {max(data)}")
        return [byte == 1 for byte in data]

    def array(self, depth: int) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if depth >= _MAX_ARRAY_DEPTH:
            raise self.error(f"arrays are nested more than {_MAX_ARRAY_DEPTH} deep")
        if kind in _SCALARS:
            dtype = np.dtype(f"<{_SCALARS[kind]}")
            self.expect(count, dtype.itemsize, "numbers")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if kind == _BOOL:
            self.expect(count, 1, "booleans")
            return self.booleans(count)
        self.expect(count, 12 if kind == _ARRAY else 8, "strings or arrays")
        return [self.value(kind, depth + 1) for _ in range(count)]


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise cursor.error(f"starts with {magic!r}, not with b'GGUF'. It is another format")
    version = cursor.number("I")
    if version in (0x01000000, 0x02000000, 0x03000000):
        raise cursor.error(
            "is big-endian, which only mainframes write. Convert it with the `gguf` package: "
            "gguf-convert-endian FILE little"
        )
    if version not in (2, 3):
        raise cursor.error(
            f"is GGUF version {version}; versions 2 and 3 are read. Convert it with llama.cpp"
        )
    return version, cursor.number("Q"), cursor.number("Q")


def _tensor_table(cursor: _Cursor, count: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        cursor.place = "tensor table"
        name = cursor.name("a tensor's name")
        if name in entries:
            raise cursor.error(f"the tensor {name!r} appears twice")
        cursor.place = f"tensor {name!r}"
        rank = cursor.number("I")
        if rank > _MAX_RANK:
            raise cursor.error(f"has {rank} axes; at most {_MAX_RANK} are allowed")
        dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
        entries[name] = _Entry(name, dims, cursor.number("I"), cursor.number("Q"))
    return entries


def _checked_info(cursor: _Cursor, entry: _Entry, start: int, alignment: int) -> GGUFTensorInfo:
    cursor.place = f"tensor {entry.name!r}"
    block_type = BLOCK_TYPES.get(entry.number)
    if block_type is None:
        called = OTHER_TYPES.get(entry.number, "a type newer than this library")
        known = ", ".join(f"{known.name} ({n})" for n, known in BLOCK_TYPES.items())
        raise cursor.error(
            f"has type {entry.number}, {called}, which cannot be read. Known are {known}. Use a "
            "file that llama.cpp quantized to one of these"
        )
    # ggml lists the fastest axis first.
    shape = entry.dims[::-1]
    if math.prod(max(n, 1) for n in shape) * 8 >= 2**63:
        raise cursor.error(f"shape={shape} is larger than any memory")
    row = shape[-1] if shape else 1
    if row % block_type.values:
        raise cursor.error(
            f"rows of {row} values cannot be cut into {block_type.name} blocks of "
            f"{block_type.values}"
        )
    nbytes = math.prod(shape) // block_type.values * block_type.nbytes
    if entry.offset % alignment:
        raise cursor.error(f"offset {entry.offset} is not a multiple of the alignment {alignment}")
    begin = start + entry.offset
    if begin + nbytes > cursor.file.size:
        raise cursor.error(
            f"needs {nbytes} bytes at byte {begin}, but the file has {cursor.file.size}. It is "
            "truncated or damaged; fetch it again"
        )
    return GGUFTensorInfo(entry.name, block_type, shape, begin, nbytes)


def _check_overlap(cursor: _Cursor, infos: dict[str, GGUFTensorInfo]) -> None:
    previous = None
    for info in sorted(infos.values(), key=lambda info: (info.start, info.nbytes)):
        if previous is not None and info.start < previous.start + previous.nbytes:
            cursor.place = f"tensor {info.name!r}"
            raise cursor.error(f"overlaps tensor {previous.name!r}. The file is damaged")
        previous = info
