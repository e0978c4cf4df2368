"""round_to_nearest: every weight to the nearest level of its grid."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._grid import (
    Codes,
    GridKind,
    GroupAxis,
    GroupSize,
    Pad,
    Search,
    make_grid,
    round_matrix,
)
from jaxweights.quantize._leaves import (
    REFUSAL,
    describe_bad_scales,
    finite_scales,
    pack,
    replace_leaf,
    unfit_leaf,
)
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked

_NAME = "quantize.round_to_nearest"


def round_to_nearest(
    *,
    bits: int,
    group_size: GroupSize = None,
    group_axis: GroupAxis = "input",
    pad: Pad | None = None,
    grid: GridKind | None = None,
    scale_dtype: DTypeLike = jnp.float32,
    search: Search = "absmax",
) -> Transform:
    r"""Rounds every entry to the nearest level of an integer grid; needs no data.

    Each group of `group_size` input rows of one output channel gets a scale (and on affine grids a
    zero point), and each of its entries the code :math:`\mathrm{round}(w/s) + z`, halves to even,
    clipped to the grid. Reads the weight twice and writes it once, in codes. Pruned weights stay
    pruned: every grid holds 0, and the mask of a `Masked` leaf is kept around the result.

    Args:
      bits: Bits per code, 2 to 8. Codes of 4 bits and fewer share bytes.
      group_size: Rows (or columns) sharing one scale; None gives one per output (or per input),
        "tensor" one per matrix.
      group_axis: "input" for groups of rows of one output, which runtimes read; "output" for groups
        of columns of one input, which keep an outlying input to itself.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`: it is
        rounded as if rows of zeros filled it up, which are not kept. None refuses such a matrix.
      grid: "narrow", "full", "half", "signed_max", "affine" or "gptq_sym", see `Grid`; None gives
        "narrow" at 8 bits, as other runtimes do, and "signed_max" below, whose error on normally
        distributed weights is the least of the symmetric grids (0.77 of "narrow"'s at 4 bits).
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      search: "absmax" spans the whole range of a group, "mse" the shrunken range that errs least, a
        number p the p-th percentile, ("rms", k) k times the root mean square, on which one outlier
        has little influence.

    Returns:
      A transform from dense or masked matrices to `Quantized` ones, of the same shape and dtype.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, if the group size does not
        divide an input axis and `pad` is None, a leaf is already quantized, or one holds values
        that are not finite.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (256, 64))}}
      >>> quantized = jw.apply(jw.quantize.round_to_nearest(bits=4, group_size=128), params)
      >>> quantized["dense"]["kernel"].bits_per_weight
      4.25

    Source: "narrow": Zeng et al. 2022, arXiv:2210.02414, section 3.3: GLM-130B's INT8 and INT4 are
      `grid="narrow", scale_dtype=jnp.float16`, one scale per output; "signed_max": the Q4_0 blocks
      of GGUF; "gptq_sym" and the "mse" search: Frantar et al. 2023, arXiv:2210.17323, the authors'
      code; "rms": the calibration of that name of qwix.
    Differs: (1) 0 is always on the grid. (2) A group of zeros has scale 1 and zero point 0. (3)
      Codes are chosen for the scale as it is stored. (4) "gptq_sym" spans both signs also where a
      group has only one; the authors' code then clips half of the range.
    """
    settings = make_grid(
        _NAME,
        bits=bits,
        group_size=group_size,
        group_axis=group_axis,
        pad=pad,
        grid=grid,
        scale_dtype=scale_dtype,
        search=search,
    )

    def quantize(weight: jax.Array) -> Codes:
        return pack(round_matrix(weight, settings), settings)

    def wrap(leaf: Any, codes: Codes, view: View) -> Any:
        return replace_leaf(leaf, codes, view, settings)

    def check(path: Path, leaf: Any, view: View) -> str | None:
        problem = unfit_leaf(leaf, view, settings)
        return problem and f"{path!r}: {problem}"

    return leafwise(
        quantize,
        name=_NAME,
        wrap=wrap,
        accepts=(Masked,),
        refusal=REFUSAL,
        check=check,
        verify=describe_bad_scales,
        sound=finite_scales,
    )
