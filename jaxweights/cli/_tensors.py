"""Checkpoints as the commands see them: resolved, and described tensor by tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np


def resolve(path: Path) -> Path:
    """The checkpoint that a path means; of a run's folder, the weights as represented."""
    if path.is_dir() and (path / "result.json").is_file():
        from jaxweights.recipes._write import FORMATS

        for form in FORMATS:  # Orbax first
            if (path / form).is_dir():
                return path / form
    return path


def describe_tensors(checkpoint: Any) -> list[dict[str, Any]]:
    """Name, shape, storage and size of every tensor, from headers alone.

    Args:
      checkpoint: An open checkpoint.

    Returns:
      One dict a tensor, in the file's order.
    """
    describe = {"gguf": _gguf, "orbax": _orbax}.get(checkpoint.format, _plain)
    tensors = []
    stored = describe(checkpoint)
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        kind, count = stored(name)
        tensors.append(
            {
                "name": name,
                "shape": list(shape),
                "stored": kind,
                "parameters": math.prod(shape),
                "bytes": count,
            }
        )
    return tensors


def _plain(checkpoint: Any) -> Any:
    def stored(name: str) -> tuple[str, int]:
        if checkpoint.quantization and name in checkpoint.modules:
            return str(checkpoint.quantization["quant_method"]), checkpoint.stored_bytes(name)
        dtype = np.dtype(checkpoint.dtype(name))
        return dtype.name, math.prod(checkpoint.shape(name)) * dtype.itemsize

    return stored


def _gguf(checkpoint: Any) -> Any:
    from jaxweights.checkpoint._gguf_parts import open_gguf_parts

    owners = {name: reader for reader in open_gguf_parts(checkpoint.path) for name in reader}

    def stored(name: str) -> tuple[str, int]:
        reader = owners[name]
        return reader[name].block_type.name, int(reader.raw(name).nbytes)

    return stored


def _orbax(checkpoint: Any) -> Any:
    from jaxweights.checkpoint._manifest import leaf_parts, object_at
    from jaxweights.checkpoint._orbax import SavedTree

    saved = SavedTree(checkpoint.path, function="jaxweights inspect")
    parts_of = {"/".join(parts): parts for parts in leaf_parts(saved.node)}

    def stored(name: str) -> tuple[str, int]:
        parts = parts_of[name]
        node = object_at(saved.node, parts)
        held = [r for r in saved.records if r.parts[: len(parts)] == parts]
        total = sum(math.prod(r.shape) * r.dtype.itemsize for r in held)
        return _spell(node), total

    return stored


def _spell(node: dict[str, Any]) -> str:
    """A represented weight of a manifest in a few words, such as `Masked(Quantized(bits=4))`."""
    if node["kind"] != "object":
        return node.get("dtype", node["kind"])
    inner = [_spell(f) for f in node["fields"].values() if f["kind"] == "object"]
    notes = [f"bits={node['static']['bits']}"] if "bits" in node["static"] else []
    return f"{node['class']}({', '.join([*inner, *notes])})"
