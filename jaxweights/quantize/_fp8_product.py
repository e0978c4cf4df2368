"""fp8_dynamic and fp8_static: 8-bit floats on both sides of a product."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._blocks import Block, check_block, unfit_block
from jaxweights.quantize._fixed_step import describe_bad_step, fixed_step
from jaxweights.quantize._fp8 import fp8_matrix
from jaxweights.quantize._leaves import (
    REFUSAL,
    check_scale_dtype,
    describe_bad_blocks,
    unfit_values,
)
from jaxweights.quantize._settings import check_count
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._narrow_float import NarrowFloat
from jaxweights.weights._rounded_inputs import LARGEST, RoundedInputs, unfit_groups
from jaxweights.weights._scaled import Scaled
from jaxweights.weights._weight import is_weight


def fp8_dynamic(
    *,
    group_size: Block = None,
    input_group_size: int | None = None,
    scale_dtype: DTypeLike = jnp.float32,
) -> Transform:
    """Rounds weights and, as the model runs, each token of their inputs to 8-bit floats.

    Matrices become `RoundedInputs`: under `lift`, products and convolutions with them scale a token
    so that its largest magnitude is 448, and round it to e4m3. Weights are those of `fp8`; those
    that are quantized already (to integers of four bits by `gptq`, say) keep their numbers, which
    is W4A8. Needs no data. Inside `fake_quant` inputs are rounded, too. On a CPU the product
    takes as long as one of floats.

    Written as compressed-tensors, vLLM multiplies the same 8-bit floats, and transformers rounds
    weights and inputs to the same ones.

    Args:
      group_size: Of the weights, as in `fp8`; those that are quantized already keep theirs.
      input_group_size: Inputs of a token that share a scale; None for all of them. Tiles of
        `(128, 128)` go with 128, as DeepSeek-V3 has them.
      scale_dtype: Dtype that the weights' scales are stored in; those of inputs are float32.

    Returns:
      A transform from dense, `Masked` or quantized matrices to `RoundedInputs` ones.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, if blocks do not tile a leaf,
        groups do not divide its inputs, or it holds values that are not finite.

    Example:
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> model = lambda params, x: x @ params["kernel"]
      >>> quantized = jw.apply(jw.quantize.fp8_dynamic(), params)
      >>> y = jax.jit(jw.lift(model))(quantized, jnp.ones((2, 64)))
      >>> bool(jnp.allclose(y, model(params, jnp.ones((2, 64))), atol=0.5))
      True

    Source: Micikevicius et al. 2022, arXiv:2209.05433; groups of inputs: DeepSeek-AI 2024,
      arXiv:2412.19437, section 3.3.
    """
    name = "quantize.fp8_dynamic"
    if input_group_size is not None:
        check_count(name, "input_group_size", input_group_size)
        input_group_size = int(input_group_size)
    return _transform(name, group_size, input_group_size, scale_dtype, static=False)


def fp8_static(*, group_size: Block = None, scale_dtype: DTypeLike = jnp.float32) -> Transform:
    """Rounds weights and all their inputs to 8-bit floats, with one scale for a matrix's inputs.

    As `fp8_dynamic`, with a scale that calibration fixed: the largest magnitude that was seen, over
    448. What exceeds it is clipped. Saves looking for each token's largest magnitude, and loses
    little by it, as floats are as precise far below the largest one as near it.

    Args:
      group_size: As in `fp8_dynamic`.
      scale_dtype: As in `fp8_dynamic`.

    Returns:
      A transform as that of `fp8_dynamic`, which needs the statistics "min" and "max".

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: As `fp8_dynamic`, and where a statistic is missing or no token reached a matrix.

    Example:
      >>> params, x = {"kernel": jnp.array([[1.0], [0.5]])}, jnp.array([[2.0, -4.0]])
      >>> tx, model = jw.quantize.fp8_static(), lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(model, params, [x], needs=tx.needs(params))
      >>> float(448 * jw.apply(tx, params, stats=stats)["kernel"].input_scale[0, 0])
      4.0

    Source: Micikevicius et al. 2022, arXiv:2209.05433.
    """
    return _transform("quantize.fp8_static", group_size, None, scale_dtype, static=True)


def _transform(
    name: str,
    group_size: Block,
    input_group_size: int | None,
    scale_dtype: DTypeLike,
    *,
    static: bool,
) -> Transform:
    check_block(name, group_size)
    check_scale_dtype(name, scale_dtype)

    def quantize(weight: jax.Array, **seen: jax.Array) -> tuple[NarrowFloat, Any]:
        matrix = fp8_matrix(weight, group_size=group_size, scale_dtype=scale_dtype)
        return matrix, fixed_step(seen["min"], seen["max"], LARGEST) if static else None

    def wrap(leaf: Any, result: tuple[NarrowFloat, Any], view: View) -> RoundedInputs:
        matrix, scale = result
        if not _is_quantized(leaf):
            # Zeros stay zeros: a mask has no more to do.
            leaf = _with_dtype(matrix, leaf.dtype, view)
        return RoundedInputs.of(leaf, scale, group_size=input_group_size, view=view)

    def check(path: Path, leaf: Any, view: View) -> str | None:
        problem = _unfit(leaf, view, group_size, input_group_size)
        return problem and f"{path!r}: {problem}"

    def verify(path: Path, result: tuple[NarrowFloat, Any]) -> str | None:
        matrix, scale = result
        return describe_bad_blocks(path, matrix) or describe_bad_step(path, scale, "fp8_dynamic")

    return leafwise(
        quantize,
        name=name,
        needs=("max", "min") if static else (),
        wrap=wrap,
        accepts=(Masked, Scaled),
        refusal=REFUSAL,
        check=check,
        verify=verify,
        checks_finite=False,
        grouped="pool",
    )


def _is_quantized(leaf: Any) -> bool:
    return is_weight(leaf.base if isinstance(leaf, Masked) else leaf)


def _unfit(leaf: Any, view: View, group_size: Block, input_group_size: int | None) -> str | None:
    problem = unfit_groups(input_group_size, view.in_dim, False)
    if problem is not None:
        return problem
    if not _is_quantized(leaf):
        return unfit_values(leaf) or unfit_block(group_size, view.in_dim, view.out_dim)
    inner = leaf.base if isinstance(leaf, Masked) else leaf
    if not isinstance(inner, Scaled):
        return f"is already a Masked {type(inner).__name__}. {REFUSAL}"
    if group_size not in (None, inner.group_size):
        return (
            f"is a {type(inner).__name__} with group_size={inner.group_size}, whose numbers are "
            f"kept, but group_size={group_size} is asked for. Leave group_size out, or start from "
            "the dense weight."
        )
    return None


def _with_dtype(matrix: NarrowFloat, dtype: Any, view: View) -> NarrowFloat:
    return dataclasses.replace(matrix, dtype=np.dtype(dtype), view=view)
