"""Jobs that run a transform leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxweights.core._apply import LayoutLike, transform_tree
from jaxweights.core._layout import is_float
from jaxweights.core._transform import Transform
from jaxweights.merge._arcee_fusion import FusionMerge
from jaxweights.merge._delta import DeltaMerge
from jaxweights.merge._ram import RamMerge
from jaxweights.merge._sce import SceMerge
from jaxweights.merge._spherical import SphereMerge
from jaxweights.stream._chance import chance_job
from jaxweights.stream._delta import layered_delta_job
from jaxweights.stream._fusion import fusion_job
from jaxweights.stream._jobs import Job, Operand
from jaxweights.stream._leaf import Leaf
from jaxweights.stream._ram import ram_job
from jaxweights.stream._sce import sce_job
from jaxweights.stream._sphere import sphere_job
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
    assert tx.scope not in ("block", "tree"), "checked by who builds the jobs"
    own = (*operands[:1], *operands) if leaf_is_model and not _takes_tree(tx) else operands
    made = _sliced_job(Leaf(name, dtype, tuple(own), layout, seed), tx.settings)
    if made is not None:
        return made

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


def _takes_tree(tx: Transform) -> bool:
    """Whether a merge takes the tree as the first of the models by itself."""
    return isinstance(tx.settings, SphereMerge) and tx.settings.tree_is_model


def _sliced_job(leaf: Leaf, settings: Any) -> Job | None:
    """The job of a merge whose leaves are cut after a survey; None where they cannot be."""
    if not is_float(leaf.operands[0]):
        return None
    if isinstance(settings, SphereMerge) and settings.output.rounding == "nearest":
        grouping = leaf.grouping(settings.name, settings.group)
        if grouping is not None:
            return sphere_job(leaf.name, leaf.dtype, leaf.operands, settings, grouping)
    if isinstance(settings, DeltaMerge):
        made = chance_job if settings.row.draws else layered_delta_job
        return made(leaf, settings)
    if isinstance(settings, SceMerge):
        return sce_job(leaf, settings)
    if isinstance(settings, FusionMerge):
        return fusion_job(leaf, settings)
    if isinstance(settings, RamMerge):
        return ram_job(leaf, settings)
    return None
