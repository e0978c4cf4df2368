"""What all quantizers do with a leaf: which ones they refuse, and what they put in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._host import where_not_finite, where_zero
from jaxweights.core._leafwise import PerLeaf, Shared, leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._blocks import Block, unfit_block
from jaxweights.quantize._grid import Codes, Grid, unfit_group
from jaxweights.quantize._settings import check_float_dtype
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._packed_codes import codes_per_byte, pack_codes
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._scaled import Scaled
from jaxweights.weights._weight import is_weight

REFUSAL = (
    "Quantizing it again would add a second rounding error. Dequantize it first with "
    "`materialize`, or leave it out with `partition`. In `chain`, quantizers come before LoRA."
)

_TOO_SMALL = (
    "Choose a wider scale_dtype, set weights as small as these to 0, or leave this weight out with "
    "`partition`."
)


def unfit_leaf(leaf: Any, view: View, grid: Grid, *, pads: bool = True) -> str | None:
    """What is wrong with a leaf, from its representation and shape; None if nothing is."""
    return unfit_values(leaf) or unfit_group(grid, view.in_dim, view.out_dim, pads=pads)


def unfit_values(leaf: Any) -> str | None:
    """Why a leaf is not to be quantized whatever its shape, if so."""
    if isinstance(leaf, Masked) and is_weight(leaf.base):
        return f"is already a Masked {type(leaf.base).__name__}. {REFUSAL}"
    if jnp.finfo(leaf.dtype).bits <= 8:
        return (
            f"is {jnp.dtype(leaf.dtype)}, codes of a quantized weight. Put it together with its "
            "scale as `weights.NarrowFloat` and dequantize that with `materialize`, or leave it "
            "out with `partition`."
        )
    return None


def check_scale_dtype(asker: str, scale_dtype: Any) -> None:
    """Refuses what is no floating dtype of 16 or 32 bits."""
    check_float_dtype(asker, scale_dtype=scale_dtype)


def represented(
    matrix: Callable[..., Scaled],
    *,
    name: str,
    group_size: Block = None,
    word: str | None = None,
    pads: bool = False,
    shared: Shared | None = None,
    per_leaf: PerLeaf | None = None,
    mapping: Literal["vmap", "map"] = "vmap",
) -> Transform:
    """A transform from the representation of one matrix, for methods that need no data.

    Args:
      matrix: From an `(in, out)` array to its representation.
      name: What errors call the transform.
      group_size: Blocks that must tile every leaf.
      word: What errors call these blocks; `group_size=...` by default.
      pads: As in `unfit_block`.
      shared: As in `leafwise`.
      per_leaf: As in `leafwise`.
      mapping: As in `leafwise`.
    """

    def wrap(leaf: Any, weight: Any, view: View) -> Any:
        weight = dataclasses.replace(weight, view=view, dtype=np.dtype(leaf.dtype))
        return Masked(weight, leaf.mask) if isinstance(leaf, Masked) else weight

    def check(path: Path, leaf: Any, view: View) -> str | None:
        problem = unfit_values(leaf) or unfit_block(
            group_size, view.in_dim, view.out_dim, word=word, pads=pads
        )
        return problem and f"{path!r}: {problem}"

    return leafwise(
        matrix,
        name=name,
        wrap=wrap,
        accepts=(Masked,),
        refusal=REFUSAL,
        shared=shared,
        per_leaf=per_leaf,
        mapping=mapping,
        check=check,
        verify=describe_bad_blocks,
        sound=usable_blocks,
    )


def pack(codes: Codes, grid: Grid) -> Codes:
    """Packs the codes of one matrix as `Quantized` holds them."""
    per_byte = codes_per_byte(grid.bits, codes.codes.shape[-2])
    return codes._replace(codes=pack_codes(codes.codes, per_byte, signed=not grid.unsigned))


def replace_leaf(
    leaf: Any, codes: Codes, view: View, grid: Grid, group_index: Any = None
) -> Quantized | Masked:
    """The represented weight made of packed codes; a mask stays around it."""
    weight = Quantized(
        codes=codes.codes,
        scale=codes.scale,
        zero_point=codes.zero_point,
        group_index=group_index,
        bits=grid.bits,
        full_group=grid.full_group(view.in_dim),
        codes_per_byte=codes_per_byte(grid.bits, view.in_dim),
        dtype=np.dtype(leaf.dtype),
        view=view,
    )
    return Masked(weight, leaf.mask) if isinstance(leaf, Masked) else weight


def finite_scales(codes: Codes) -> jax.Array:
    """Whether all scales are finite, as where all values of their groups are, and not 0."""
    return ((codes.scale != 0) & jnp.isfinite(codes.scale)).all()


def usable_blocks(weight: Scaled) -> jax.Array:
    """Whether all scales of blocks are finite, and none is 0 for want of range."""
    scale = weight.scale_matrix()
    finite = jnp.isfinite(scale).all()
    return finite & (scale != 0).all() if _may_vanish(weight) else finite


def _may_vanish(weight: Scaled) -> bool:
    """Whether a scale of 0 tells that its dtype has none so small.

    Float32 has; where it holds 0, a method means it. So may scales of scales, and bytes hold
    powers of two alone.
    """
    return not is_weight(weight.scale) and weight.scale.dtype.itemsize == 2


def describe_bad_scales(path: Path, codes: Codes) -> str | None:
    """Says which groups have a scale that is not finite, or 0; None if none has.

    A group that holds NaN or infinity has a scale that is not finite, and one whose values are too
    small for the scales' dtype has 0, so this finds them without reading the weight again.
    """
    scale = codes.scale
    bad, zero = where_not_finite(scale), where_zero(scale)
    if not len(bad) and not len(zero):
        return None
    *stack, row, column = (int(i) for i in (bad if len(bad) else zero)[0])
    where = f"group {row} of " + (f"output {column}" if scale.shape[-1] > 1 else "all outputs")
    where += f" of matrix {stack} in the stack" if stack else ""
    if not len(bad):
        return (
            f"{path!r}: {len(zero)} of {scale.size} groups hold values so small that their scales "
            f"are 0 in {scale.dtype}, the first being {where}. {_TOO_SMALL}"
        )
    return (
        f"{path!r}: {len(bad)} of {scale.size} groups hold values that are not finite, or too "
        f"large for scales in {scale.dtype}, the first being {where}. Repair the checkpoint, "
        "choose a wider scale_dtype, or leave this weight out with `partition`."
    )


def describe_bad_blocks(path: Path, weight: Scaled) -> str | None:
    """As `describe_bad_scales`, for any blocks."""
    scale = weight.scale_matrix()
    bad = where_not_finite(scale)
    zero = where_zero(scale) if _may_vanish(weight) else bad[:0]
    if not len(bad) and not len(zero):
        return None
    remedy = (
        "Repair the checkpoint, choose a wider dtype for scales where there is a choice, or leave "
        "this weight out with `partition`."
    )
    if len(bad) == scale.size > 1:  # one bad value spoils a scale of scales, and so all of them
        return f"{path!r}: holds values that are not finite, or too large for its scales. {remedy}"
    *stack, row, column = (int(i) for i in (bad if len(bad) else zero)[0])
    height, width = weight.group_size or weight.in_dim, weight.out_dim // scale.shape[-1]
    rows = f"inputs {row * height} to {min((row + 1) * height, weight.in_dim) - 1}"
    columns = f"outputs {column * width} to {(column + 1) * width - 1}"
    if width == 1:
        columns = f"output {column}"
    where = f"{rows} of {columns}" + (f" of matrix {stack} in the stack" if stack else "")
    if not len(bad):
        return (
            f"{path!r}: {len(zero)} of {scale.size} blocks hold values so small that their scales "
            f"are 0 in {weight.scale.dtype}, the first being {where}. {_TOO_SMALL}"
        )
    return (
        f"{path!r}: {len(bad)} of {scale.size} blocks hold values that are not finite, or too "
        f"large for their scales, the first being {where}. {remedy}"
    )
