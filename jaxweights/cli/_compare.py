"""jaxweights compare: how far two checkpoints are apart, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

SUMMARY = "show how far two checkpoints of one model are apart"
DESCRIPTION = """\
Compares two checkpoints of one model, tensor by tensor: the relative error of the second, the
angle between them, the share of zeros, and with --ranks the rank of the difference (low for an
adapter, full for rounding). Formats may differ: names and orientations are mapped where the
model's architecture is known."""
EXAMPLES = """\
examples:
  jaxweights compare model runs/quickstart
  jaxweights compare base finetuned --ranks --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("first", metavar="A", help="a checkpoint: the reference")
    parser.add_argument("second", metavar="B", help="another checkpoint of the same model")
    parser.add_argument(
        "--ranks", action="store_true", help="take the rank of every difference: slower"
    )


def execute(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs the command.

    Returns:
      The result for programs, and for people.
    """
    from jaxweights.cli._progress import show_progress
    from jaxweights.cli._tensors import resolve

    first, second = resolve(Path(options.first)), resolve(Path(options.second))
    with show_progress(options.quiet) as progress:
        tensors, one_sided = _compare(first, second, options.ranks, progress)
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


def _compare(
    first: Path, second: Path, ranks: bool, progress: Any
) -> tuple[list[dict[str, Any]], list[str]]:
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
            identical = old.dtype == new.dtype and old.tobytes() == new.tobytes()
            if not identical:
                _refuse_incomparable(name, (first, old), (second, new))
            tensors.append(_difference(name, old, new, identical, ranks))
        progress("Comparing", done, len(shared))
    if not tensors:
        raise ValueError(
            f"'{first}' and '{second}' have no tensor of one shape in common: they are different "
            f"models. Of what both hold, {one_sided[-1]}."
        )
    return tensors, one_sided


def _refuse_incomparable(name: str, *sides: tuple[Path, np.ndarray]) -> None:
    """Refuses two tensors that differ, but have no difference to measure."""
    from jaxweights.core._host import where_not_finite

    arrays = [array for _, array in sides]
    if not all(_is_float(array) for array in arrays):
        kinds = " and ".join(str(array.dtype) for array in arrays)
        raise ValueError(f"{name!r} holds {kinds} that differ, not weights.")
    problems = []
    for path, array in sides:
        bad = where_not_finite(array)
        if len(bad):
            problems.append(
                f"'{path}': {name!r}: {len(bad)} of {array.size} values are not finite, the first "
                f"at {bad[0].tolist()}. Repair the checkpoint."
            )
    if problems:
        raise ValueError("\n".join(problems))


def _as_parameters(path: Path) -> dict[str, Any]:
    """A checkpoint as the parameters of its model, dense, by path."""
    from jaxweights.core import flatten
    from jaxweights.models import load_pretrained
    from jaxweights.weights import materialize

    return flatten(materialize(load_pretrained(path).params))[0]


def _difference(
    name: str, old: np.ndarray, new: np.ndarray, identical: bool, ranks: bool
) -> dict[str, Any]:
    from jaxweights.analyze import compare
    from jaxweights.weights import Axes

    result: dict[str, Any] = {
        "name": name,
        "shape": list(old.shape),
        "identical": identical,
        "relative_error": 0.0,
        "angle_degrees": 0.0,
        "largest_difference": 0.0,
        "zeros": float(np.mean(new == 0)) if new.size else 0.0,
        "norm": _norm(old),
        "error_norm": 0.0,
    }
    if identical:
        return result
    whole = compare({"all": old.ravel()}, {"all": new.ravel()}, ranks=False)["all"]
    result |= {
        "relative_error": float(np.squeeze(whole.relative_error)),
        "angle_degrees": float(np.degrees(np.squeeze(whole.angle))),
        "largest_difference": float(np.squeeze(whole.max_abs)),
        "error_norm": float(np.squeeze(whole.fro)),
    }
    if ranks and old.ndim >= 2:
        plain = {"all": Axes()}
        found = compare({"all": old}, {"all": new}, layout=plain)["all"]
        result["rank_of_difference"] = np.asarray(found.numerical_rank).tolist()
    return result


def _norm(array: np.ndarray) -> float:
    """Of the values that have one: masks of minus infinity lie beside weights in some files."""
    wide = array.astype(np.float64).ravel()
    return float(np.linalg.norm(wide[np.isfinite(wide)]))


def _is_float(array: np.ndarray) -> bool:
    import jax.numpy as jnp

    return jnp.issubdtype(array.dtype, jnp.floating)


def _text(result: dict[str, Any]) -> str:
    changed = [t for t in result["tensors"] if not t["identical"]]
    lines = [f"{result['first']} and {result['second']}:"]
    same = len(result["tensors"]) - len(changed)
    lines.append(f"{same} tensors identical, {len(changed)} different")
    if changed:
        width = max(len(t["name"]) for t in changed)
        has_ranks = any("rank_of_difference" in t for t in changed)
        title = f"  {'':<{width}}  {'error':>9}  {'angle':>8}  {'zeros':>7}"
        lines += ["", title + ("  rank of the difference" if has_ranks else "")]
        lines += [_row(t, width) for t in changed]
        lines += ["", f"relative error of all together: {100 * result['relative_error']:.3f} %"]
    if result["only_in_one"]:
        lines += ["", "only in one of them, or misshapen:"]
        lines += [f"  {name}" for name in result["only_in_one"]]
    return "\n".join(lines)


def _row(tensor: dict[str, Any], width: int) -> str:
    row = (
        f"  {tensor['name']:<{width}}  {100 * tensor['relative_error']:>7.3f} %"
        f"  {tensor['angle_degrees']:>7.2f}°  {100 * tensor['zeros']:>5.1f} %"
    )
    if "rank_of_difference" in tensor:
        ranks = np.ravel(tensor["rank_of_difference"])
        low, high = int(ranks.min()), int(ranks.max())
        row += f"  {low}" if low == high else f"  {low} to {high}"
    return row
