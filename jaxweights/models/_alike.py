"""Brings quantized layers into one form, so that they can be stacked."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jaxweights.weights._quantized import Quantized
from jaxweights.weights._weight import is_weight


def in_one_form(layers: list[Any]) -> list[Any] | None:
    """Layers that stand for the same numbers and have equal structure, shapes and dtypes.

    Codes are widened to the most bits, signed ones get a zero point where others have one, and
    scales are repeated for the smallest groups. No number changes.

    Args:
      layers: Weights of one shape, of NumPy arrays.

    Returns:
      The layers, or None where that cannot be: dense ones among them, offsets beside none, dtypes
      that differ, indices of groups beside groups of another size, or a last group that is shorter
      beside groups of another size.
    """
    if not all(is_weight(layer) for layer in layers):
        return None
    if len({_structure(layer) for layer in layers}) == 1:
        return layers
    if not all(isinstance(layer, Quantized) for layer in layers):
        return None
    offsets = {layer.offset is not None for layer in layers}
    indexed = any(layer.group_index is not None for layer in layers)
    groups = {layer.scale.shape[-2:] for layer in layers}
    dtypes = {np.dtype(layer.dtype) for layer in layers}
    if max(len(offsets), len(dtypes)) > 1 or (indexed and len(groups) > 1):
        return None
    full_group = max(layer.full_group for layer in layers)
    if full_group and any(x.group_size not in (None, full_group) for x in layers):
        return None
    rows, cols = (math.lcm(*(shape[i] for shape in groups)) for i in (0, 1))
    first = layers[0]
    if (first.in_dim % rows and not full_group) or first.out_dim % cols:
        return None
    bits = max(layer.bits for layer in layers)
    shifted = any(layer.zero_point is not None for layer in layers)
    scale_dtype = np.result_type(*(layer.scale.dtype for layer in layers))
    return [
        _widened(x, bits, rows, cols, full_group, shifted, indexed, scale_dtype) for x in layers
    ]


def _structure(layer: Quantized) -> Any:
    leaves, treedef = jax.tree.flatten(layer)
    return treedef, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves)


def _widened(
    layer: Quantized,
    bits: int,
    rows: int,
    cols: int,
    full_group: int,
    shifted: bool,
    indexed: bool,
    scale_dtype: Any,
) -> Quantized:
    def spread(field: Any, dtype: Any) -> Any:
        if field is None:
            return None
        field = np.asarray(field).astype(dtype)
        if layer.group_index is None:
            field = np.repeat(field, rows // field.shape[-2], axis=-2)
        return np.repeat(field, cols // field.shape[-1], axis=-1)

    codes = np.asarray(layer.codes_matrix())
    zero = layer.zero_point
    if shifted and zero is None:
        middle = 2 ** (layer.bits - 1)
        codes = (codes.astype(np.int16) + middle).astype(np.uint8)
        zero = np.full(layer.scale.shape, middle, np.uint8)  # type: ignore[assignment]
    index: Any = layer.group_index
    if indexed and index is None:
        size = full_group or layer.in_dim // rows
        index = np.arange(layer.in_dim, dtype=np.int32) // np.int32(size)
    return jax.tree.map(
        np.asarray,
        Quantized.from_codes(
            codes,  # type: ignore[arg-type]
            spread(layer.scale, scale_dtype),
            spread(zero, np.uint8),
            index,
            bits=bits,
            full_group=full_group,
            offset=spread(layer.offset, scale_dtype),
            dtype=layer.dtype,
            view=layer.view,
        ),
    )
