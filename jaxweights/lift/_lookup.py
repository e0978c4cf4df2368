"""Lookups: which gathers pick entries of a leaf's first axis, as embeddings and experts do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax


def row_column(gather: Mapping[str, Any], shape: Sequence[int]) -> int | None:
    """Which column of a gather's indices picks entries of axis 0.

    Args:
      gather: The equation's parameters.
      shape: Of the leaf.

    Returns:
      The column; None where the gather does anything else. Under `vmap`, `weight[i]` has columns
      for the other axes, too, which are taken whole and clipped to start at 0.
    """
    numbers = gather["dimension_numbers"]
    axes = tuple(numbers.start_index_map)
    clips = gather["mode"] == jax.lax.GatherScatterMode.CLIP
    if getattr(numbers, "operand_batching_dims", ()) or 0 not in axes:
        return None
    if tuple(gather["slice_sizes"]) != (1, *shape[1:]) or (len(axes) > 1 and not clips):
        return None
    return axes.index(0)
