"""What all quantizers do with a leaf: which ones they refuse, and what they put in its place."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxweights.core._paths import Path
from jaxweights.quantize._grid import Codes, Grid, unfit_group
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._quantized import Quantized, codes_per_byte, pack_codes
from jaxweights.weights._weight import is_weight

REFUSAL = (
    "Quantizing it again would add a second rounding error. Dequantize it first with "
    "`materialize`, or leave it out with `partition`."
)


def unfit_leaf(leaf: Any, view: View, grid: Grid) -> str | None:
    """What is wrong with a leaf, from its representation and shape; None if nothing is."""
    if isinstance(leaf, Masked) and is_weight(leaf.base):
        return f"is already a Masked {type(leaf.base).__name__}. {REFUSAL}"
    return unfit_group(grid, view.in_dim)


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
        codes_per_byte=codes_per_byte(grid.bits, view.in_dim),
        dtype=np.dtype(leaf.dtype),
        view=view,
    )
    return Masked(weight, leaf.mask) if isinstance(leaf, Masked) else weight


def describe_bad_scales(path: Path, codes: Codes) -> str | None:
    """Says which groups have a scale that is not finite; None if none has.

    A group that holds NaN or infinity has such a scale, so this finds them without reading the
    weight again.
    """
    scale = np.asarray(codes.scale.astype(np.float32))
    bad = np.argwhere(~np.isfinite(scale))
    if not len(bad):
        return None
    *stack, row, column = (int(i) for i in bad[0])
    where = f"group {row} of " + (f"output {column}" if scale.shape[-1] > 1 else "all outputs")
    where += f" of matrix {stack} in the stack" if stack else ""
    return (
        f"{path!r}: {len(bad)} of {scale.size} groups hold values that are not finite, or too "
        f"large for scales in {codes.scale.dtype}, the first being {where}. Repair the checkpoint, "
        "choose a wider scale_dtype, or leave this weight out with `partition`."
    )
