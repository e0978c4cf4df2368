"""nf4 and fp4: four-bit tables of bitsandbytes, blocks of 64."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxweights.core._transform import Transform
from jaxweights.quantize._blocks import (
    Block,
    block_counts,
    block_max,
    check_block,
    fill_up_group,
    fit_block,
    in_units,
)
from jaxweights.quantize._double import quantize_scales
from jaxweights.quantize._grid import Pad, check_pad
from jaxweights.quantize._leaves import check_scale_dtype, represented
from jaxweights.quantize._levels import nearest_code, signed_code, signs
from jaxweights.quantize._settings import check_flags
from jaxweights.quantize._stored_scale import stored_scale
from jaxweights.weights._codebook import Codebook

# Quantiles of the normal distribution with an exact zero; appendix E of the paper.
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
# Three bits of bitsandbytes' own float, in the order of its codes; the fourth is the sign.
_FP4_MAGNITUDES = (np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12).astype(np.float32)
FP4_LEVELS = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])


def nf4(
    *,
    group_size: Block = 64,
    scale_dtype: DTypeLike = jnp.float32,
    double_quantization: bool = False,
    pad: Pad | None = None,
) -> Transform:
    r"""Four-bit levels that normally distributed weights fill evenly; needs no data.

    Each group is divided by its largest magnitude and every entry gets the nearest of 16 quantiles
    of the normal distribution, among them -1, 0 and 1. The base weights of QLoRA: `adapt.lora`
    over the result trains factors of its own. On normal weights the relative squared error in
    groups of 64 is 8.5e-3, where a uniform 4-bit grid has 8.9e-3 ("signed_max").

    Args:
      group_size: Input rows of one output sharing a scale; None for all of an output's, "tensor"
        for all of the matrix's, a pair for tiles of (rows, columns).
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      double_quantization: Whether scales are stored as 8-bit codes themselves, in blocks of up to
        256 about their mean: 0.127 bits a weight instead of 0.5 in groups of 64. Codes of weights
        are then chosen for the scale before.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`; None
        where such a leaf is refused.

    Returns:
      A transform from dense or masked matrices to `Codebook` ones, of the same shape and dtype.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, if the group size does not
        divide an axis and `pad` is None, a leaf is already quantized, or one holds values that are
        not finite.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (1024, 128))}}
      >>> small = jw.apply(jw.quantize.nf4(double_quantization=True), params)
      >>> round(small["dense"]["kernel"].bits_per_weight, 1)
      4.2

    Source: Dettmers et al. 2023, arXiv:2305.14314; the levels and double quantization as in
      bitsandbytes 0.50.
    Differs: (1) Groups never straddle two outputs. (2) Blocks of quantized scales are smaller where
      256 of them do not tile the matrix. (3) A group of zeros has scale 1.
    """
    name = "quantize.nf4"
    return _four_bits(name, NF4_LEVELS, group_size, scale_dtype, double_quantization, pad)


def fp4(
    *,
    group_size: Block = 64,
    scale_dtype: DTypeLike = jnp.float32,
    double_quantization: bool = False,
    pad: Pad | None = None,
) -> Transform:
    r"""Four-bit floats as bitsandbytes defines them; needs no data.

    Each group is divided by its largest magnitude and every entry gets the nearest of
    0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1 with a sign. This is not the e2m1 of `mx` and `nvfp4`,
    whose levels are more even. On normal weights `nf4` errs little more than half as much.

    Args:
      group_size: As in `nf4`.
      scale_dtype: As in `nf4`.
      double_quantization: As in `nf4`.
      pad: As in `nf4`.

    Returns:
      A transform from dense or masked matrices to `Codebook` ones, of the same shape and dtype.

    Raises:
      TypeError: As `nf4`.
      ValueError: As `nf4`.

    Example:
      >>> import jaxweights as jw
      >>> params = {"dense": {"kernel": jnp.linspace(0, 6, 64)[:, None]}}
      >>> small = jw.apply(jw.quantize.fp4(), params)
      >>> small["dense"]["kernel"].materialize()[::9, 0].tolist()
      [0.0, 1.0, 1.5, 3.0, 3.0, 4.0, 6.0, 6.0]

    Source: bitsandbytes 0.50, `quant_type="fp4"`.
    Differs: as `nf4`.
    """
    name = "quantize.fp4"
    return _four_bits(name, FP4_LEVELS, group_size, scale_dtype, double_quantization, pad)


def four_bit_matrix(
    weight: Float[Array, "in out"],
    levels: np.ndarray,
    *,
    group_size: Block = 64,
    scale_dtype: DTypeLike = jnp.float32,
    double_quantization: bool = False,
    pad: Pad | None = None,
) -> Codebook:
    """Codes of the levels nearest to the entries of one matrix, each block's largest made 1.

    Args:
      weight: `(in, out)`, floating.
      levels: `NF4_LEVELS` or `FP4_LEVELS`.
      group_size: As in `nf4`.
      scale_dtype: As in `nf4`.
      double_quantization: As in `nf4`.
      pad: As in `nf4`.

    Returns:
      The matrix.

    Example:
      >>> matrix = four_bit_matrix(jnp.array([[2.0], [-0.9]]), NF4_LEVELS, group_size=2)
      >>> matrix.codes_matrix()[:, 0].tolist()
      [15, 3]
    """
    name = "quantize.four_bit_matrix"
    _check(name, group_size, scale_dtype, double_quantization, pad)
    block, full_group = fit_block(name, group_size, pad, weight.shape)
    wide = fill_up_group(weight.astype(jnp.float32), full_group)
    largest = block_max(wide, block_counts(block, *wide.shape))
    scale = stored_scale(largest, scale_dtype)
    if levels is FP4_LEVELS:
        code = signed_code(in_units(jnp.abs(wide), scale), signs(wide), _FP4_MAGNITUDES)
    else:
        code = nearest_code(in_units(wide, scale), levels)
    stored = quantize_scales(largest) if double_quantization else scale
    return Codebook.from_codes(
        code[: len(weight)], jnp.asarray(levels), stored, bits=4, full_group=full_group
    )


def _four_bits(
    name: str,
    levels: np.ndarray,
    group_size: Block,
    scale_dtype: DTypeLike,
    double_quantization: bool,
    pad: Pad | None,
) -> Transform:
    _check(name, group_size, scale_dtype, double_quantization, pad)
    matrix = functools.partial(
        four_bit_matrix,
        levels=levels,
        group_size=group_size,
        scale_dtype=scale_dtype,
        double_quantization=double_quantization,
        pad=pad,
    )
    return represented(matrix, name=name, group_size=None if pad else group_size, pads=True)


def _check(
    asker: str, group_size: Any, scale_dtype: Any, double_quantization: Any, pad: Any
) -> None:
    check_block(asker, group_size)
    check_pad(asker, pad, group_size)
    check_scale_dtype(asker, scale_dtype)
    check_flags(asker, double_quantization=double_quantization)
    if double_quantization and jnp.dtype(scale_dtype) != jnp.float32:
        raise ValueError(
            f"{asker}: scale_dtype={jnp.dtype(scale_dtype)} has no meaning with "
            "double_quantization=True, whose scales are 8-bit codes. Leave one of them out."
        )
