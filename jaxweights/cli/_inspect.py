"""jaxweights inspect: what is in a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SUMMARY = "show what is in a checkpoint: tensors, shapes, dtypes, sizes, config"
DESCRIPTION = """\
Shows what is in a checkpoint of any format: safetensors, GGUF, or a result of `jaxweights run`.
Reads headers only; no weight is loaded, and no code in the files is ever run."""
EXAMPLES = """\
examples:
  jaxweights inspect runs/quickstart
  jaxweights inspect model.gguf --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file or a folder")


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    from jaxweights.checkpoint import open_checkpoint
    from jaxweights.cli._tensors import describe_tensors, resolve

    checkpoint = open_checkpoint(resolve(Path(options.checkpoint)))
    tensors = describe_tensors(checkpoint)
    provenance = checkpoint.metadata.get("provenance")
    result = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "tensors": tensors,
        "parameters": sum(tensor["parameters"] for tensor in tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "config": _plain(checkpoint.config),
        "files": sorted(checkpoint.files),
        "source": provenance.source if provenance is not None else None,
    }
    return result, _text(result)


def _text(result: dict[str, Any]) -> str:
    from jaxweights.recipes._html import megabytes

    rows = [
        (
            t["name"],
            " × ".join(map(str, t["shape"])) or "scalar",
            t["stored"],
            megabytes(t["bytes"]),
        )
        for t in result["tensors"]
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines = [
        f"{result['path']} ({result['format']}): {len(rows)} tensors, "
        f"{result['parameters'] / 1e6:.2f} million parameters, {megabytes(result['bytes'])}",
        "",
    ]
    lines += [
        f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {stored:<{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, stored, size in rows
    ]
    if result["config"]:
        lines += ["", "config"]
        lines += [f"  {key}: {_short(value)}" for key, value in result["config"].items()]
    if result["files"]:
        lines += ["", f"files: {', '.join(result['files'])}"]
    if result["source"]:
        lines += ["", f"made from: {result['source']}"]
    return "\n".join(lines)


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _plain(value: Any) -> Any:
    """JSON values: arrays and NumPy scalars of GGUF metadata as lists and numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
