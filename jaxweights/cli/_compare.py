"""jaxweights compare: how far two checkpoints are apart, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

SUMMARY = "show how far two checkpoints of one model are apart"
DESCRIPTION = """\
Compares two checkpoints of one model, tensor by tensor: the relative error of the second, the
angle between them, and the share of zeros. Formats may differ: names and orientations are mapped
where the model's architecture is known."""
EXAMPLES = """\
examples:
  jaxweights compare model runs/quickstart
  jaxweights compare model.gguf model-safetensors --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("first", metavar="A", help="a checkpoint: the reference")
    parser.add_argument("second", metavar="B", help="another checkpoint of the same model")


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    from jaxweights.cli._progress import show_progress
    from jaxweights.cli._tensors import resolve

    first, second = resolve(Path(options.first)), resolve(Path(options.second))
    with show_progress(options.quiet) as progress:
        tensors, one_sided = _compare(first, second, progress)
    total_error = sum(t["error_norm"] ** 2 for t in tensors)
    total = sum(t["norm"] ** 2 for t in tensors)
    result = {
        "first": str(first),
        "second": str(second),
        "identical": not one_sided and all(t["identical"] for t in tensors),
        "relative_error": float(np.sqrt(total_error / total)) if total else 0.0,
        "tensors": tensors,
        "only_in_one": one_sided,
    }
    return result, _text(result)


def _compare(first: Path, second: Path, progress: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Compares tensors under the names of both files, or as the model's parameters."""
    from jaxweights.checkpoint import open_checkpoint

    opened = open_checkpoint(first), open_checkpoint(second)
    names = [set(checkpoint.names) for checkpoint in opened]
    readers: list[Any] = [checkpoint.read for checkpoint in opened]
    if opened[0].format != opened[1].format or not names[0] & names[1]:
        trees = [_as_parameters(path) for path in (first, second)]
        names = [set(tree) for tree in trees]
        readers = [tree.__getitem__ for tree in trees]
    shared = sorted(names[0] & names[1])
    if not shared:
        raise ValueError(
            f"'{first}' and '{second}' have no tensor in common: they are different models."
        )
    tensors, one_sided = [], sorted(names[0] ^ names[1])
    for done, name in enumerate(shared, start=1):
        old, new = (np.asarray(read(name)) for read in readers)
        if old.shape != new.shape:
            one_sided.append(f"{name}: {old.shape} in one, {new.shape} in the other")
        else:
            tensors.append({"name": name, "shape": list(old.shape)} | _difference(old, new))
        progress("Comparing", done, len(shared))
    return tensors, one_sided


def _as_parameters(path: Path) -> dict[str, Any]:
    """A checkpoint as the parameters of its model, dense, by path."""
    from jaxweights.core import flatten
    from jaxweights.models import load_pretrained
    from jaxweights.weights import materialize

    return flatten(materialize(load_pretrained(path).params))[0]


def _difference(old: np.ndarray, new: np.ndarray) -> dict[str, Any]:
    identical = old.dtype == new.dtype and old.tobytes() == new.tobytes()
    first, second = (x.astype(np.float32).ravel() for x in (old, new))
    error, norm, other = (float(np.linalg.norm(x)) for x in (second - first, first, second))
    cosine = float(np.dot(first, second)) / (norm * other) if norm and other else float(identical)
    return {
        "identical": identical,
        "relative_error": error / norm if norm else float(error > 0),
        "angle_degrees": float(np.degrees(np.arccos(min(max(cosine, -1.0), 1.0)))),
        "zeros": float(np.mean(second == 0)) if second.size else 0.0,
        "largest_difference": float(np.max(np.abs(second - first), initial=0.0)),
        "norm": norm,
        "error_norm": error,
    }


def _text(result: dict[str, Any]) -> str:
    changed = [t for t in result["tensors"] if not t["identical"]]
    lines = [f"{result['first']} and {result['second']}:"]
    same = len(result["tensors"]) - len(changed)
    lines.append(f"{same} tensors identical, {len(changed)} different")
    if changed:
        width = max(len(t["name"]) for t in changed)
        lines += ["", f"  {'':<{width}}  {'error':>9}  {'angle':>8}  {'zeros':>7}"]
        lines += [
            f"  {t['name']:<{width}}  {100 * t['relative_error']:>7.3f} %"
            f"  {t['angle_degrees']:>7.2f}°  {100 * t['zeros']:>5.1f} %"
            for t in changed
        ]
        lines += ["", f"relative error of all together: {100 * result['relative_error']:.3f} %"]
    if result["only_in_one"]:
        lines += ["", "only in one of them, or misshapen:"]
        lines += [f"  {name}" for name in result["only_in_one"]]
    return "\n".join(lines)
