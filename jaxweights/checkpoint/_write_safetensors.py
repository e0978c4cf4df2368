"""Writes safetensors: streamed, sharded, and whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint._atomic import atomic
from jaxweights.checkpoint._check_destination import check_destination, refuse_unrelated
from jaxweights.checkpoint._json import dump_json
from jaxweights.checkpoint._safetensors_header import DTYPES
from jaxweights.checkpoint._untrusted import contained

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_BYTES = 1 << 26
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written and forgotten afterwards.

    Args:
      shape: Its shape.
      dtype: Its dtype.
      read: Makes it; called once.

    Example:
      >>> tensor = LazyTensor((2, 3), np.float32, lambda: np.zeros((2, 3), np.float32))
      >>> tensor().shape
      (2, 3)
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], Any]

    def __call__(self) -> Any:
        """Makes the tensor."""
        return self.read()


def write_safetensors(
    destination: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    files: Mapping[str, str | bytes | os.PathLike[str]] | None = None,
    max_shard_bytes: int | None = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes tensors as one safetensors file or as a folder of shards with their index.

    One tensor at a time is in memory. The destination appears only when all of it is written.

    Args:
      destination: A path ending in `.safetensors` makes one file, any other a folder with
        `model.safetensors`, or `model-00001-of-0000N.safetensors` and
        `model.safetensors.index.json`.
      tensors: Arrays, or callables with `shape` and `dtype` such as `LazyTensor`, by name.
      metadata: Text by key for `__metadata__`. `format` is "pt" unless given, which
        transformers asks for.
      files: More files of the folder by name: their content (text or bytes) or a path to copy.
      max_shard_bytes: Most bytes of tensors a file; None for one file however large.
      overwrite: Whether an existing destination may be replaced.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False, or is a folder that
        holds other things than a checkpoint.
      OSError: If the disk is full; the destination is untouched.
      TypeError: If a dtype has no name in the format, or something is not an array.
      ValueError: If a name or setting is invalid, or a callable gives another shape or dtype
        than it declared.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp()) / "out"
      >>> write_safetensors(folder, {"a": np.ones(8), "b": np.ones(8)}, max_shard_bytes=64)
      >>> sorted(file.name for file in folder.iterdir())[1:]
      ['model-00002-of-00002.safetensors', 'model.safetensors.index.json']
    """
    destination = Path(destination)
    plans = plan_tensors(tensors)
    text = _checked_metadata({"format": "pt", **(metadata or {})})
    total = sum(plan.nbytes for plan in plans)
    limit = math.inf if max_shard_bytes is None else max_shard_bytes
    if limit < 1:
        raise ValueError(f"write_safetensors: max_shard_bytes={max_shard_bytes} must be positive.")
    single = destination.suffix == ".safetensors"
    if single and total > limit:
        raise ValueError(
            f"write_safetensors: '{destination}' would take {total} bytes, more than "
            f"max_shard_bytes={max_shard_bytes}. Give a folder, so that it can be sharded, or "
            "max_shard_bytes=None."
        )
    if single and files:
        raise ValueError(
            f"write_safetensors: '{destination}' is one file; files={sorted(files)} need a folder."
        )
    check_destination("write_safetensors", destination, overwrite=overwrite, directory=not single)
    refuse_unrelated("write_safetensors", destination)
    with atomic(
        "write_safetensors",
        destination,
        directory=not single,
        overwrite=overwrite,
        needs_bytes=total,
    ) as partial:
        if single:
            _write_file(partial, plans, text)
            return
        _write_shards(partial, plan_shards(plans, limit), text, total)
        copy_files("write_safetensors", partial, files or {})


def copy_files(
    function: str, folder: Path, files: Mapping[str, str | bytes | os.PathLike[str]]
) -> None:
    """Puts further files into a checkpoint: text and bytes as they are, paths copied."""
    for name, content in files.items():
        target = contained(folder, name, function)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise ValueError(
                f"{function}: files={name!r} is the name of a file that the checkpoint itself "
                "has. Leave it out."
            )
        if isinstance(content, str):
            target.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """One tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    nbytes: int
    source: Any


def plan_tensors(tensors: Mapping[str, Any]) -> list[TensorPlan]:
    """Checks all tensors at once, so that ten bad ones are one message."""
    plans, bad, unknown = [], [], []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name in ("", "__metadata__") or not _is_text(name):
            bad.append(f"{name!r} cannot be the name of a tensor")
        elif not (hasattr(tensor, "shape") and hasattr(tensor, "dtype")):
            unknown.append(f"{name!r} is {type(tensor).__name__}, without shape and dtype")
        elif hasattr(tensor, "materialize"):
            unknown.append(f"{name!r} is a represented weight; materialize() it first")
        elif (dtype := _numpy_dtype(tensor.dtype)) is None or dtype not in _NAMES:
            unknown.append(f"{name!r} is {tensor.dtype}, which safetensors cannot hold")
        else:
            shape = tuple(int(n) for n in tensor.shape)
            plans.append(TensorPlan(name, dtype, shape, math.prod(shape) * dtype.itemsize, tensor))
    if bad:
        raise ValueError(f"write_safetensors: {'; '.join(bad)}.")
    if unknown:
        raise TypeError(
            f"write_safetensors: {'; '.join(unknown)}. Give arrays or LazyTensor, of dtype "
            f"{', '.join(str(dtype) for dtype in _NAMES)}; pack or cast other dtypes, or save with "
            "save_tree, which keeps them."
        )
    return plans


def _numpy_dtype(dtype: Any) -> np.dtype | None:
    try:
        return np.dtype(dtype)
    except TypeError:  # a JAX random key's, for example
        return None


def _is_text(value: Any) -> bool:
    try:
        value.encode("utf-8")
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


def _checked_metadata(metadata: dict[str, str]) -> dict[str, str]:
    wrong = {k: v for k, v in metadata.items() if not (_is_text(k) and _is_text(v))}
    if wrong:
        raise TypeError(f"write_safetensors: metadata must map text to text; it holds {wrong}.")
    return metadata


def plan_shards(plans: list[TensorPlan], limit: float) -> list[list[TensorPlan]]:
    """Cuts the tensors, in their order, into runs of at most `limit` bytes where possible."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.nbytes
    return shards


def _write_shards(
    folder: Path, shards: list[list[TensorPlan]], metadata: dict[str, str], total: int
) -> None:
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = shard_name(i, len(shards))
        _write_file(folder / name, shard, metadata)
        weight_map |= {plan.name: name for plan in shard}
    if len(shards) > 1:
        write_index(folder, weight_map, total)


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    """Writes the index of a folder of shards."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(dump_json(index), encoding="utf-8")


def shard_name(i: int, count: int) -> str:
    """The name of the `i`-th of several shards, from 1, or of the only one."""
    return "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"


def _write_file(path: Path, plans: list[TensorPlan], metadata: dict[str, str]) -> None:
    head, places = head_of(plans, metadata)
    starts = {plan.name: start for plan, start in places}
    with path.open("wb") as file:
        file.write(head)
        for plan in plans:  # in the order given: what is made of one weight is made at once
            file.seek(starts[plan.name])
            data = _bytes_of(plan)
            for start in range(0, data.size, _CHUNK_BYTES):
                file.write(data[start : start + _CHUNK_BYTES].data)


def head_of(
    plans: list[TensorPlan], metadata: dict[str, str]
) -> tuple[bytes, list[tuple[TensorPlan, int]]]:
    """What a file starts with, and the tensors in their order in it with their first bytes."""
    # Wide dtypes first keeps every tensor aligned, so that readers need not copy.
    plans = sorted(plans, key=lambda plan: -plan.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    position, starts = 0, []
    for plan in plans:
        starts.append(position)
        header[plan.name] = {
            "dtype": _NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [position, position + plan.nbytes],
        }
        position += plan.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    # Readers on CPUs use the file's memory in place where it lies on such a boundary.
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, [(plan, len(head) + start) for plan, start in zip(plans, starts, strict=True)]


def _bytes_of(plan: TensorPlan) -> np.ndarray:
    tensor = plan.source() if callable(plan.source) else plan.source
    array = np.asarray(tensor)
    if array.shape != plan.shape or array.dtype != plan.dtype:
        raise ValueError(
            f"write_safetensors: {plan.name!r} is {array.dtype} {array.shape}, but was declared "
            f"as {plan.dtype} {plan.shape}. Nothing was written."
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
