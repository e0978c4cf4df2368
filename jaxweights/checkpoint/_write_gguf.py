"""Writes GGUF, the single-file format of llama.cpp: streamed, and whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.checkpoint._atomic import atomic
from jaxweights.checkpoint._check_destination import check_destination
from jaxweights.checkpoint._gguf_blocks import BLOCK_TYPES
from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._gguf_codes import gguf_type, pack_gguf, unfit_gguf
from jaxweights.checkpoint.exchange._module import LazyWeight
from jaxweights.core._paths import fail
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._weight import is_weight

ValueKind = tuple[int, int | None]  # type of a metadata value, and that of an array's elements

_ASKER = "write_gguf"
_ALIGNMENT = 32
_NUMBERS = {kind.name: number for number, kind in BLOCK_TYPES.items()}
_PLAIN = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
    np.dtype(np.int8): "I8",
    np.dtype(np.int16): "I16",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11
_INTEGERS = {_UINT32, _INT32, _UINT64, _INT64}
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    make: Callable[[], np.ndarray]  # its bytes, of any shape


def write_gguf(
    destination: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    kinds: Mapping[str, ValueKind] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes tensors and metadata as one GGUF file of version 3.

    Everything is checked first; the file appears only when it is complete. One tensor at a time
    is encoded.

    Args:
      destination: The file.
      tensors: By name, in NumPy's order of axes: arrays or `LazyTensor`, or `Quantized` weights
        `(out, in)`, which become the narrowest block type that holds their codes: Q4_0, Q5_0 or
        Q8_0, and with offsets Q4_1 or Q5_1. A `LazyWeight` is read twice: for the checks and when
        it is written.
      metadata: Key-value pairs: booleans, numbers, text, and lists of one of them.
      kinds: Types of values by key, such as `GGUFReader.kinds`; others get 32-bit integers and
        floats, and 64-bit integers where they do not fit.
      overwrite: Whether an existing file may be replaced.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False.
      TypeError: If a value or a tensor has a type that GGUF does not know.
      ValueError: If a weight fits no block type; all are listed and nothing is written.

    Example:
      >>> import tempfile, pathlib
      >>> from jaxweights.checkpoint import open_gguf
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.gguf"
      >>> write_gguf(file, {"a": np.ones((2, 3), np.float32)}, {"general.architecture": "llama"})
      >>> open_gguf(file).read("a").shape
      (2, 3)

    Source: the format's specification, `docs/gguf.md` in the ggml repository.
    Differs: (1) scales wider than float16 are rounded to it, once.
    """
    write_planned(destination, plan_gguf(tensors), metadata, kinds=kinds, overwrite=overwrite)


def write_planned(
    destination: str | os.PathLike[str],
    plans: list[GGUFTensor],
    metadata: Mapping[str, Any],
    *,
    kinds: Mapping[str, ValueKind] | None = None,
    overwrite: bool = False,
) -> None:
    """`write_gguf`, of tensors that are planned already."""
    head = _head(plans, metadata, kinds or {})
    total = len(head) + sum(_padded(plan.nbytes) for plan in plans)
    check_destination(_ASKER, destination, overwrite=overwrite, directory=False)
    with atomic(
        _ASKER, destination, directory=False, overwrite=overwrite, needs_bytes=total
    ) as partial:
        write_plans(partial, head, plans)


def write_plans(path: os.PathLike[str], head: bytes, plans: list[GGUFTensor]) -> None:
    """Writes a file whose head and tensors are known."""
    with open(path, "wb") as file:
        file.write(head)
        for plan in plans:
            data = np.ascontiguousarray(plan.make()).reshape(-1).view(np.uint8)
            if data.nbytes != plan.nbytes:
                raise ValueError(
                    f"{_ASKER}: {plan.name!r} gave {data.nbytes} bytes, but {plan.nbytes} were "
                    "announced. Nothing was written."
                )
            file.write(data.data)
            file.write(b"\0" * (_padded(plan.nbytes) - plan.nbytes))


def plan_gguf(tensors: Mapping[str, Any]) -> list[GGUFTensor]:
    """What will be written for each tensor; refuses what GGUF cannot hold, all at once."""
    problems, strange, plans = [], [], []
    for name, given in tensors.items():
        tensor = given
        if isinstance(given, LazyWeight):
            tensor = given.read()
            if not is_weight(tensor):
                tensor = LazyTensor(tensor.shape, tensor.dtype, given.read)
        if isinstance(tensor, Quantized):
            faults = unfit_gguf(tensor)
            problems += [f"{name!r} {fault}." for fault in faults]
            if not faults:
                plans.append(_blocks(name, tensor, given))
        elif is_weight(tensor):
            problems.append(
                f"{name!r} is a {type(tensor).__name__}, which GGUF cannot hold. Dequantize it "
                "with `materialize`, or save with Orbax."
            )
        elif (kind := _PLAIN.get(np.dtype(tensor.dtype))) is None:
            strange.append(f"{name!r} is {tensor.dtype}, which GGUF cannot hold. Cast it.")
        else:
            shape = tuple(int(n) for n in tensor.shape)
            nbytes = math.prod(shape) * np.dtype(tensor.dtype).itemsize
            plans.append(GGUFTensor(name, shape, kind, nbytes, functools.partial(_made, tensor)))
    fail(_ASKER, strange, TypeError)
    fail(_ASKER, problems)
    return plans


def _made(tensor: Any) -> np.ndarray:
    return np.asarray(tensor() if callable(tensor) else tensor)


def _blocks(name: str, weight: Quantized, given: Quantized | LazyWeight) -> GGUFTensor:
    def make() -> np.ndarray:
        return pack_gguf(given.read() if isinstance(given, LazyWeight) else given)

    kind = gguf_type(weight)
    size = BLOCK_TYPES[_NUMBERS[kind]].nbytes
    shape = (weight.out_dim, weight.in_dim)
    return GGUFTensor(name, shape, kind, weight.in_dim // 32 * weight.out_dim * size, make)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _head(
    plans: list[GGUFTensor], metadata: Mapping[str, Any], kinds: Mapping[str, ValueKind]
) -> bytes:
    pairs = {k: v for k, v in metadata.items() if k != "general.alignment"}
    out = [b"GGUF", struct.pack("<IQQ", 3, len(plans), len(pairs))]
    strange = []
    for key, value in pairs.items():
        try:
            kind, element = kinds.get(key) or _kind_of(value)
            out += [_text(key), struct.pack("<I", kind), _value(kind, element, value)]
        except (TypeError, struct.error, OverflowError) as error:
            strange.append(f"metadata {key!r} is {value!r:.80}: {error}. Give another value.")
    fail(_ASKER, strange, TypeError)
    offset = 0
    for plan in plans:
        dims = plan.shape[::-1]  # ggml lists the fastest axis first
        out += [_text(plan.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        out.append(struct.pack("<IQ", _NUMBERS[plan.kind], offset))
        offset += _padded(plan.nbytes)
    head = b"".join(out)
    return head + b"\0" * (_padded(len(head)) - len(head))


def _kind_of(value: Any) -> ValueKind:
    if isinstance(value, list | tuple):
        if not value:
            return _ARRAY, _INT32
        inner = {_kind_of(item)[0] for item in value}
        if inner <= _INTEGERS:
            inner = {_integer_kind(min(value), max(value))}
        if len(inner) > 1 or _ARRAY in inner:
            raise TypeError("a list holds values of one kind, and no lists")
        return _ARRAY, inner.pop()
    if isinstance(value, bool | np.bool_):
        return _BOOL, None
    if isinstance(value, str):
        return _STRING, None
    if isinstance(value, int | np.integer):
        return _integer_kind(value, value), None
    if isinstance(value, float | np.floating):
        return _FLOAT32, None
    raise TypeError(f"GGUF has no {type(value).__name__}")


def _integer_kind(smallest: Any, largest: Any) -> int:
    """The narrowest type of at least 32 bits that holds all integers between two."""
    if smallest >= 0:
        return _UINT32 if largest < 2**32 else _UINT64
    return _INT32 if smallest >= -(2**31) and largest < 2**31 else _INT64


def _value(kind: int, element: int | None, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    if kind != _ARRAY:
        return struct.pack(f"<{_CODES[kind]}", value)
    if element is None or element == _ARRAY:
        raise TypeError("lists in lists cannot be written")
    head = struct.pack("<IQ", element, len(value))
    if element == _STRING:
        return head + b"".join(_text(item) for item in value)
    return head + struct.pack(f"<{len(value)}{_CODES[element]}", *value)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
