"""What transforms do that work around a quantizer: which leaves it takes, and one leaf alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxweights.core._context import Context
from jaxweights.core._paths import Flat, Path
from jaxweights.core._transform import Transform


def changed_leaves(quantizer: Transform, flat: Flat, context: Context) -> list[Path]:
    """Paths of the leaves that a quantizer changes, from shapes alone.

    What it refuses for its shape, it refuses here, all at once.

    Args:
      quantizer: The transform.
      flat: Leaves by path.
      context: Of the surrounding transform.

    Returns:
      The paths, in the tree's order.
    """
    silent = dataclasses.replace(context, progress=None)
    changed: list[Path] = []

    def run(arrays: Flat) -> Flat:
        given = flat | arrays
        new, _ = quantizer.update(given, quantizer.init(given), silent)
        changed.extend(path for path in arrays if new[path] is not given[path])
        return {path: new[path] for path in arrays}

    jax.eval_shape(run, {path: leaf for path, leaf in flat.items() if hasattr(leaf, "dtype")})
    return changed


def quantize_alone(
    quantizer: Transform, flat: Flat, context: Context, path: Path, value: jax.Array
) -> Any:
    """What a quantizer makes of a value at one path; its rules see the names of all."""
    given = {**flat, path: value}
    one = dataclasses.replace(context, only=frozenset({path}), progress=None)
    return quantizer.update(given, quantizer.init(given), one)[0][path]
