"""Jobs that run a transform leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxweights.core._apply import LayoutLike, resolve_layout, transform_tree
from jaxweights.core._transform import Transform
from jaxweights.merge._per_leaf import group_axes
from jaxweights.merge._spherical import SphereMerge
from jaxweights.merge._stacks import stack_axes
from jaxweights.stream._jobs import Job, Operand
from jaxweights.stream._sphere import Grouping, sphere_job
from jaxweights.weights._weight import materialize

# float32 copies of operands and results, which most methods make.
_WIDE_BYTES = 4


def transform_job(
    name: str,
    operands: Sequence[Operand],
    tx: Transform,
    *,
    dtype: np.dtype,
    layout: LayoutLike = None,
    seed: int = 0,
    leaf_is_model: bool = False,
) -> Job:
    """The job that transforms one tensor.

    Args:
      name: Path of the leaf, and name of the tensor that is written.
      operands: The leaf, then those of the models.
      tx: A transform whose scope is an entry or a leaf.
      dtype: Of the result.
      layout: Axes of the leaf.
      seed: Randomness.
      leaf_is_model: Whether the leaf is the first of the models, too.

    Returns:
      The job.
    """
    assert tx.scope != "tree", "checked by who builds the jobs"
    if isinstance(tx.settings, SphereMerge):
        models = operands if leaf_is_model and not tx.settings.tree_is_model else operands[1:]
        grouping = _grouping(name, operands[0], tx.settings, layout)
        if grouping is not None:
            return sphere_job(name, dtype, (operands[0], *models), tx.settings, grouping)

    def compute(arrays: Sequence[Any], start: int) -> Any:
        del start
        # Read in place where they are aligned; nobody writes them meanwhile.
        leaf, *others = [jax.device_put(array, may_alias=True) for array in arrays]
        merged = [leaf, *others] if leaf_is_model else others
        models = [{name: other} for other in merged] or None
        # Copied, so that nothing aliases what is used again.
        given = None if tx.scope == "entry" else layout
        key = jax.random.key(seed)
        new = transform_tree(tx, {name: leaf}, models=models, key=key, layout=given)[name]
        return np.array(materialize(new))

    return Job(
        name,
        operands[0].shape,
        dtype,
        tuple(operands),
        compute,
        entrywise=tx.scope == "entry",
        temporaries=_WIDE_BYTES * (len(operands) + 1),
    )


def _grouping(name: str, leaf: Operand, merge: SphereMerge, layout: LayoutLike) -> Grouping | None:
    """What the vectors of a leaf are; None where only the whole of it can be merged."""
    if merge.output.rounding != "nearest":
        return None
    flat = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}
    found = resolve_layout(flat, layout)
    stacks = stack_axes(merge.name, flat, found)
    return Grouping.of(leaf.shape, group_axes(flat, found, stacks, merge.group)[name])
