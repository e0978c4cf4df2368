"""mx and nvfp4: microscaling, small blocks of narrow floats with narrow scales."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.core._compiled import compiled
from jaxweights.core._context import Context
from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Flat, Path
from jaxweights.core._stored import stored_as
from jaxweights.core._targets import inner_weight
from jaxweights.core._transform import Transform
from jaxweights.quantize._blocks import (
    block_counts,
    block_max,
    in_units,
    refuse_unfit,
)
from jaxweights.quantize._leaves import represented
from jaxweights.quantize._levels import (
    ELEMENTS,
    Element,
    minifloat_code,
    minifloat_table,
    signed_code,
    signs,
)
from jaxweights.quantize._settings import check_count, is_word
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._divide import divide
from jaxweights.weights._masked import Masked
from jaxweights.weights._microscaling import (
    MX_BLOCK,
    NVFP4_BLOCK,
    ScaleRule,
    overall_scale,
    shared_exponent,
)
from jaxweights.weights._narrow_float import NarrowFloat
from jaxweights.weights._scaled import combine

Nvfp4Scope = Literal["matrix", "layer"]


def mx(*, element: Element, scale_rule: ScaleRule = "floor") -> Transform:
    r"""Rounds weights to the microscaling formats: 32 narrow floats share a power of two.

    Needs no data. With :math:`2^e \le amax < 2^{e+1}` for the largest magnitude of 32 consecutive
    input rows and :math:`E` the exponent of the element's largest value, the scale is
    :math:`2^{e-E}`, stored in 8 bits; entries beyond the largest value get it. Relative squared
    error on normal weights: 8.6e-4 for e4m3, 1.3e-2 for e2m1.

    Args:
      element: "e4m3" or "e5m2" (MXFP8), "e3m2" or "e2m3" (MXFP6), "e2m1" (MXFP4).
      scale_rule: "floor" as above and in the standard, which clips at most a quarter off the
        largest entries; "ceil" one power more unless amax is a power of two; "rceil" the least
        power that clips nothing; "even" one more where amax, rounded to the element's mantissa,
        reaches the next power; "oas" (outlier-aware) the same, but for e4m3 already from 1.81 times
        a power on. The last two err least on e2m1.

    Returns:
      A transform from dense or masked matrices to `NarrowFloat` (MXFP8) or `Codebook` ones, of the
      same shape and dtype. Six-bit codes are held in bytes.

    Raises:
      ValueError: If a setting is unknown; when it sees a tree, if 32 does not divide an input axis,
        a leaf is already quantized, or one holds values that are not finite.

    Example:
      >>> import jaxweights as jw
      >>> params = {"dense": {"kernel": jnp.arange(32.0)[:, None]}}
      >>> small = jw.apply(jw.quantize.mx(element="e2m1"), params)["dense"]["kernel"]
      >>> small.scale.tolist(), small.materialize()[:6, 0].tolist(), small.bits_per_weight > 4.25
      ([[4.0]], [0.0, 0.0, 2.0, 4.0, 4.0, 4.0], True)

    Source: OCP Microscaling Formats (MX) 1.0; Rouhani et al. 2023, arXiv:2310.10537, Algorithm 1.
      "ceil", "rceil" and "even" as in torchao 0.18; "even" of e2m1 is also compressed-tensors'.
      "oas" as in qwix.
    Differs: (1) Ties go to even codes, as the standard has it; the authors' emulation rounds them
      away from zero by default. (2) A scale below 2**-127 is 2**-127.
    """
    name = "quantize.mx"
    _check(name, element, scale_rule)
    matrix = functools.partial(mx_matrix, element=element, scale_rule=scale_rule)
    word = f"the block of {MX_BLOCK} rows that MX formats have"
    return represented(matrix, name=name, group_size=MX_BLOCK, word=word)


def nvfp4(*, scope: Nvfp4Scope = "matrix") -> Transform:
    r"""Rounds weights to NVFP4: 16 four-bit floats share an 8-bit one; needs no data.

    Two levels of scales: :math:`G = 448 \cdot 6 / amax(W)` for the matrix in float32, and for each
    16 consecutive input rows the e4m3 float s nearest to :math:`amax / 6 \cdot G`. Every entry gets
    the nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign, in units of :math:`s / G`. On normal
    weights the relative squared error is 9.1e-3.

    Args:
      scope: Who shares a G: nobody ("matrix"), or all matrices that it acts on that have the same
        place in stacks of the same lengths ("layer"). vLLM multiplies queries, keys and values at
        once, and gates with ups, and has one G for them.

    Returns:
      A transform from dense or masked matrices to `Codebook` ones, of the same shape and dtype,
      whose scales are `NarrowFloat`: 4.5 bits a weight. A stack has a G for each matrix.

    Raises:
      ValueError: If `scope` is unknown; when it sees a tree, if 16 does not divide an input axis, a
        leaf is already quantized, or one holds values that are not finite.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}}
      >>> small = jw.apply(jw.quantize.nvfp4(), params)["dense"]["kernel"]
      >>> round(small.bits_per_weight, 2)
      4.5

    Source: compressed-tensors 0.20, whose codes and scales these are (`weight_global_scale` is G).
    Differs: A block whose scale is 0 in e4m3 has scale 1 and codes of 0.
    """
    name, word = "quantize.nvfp4", f"the block of {NVFP4_BLOCK} rows that NVFP4 has"
    if not is_word(scope, get_args(Nvfp4Scope)):
        raise ValueError(f"{name}: scope={scope!r} is unknown. Choose 'matrix' or 'layer'.")
    blocks: dict[str, Any] = {"name": name, "group_size": NVFP4_BLOCK, "word": word}
    if scope == "matrix":
        return represented(nvfp4_matrix, **blocks)
    extremes = leafwise(
        lambda weight: jnp.max(jnp.abs(weight.astype(jnp.float32)), initial=0.0),
        name=name,
        wrap=lambda leaf, result, view: result,
        accepts=(Masked,),
    )

    def largest(context: Context, params: Flat) -> dict[Path, dict[str, jax.Array]]:
        measured, _ = extremes.update(params, (), dataclasses.replace(context, progress=None))
        found = {p: inner_weight(x) for p, x in measured.items() if x is not params[p]}
        layers: dict[tuple[int, ...], jax.Array] = {}
        for x in found.values():
            layers[x.shape] = jnp.maximum(layers[x.shape], x) if x.shape in layers else x
        return {path: {"largest": layers[x.shape]} for path, x in found.items()}

    tx = represented(nvfp4_matrix, per_leaf=largest, **blocks)
    return dataclasses.replace(tx, scope="block")


@compiled
def mx_matrix(
    weight: Float[Array, "in out"],
    *,
    element: Element,
    scale_rule: ScaleRule = "floor",
    block: int = MX_BLOCK,
) -> NarrowFloat | Codebook:
    """One matrix in a microscaling format.

    Args:
      weight: `(in, out)`, floating.
      element: As in `mx`.
      scale_rule: As in `mx`.
      block: Input rows that share a scale, 32 in the standard; divides `in`.

    Returns:
      The matrix.

    Example:
      >>> mx_matrix(jnp.array([[7.0], [2.4]]), element="e2m1", block=2).materialize().tolist()
      [[6.0], [2.0]]
    """
    _check("quantize.mx_matrix", element, scale_rule)
    check_count("quantize.mx_matrix", "block", block)
    refuse_unfit("quantize.mx_matrix", block, weight.shape)
    kind = ELEMENTS[element]
    wide = weight.astype(jnp.float32)
    largest = block_max(wide, block_counts(block, *weight.shape))
    exponent = shared_exponent(largest, kind, scale_rule)
    # Powers of two are made of their bits: no logarithm rounds, and products with them are exact.
    inverse = jax.lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
    units = combine(wide, inverse, jnp.multiply)
    finite = jnp.isfinite(largest)
    stored = jnp.where(finite, exponent + 127, 255).astype(jnp.uint8)  # 255 is NaN
    scale = jax.lax.bitcast_convert_type(stored, jnp.float8_e8m0fnu)
    codes = minifloat_code(units, kind)
    if kind.dtype is not None:
        # From codes, not by a conversion: fused with exponents, that is slow in XLA on CPU.
        values = jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), kind.dtype)
        return NarrowFloat.from_values(values, scale)
    return Codebook.from_codes(codes, jnp.asarray(minifloat_table(kind)), scale, bits=kind.bits)


def _check(asker: str, element: Any, scale_rule: Any) -> None:
    if not is_word(element, ELEMENTS):
        raise ValueError(f"{asker}: element={element!r} is unknown. Choose one of {[*ELEMENTS]}.")
    if not is_word(scale_rule, get_args(ScaleRule)):
        raise ValueError(
            f"{asker}: scale_rule={scale_rule!r} is unknown. Choose one of {get_args(ScaleRule)}."
        )


@compiled
def nvfp4_matrix(
    weight: Float[Array, "in out"], largest: Float[Array, ""] | None = None
) -> Codebook:
    """One matrix in NVFP4.

    Args:
      weight: `(in, out)`, floating; 16 divides `in`.
      largest: Magnitude that G brings to the top of the range; None takes the matrix's largest.

    Returns:
      The matrix.

    Example:
      >>> matrix = nvfp4_matrix(jnp.full((16, 1), 3.0))
      >>> matrix.scale.values.tolist(), float(matrix.materialize()[0, 0])
      ([[448.0]], 3.0)
    """
    refuse_unfit("quantize.nvfp4_matrix", NVFP4_BLOCK, weight.shape)
    kind, of_scale = ELEMENTS["e2m1"], ELEMENTS["e4m3"]
    wide = weight.astype(jnp.float32)
    of_blocks = block_max(wide, block_counts(NVFP4_BLOCK, *weight.shape))
    overall = block_max(of_blocks, (1, 1)) if largest is None else largest.reshape(1, 1)
    outer = overall_scale(overall)
    steps = jnp.minimum(divide(of_blocks, kind.largest) * outer, of_scale.largest)
    scale = stored_as(steps, of_scale.dtype)
    # Blocks of zeros, or of so much less than the largest that all of their codes are 0.
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    scale = NarrowFloat.from_values(scale, outer, divides=True)
    table = minifloat_table(kind)
    size = in_units(jnp.abs(wide), scale.matrix())
    codes = signed_code(size, signs(wide), table[:8], ties="even")
    return Codebook.from_codes(codes, jnp.asarray(table), scale, bits=4)
