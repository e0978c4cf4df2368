"""The header of a safetensors file, checked before anything is read by it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.checkpoint._json import MAX_JSON_BYTES, parse_json
from jaxweights.checkpoint._mapped import MappedFile

# https://huggingface.co/docs/safetensors: names and how NumPy holds them.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}
# Several values share a byte and the format does not say in which order.
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_MAX_RANK = 32


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and how to read it.

    Args:
      name: Its name in the file.
      dtype: Its dtype as the format calls it (`"BF16"`).
      shape: Its shape.
      file: The file that holds it.
      start: First byte, counted from the start of the file.
      nbytes: Number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_header(file: MappedFile) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks one file's header, and that its tensors tile its data exactly."""
    where = f"open_safetensors: '{file.path}'"
    if file.size < 8:
        raise ValueError(f"{where}: {file.size} bytes are no safetensors file; fetch it again.")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_JSON_BYTES, file.size - 8):
        raise ValueError(
            f"{where}: claims a header of {length} bytes, in a file of {file.size} (at most "
            f"{MAX_JSON_BYTES} are allowed). It is truncated or no safetensors file."
        )
    header = file.read(8, length)
    if header[:1] != b"{":
        raise ValueError(
            f"{where}: its header does not start with '{{'. It is no safetensors file."
        )
    entries = parse_json(header, where=f"{where}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{where}: '__metadata__' must map text to text.")
    infos = {
        name: _checked_info(where, name, entry, file, start=8 + length)
        for name, entry in entries.items()
    }
    _check_tiling(where, infos, 8 + length, file.size)
    return infos, metadata


def _checked_info(where: str, name: str, entry: Any, file: MappedFile, start: int) -> TensorInfo:
    where = f"{where}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: must have dtype, shape and data_offsets, and nothing else.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in PACKED_BITS):
        raise ValueError(
            f"{where}: has the unknown dtype {dtype!r}. Known are {', '.join(DTYPES)}."
        )
    if not _is_naturals(shape):
        raise ValueError(f"{where}: shape={shape!r:.200} must be a list of natural numbers.")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: data_offsets={offsets!r:.200} must be two natural numbers.")
    bits = PACKED_BITS.get(dtype) or DTYPES[dtype].itemsize * 8
    # NumPy multiplies the lengths even where one of them is zero.
    if len(shape) > _MAX_RANK or math.prod(max(n, 1) for n in shape) * bits >= 2**63:
        raise ValueError(f"{where}: shape={shape!r:.200} is larger than any memory.")
    begin, end = offsets
    available = file.size - start
    if end > available:
        raise ValueError(
            f"{where}: lies at bytes {begin} to {end}, but the file holds only {available} bytes "
            "of data. It is truncated; fetch it again."
        )
    needed = math.prod(shape) * bits
    if begin > end or needed != (end - begin) * 8:
        raise ValueError(
            f"{where}: dtype {dtype} and shape {shape} need {-(-needed // 8)} bytes, but "
            f"data_offsets={offsets} hold {end - begin}."
        )
    return TensorInfo(name, dtype, tuple(shape), file.path, start + begin, end - begin)


def _is_naturals(values: Any) -> bool:
    # bool is an int to Python, but not to JSON.
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_tiling(where: str, infos: dict[str, TensorInfo], start: int, size: int) -> None:
    """Refuses overlaps and holes: both hide bytes from whoever inspects the file."""
    position = start
    for info in sorted(infos.values(), key=lambda info: (info.start, info.nbytes)):
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole"
            raise ValueError(
                f"{where}: tensor {info.name!r} starts at byte {info.start - start} of the data, "
                f"but {position - start} was expected: it {what}. The file is damaged."
            )
        position += info.nbytes
    if position != size:
        raise ValueError(
            f"{where}: {size - position} bytes follow the last tensor and belong to none. The "
            "file is damaged."
        )
