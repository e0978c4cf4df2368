"""fp8: 8-bit floats with floating scales."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxweights.core._compiled import compiled
from jaxweights.core._transform import Transform
from jaxweights.quantize._blocks import (
    Block,
    block_counts,
    block_max,
    check_block,
    in_units,
    refuse_unfit,
)
from jaxweights.quantize._leaves import check_scale_dtype, represented
from jaxweights.quantize._levels import ELEMENTS
from jaxweights.quantize._settings import is_word
from jaxweights.quantize._stored_scale import stored_scale
from jaxweights.weights._divide import divide
from jaxweights.weights._narrow_float import NarrowFloat

_NAME = "quantize.fp8"

Fp8Element = Literal["e4m3", "e5m2"]


def fp8(
    *,
    element: Fp8Element = "e4m3",
    group_size: Block = None,
    scale_dtype: DTypeLike = jnp.float32,
) -> Transform:
    r"""Rounds weights to 8-bit floats, the largest of each block to the largest there is.

    Needs no data. Where a matrix has one row of scales, products multiply the 8-bit floats and
    scale the result. On normal weights, one scale per output, the relative squared error is 7.0e-4
    for e4m3 and 2.8e-3 for e5m2; int8 has 2e-4, but no outliers.

    Args:
      element: "e4m3" (`float8_e4m3fn`, up to 448) or "e5m2" (up to 57344, one bit less precise).
      group_size: None gives one scale per output, "tensor" one per matrix, an integer one for so
        many input rows, a pair one per tile: `(128, 128)` as DeepSeek-V3 has them.
      scale_dtype: Dtype that scales are stored in; values are rounded for the stored scale.

    Returns:
      A transform from dense or masked matrices to `NarrowFloat` ones, of the same shape and dtype.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, if blocks do not tile a leaf, a
        leaf is already quantized, or one holds values that are not finite.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"dense": {"kernel": jnp.array([[1.0, -8.0], [0.5, 3.0]])}}
      >>> small = jw.apply(jw.quantize.fp8(), params)["dense"]["kernel"]
      >>> small.values.tolist()
      [[448.0, -448.0], [224.0, 160.0]]

    Source: Micikevicius et al. 2022, arXiv:2209.05433; tiles: DeepSeek-AI 2024, arXiv:2412.19437,
      section 3.3.
    Differs: (1) Values are clipped before they are cast: a conversion to e4m3 alone makes NaN of
      what a rounded scale leaves above 448. (2) A block of zeros has scale 1.
    """
    _check(_NAME, element, group_size, scale_dtype)
    matrix = functools.partial(
        fp8_matrix, element=element, group_size=group_size, scale_dtype=scale_dtype
    )
    return represented(matrix, name=_NAME, group_size=group_size)


@compiled
def fp8_matrix(
    weight: Float[Array, "in out"],
    *,
    element: Fp8Element = "e4m3",
    group_size: Block = None,
    scale_dtype: DTypeLike = jnp.float32,
) -> NarrowFloat:
    """Eight-bit floats for one matrix.

    Args:
      weight: `(in, out)`, floating.
      element: As in `fp8`.
      group_size: As in `fp8`.
      scale_dtype: As in `fp8`.

    Returns:
      The matrix.

    Example:
      >>> fp8_matrix(jnp.array([[2.0]])).values.tolist()
      [[448.0]]
    """
    _check(f"{_NAME}_matrix", element, group_size, scale_dtype)
    refuse_unfit(f"{_NAME}_matrix", group_size, weight.shape)
    kind = ELEMENTS[element]
    wide = weight.astype(jnp.float32)
    largest = block_max(wide, block_counts(group_size, *weight.shape))
    scale = stored_scale(divide(largest, kind.largest), scale_dtype)
    units = jnp.clip(in_units(wide, scale), -kind.largest, kind.largest)
    return NarrowFloat.from_values(units.astype(kind.dtype), scale)


def _check(asker: str, element: Any, group_size: Any, scale_dtype: Any) -> None:
    check_block(asker, group_size)
    check_scale_dtype(asker, scale_dtype)
    if not is_word(element, ("e4m3", "e5m2")):
        raise ValueError(
            f"{asker}: element={element!r} is unknown. Choose 'e4m3' or 'e5m2'; narrower floats "
            "are those of `mx` and `nvfp4`."
        )
