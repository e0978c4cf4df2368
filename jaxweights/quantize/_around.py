"""What transforms do that work around a quantizer: which leaves it takes, and one leaf alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxweights.core._context import Context
from jaxweights.core._layout import is_default_target, is_float
from jaxweights.core._paths import Flat, Params, Path, fail, flatten
from jaxweights.core._stats import Needs, union_needs
from jaxweights.core._transform import Transform

_GRAM = frozenset({"gram", "count"})


def check_quantizer(asker: str, quantizer: Any) -> None:
    """Refuses what is no transform, or makes no approximation of the weight itself.

    Raises:
      TypeError: If it is no transform.
      ValueError: If it moves or rescales inputs.
    """
    if not isinstance(quantizer, Transform):
        raise TypeError(
            f"{asker}: quantizer={quantizer!r} is no transform. Pass one such as "
            "quantize.gptq(bits=3, group_size=64)."
        )
    if quantizer.moves_inputs:
        raise ValueError(
            f"{asker}: {quantizer.name} moves or rescales inputs, so that what it makes is no "
            "approximation of the weight itself. Apply it before."
        )


def needs_around(
    asker: str, quantizer: Transform, params: Params, *, named: bool, weighted: bool = True
) -> Needs:
    """What a quantizer needs, and the measure of its errors, where Gram matrices weight them.

    Raises:
      ValueError: If it makes up for errors of inputs, so that it approximates another weight.
    """
    own = quantizer.needs(params, named=named)
    fail(
        asker,
        [
            f"{path!r}: {quantizer.name} changes the weight to make up for errors of its inputs, "
            "which approximating the weight as it was would undo. Set error_propagation=0 and "
            "asymmetric_calibration=0."
            for path, names in own.items()
            if "cross_gram" in names
        ],
    )
    return union_needs([own, _gram_needs(params, named=named) if weighted else {}])


def _gram_needs(params: Params, *, named: bool) -> Needs:
    """Gram matrices and counts of all matrices that a transform acts on."""
    return {
        path: _GRAM
        for path, leaf in flatten(params)[0].items()
        if is_float(leaf) and len(leaf.shape) > 1 and (named or is_default_target(path))
    }


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
