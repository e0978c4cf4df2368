"""The tensors of compressed-tensors checkpoints in FP8 and NVFP4, and which floats it holds."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._microscaled import (
    E2M1,
    E2M3,
    check_blocks_of,
    four_bits,
    has_levels,
    mx_form,
    packed_fours,
)
from jaxweights.checkpoint.exchange._module import (
    FLOAT,
    TORCH_LINEAR,
    Part,
    Parts,
    check_parts,
    lazy,
)
from jaxweights.weights._axes import View
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._narrow_float import NarrowFloat

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_NV_BLOCK = 16


def unpack_float_quantized(parts: Parts) -> NarrowFloat:
    """Reads one module of the format `float-quantized`: FP8.

    Args:
      parts: `weight` float8_e4m3fn `(out, in)`; `weight_scale` `(out, groups)`, `(out, 1)`, `(1,)`,
        or one for each tile, `(out / a, in / b)`; perhaps `weight_zero_point`, all of it 0, which
        some writers add.

    Returns:
      A weight of shape `(out, in)`.

    Raises:
      ValueError: If a part is missing, of another dtype or shape, tiles do not fit, or a zero point
        is not 0.
    """
    check_parts(parts, {"weight": ((_E4M3,), (None, None))})
    out_dim, in_dim = parts["weight"].shape
    part = parts.get("weight_scale")
    single = part is not None and part.shape in ((), (1,))
    check_parts(parts, {"weight_scale": (FLOAT, part.shape if single and part else (None, None))})
    assert part is not None
    cols, rows = (1, 1) if single else part.shape
    if not rows or not cols or out_dim % cols or in_dim % rows:
        raise ValueError(f"'weight_scale' is {part.shape}, which does not tile {(out_dim, in_dim)}")
    zero = parts.get("weight_zero_point")
    if zero is not None and np.any(zero.read().astype(np.float32)):
        raise ValueError(
            "'weight_zero_point' is not 0, which 8-bit floats are not read with. Decompress the "
            "checkpoint with compressed-tensors, and quantize it here"
        )
    scale = np.ascontiguousarray(part.read().reshape(cols, rows).T)
    return NarrowFloat(
        values=np.ascontiguousarray(parts["weight"].read().T),  # type: ignore[arg-type]
        scale=scale,
        dtype=scale.dtype,
        view=View.of((out_dim, in_dim), TORCH_LINEAR),
    )


def unpack_fp8(parts: Parts, *, block: tuple[int, int] | None) -> NarrowFloat:
    """Reads one module of `quant_method: fp8`, as DeepSeek-V3 and Qwen3-FP8 are released.

    Args:
      parts: `weight` float8_e4m3fn `(out, in)`; `weight_scale_inv`, or `weight_scale`, which is
        multiplied whatever its name says: one for each tile, of which the last of a row or column
        may be cut, or as `unpack_float_quantized` takes it.
      block: Outputs and inputs of a tile; None where there are none.

    Returns:
      A weight of shape `(out, in)`. Where tiles are cut, its own are as small as divides its sides.

    Raises:
      ValueError: If a part is missing, or of another dtype or shape.
    """
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    plain = {("weight_scale" if key == name else key): part for key, part in parts.items()}
    check_parts(parts, {"weight": ((_E4M3,), (None, None))})
    shape, scale = parts["weight"].shape, parts.get(name)
    if block is None or scale is None or scale.shape in ((), (1,), (shape[0], 1)):
        return unpack_float_quantized(plain)
    tiles = tuple(-(-length // size) for length, size in zip(shape, block, strict=True))
    check_parts(parts, {name: (FLOAT, tiles)})
    fine = scale.read()
    for axis, (length, size) in enumerate(zip(shape, block, strict=True)):
        own = math.gcd(length, size)
        fine = np.repeat(fine, size // own, axis).take(np.arange(length // own), axis)
    return unpack_float_quantized({**plain, "weight_scale": Part.of(fine)})


def pack_float_quantized(weight: NarrowFloat) -> dict[str, LazyTensor]:
    """The tensors of a module of the format `float-quantized`, made when they are written."""
    rows, cols = weight.scale.shape[-2:]
    return {
        "weight": lazy((weight.out_dim, weight.in_dim), _E4M3, lambda: np.asarray(weight.values).T),
        "weight_scale": lazy(
            (1,) if (rows, cols) == (1, 1) else (cols, rows),
            weight.scale.dtype,
            lambda: np.asarray(weight.scale).T.reshape((1,) if rows * cols == 1 else (cols, rows)),
        ),
    }


def unpack_nvfp4(parts: Parts, *, dtype: Any = np.float32) -> Codebook:
    """Reads one module of the format `nvfp4-pack-quantized`.

    Args:
      parts: `weight_packed` as MXFP4 has it; `weight_scale` float8_e4m3fn `(out, in / 16)`;
        `weight_global_scale` float32 `(1,)`, by which these are divided.
      dtype: Dtype that it materialises to, which the file does not say.

    Returns:
      A weight of shape `(out, in)`.

    Raises:
      ValueError: If a part is missing, of another dtype or shape, or the global scale is 0 or not
        finite.

    Source: compressed-tensors 0.20, `compressors/nvfp4`.
    """
    blocks = check_blocks_of(parts, 4, _NV_BLOCK, (_E4M3,))
    check_parts(parts, {"weight_global_scale": ((np.dtype(np.float32),), (1,))})
    overall = parts["weight_global_scale"].read().reshape(1, 1)
    if not np.isfinite(overall).all() or not overall.all():
        raise ValueError(
            f"'weight_global_scale' is {float(overall[0, 0])}, by which nothing can be divided. "
            "The file is damaged"
        )
    scale = NarrowFloat(
        values=np.ascontiguousarray(parts["weight_scale"].read().T),  # type: ignore[arg-type]
        scale=overall,
        divides=True,
        view=View.of(blocks[::-1]),
    )
    return four_bits(parts, scale, dtype)


def pack_nvfp4(weight: Codebook) -> dict[str, LazyTensor]:
    """The tensors of a module of the format `nvfp4-pack-quantized`, made when they are written."""
    return {
        "weight_packed": packed_fours(weight),
        "weight_scale": lazy(
            (weight.out_dim, weight.in_dim // _NV_BLOCK),
            _E4M3,
            lambda: np.ascontiguousarray(np.asarray(weight.scale.values).T),
        ),
        "weight_global_scale": lazy(
            (1,), np.float32, lambda: np.asarray(weight.scale.scale).reshape(1)
        ),
    }


def is_nvfp4(weight: Codebook) -> bool:
    """Whether scales are 8-bit floats, divided by one number, for every 16 inputs."""
    scale = weight.scale
    return (
        isinstance(scale, NarrowFloat)
        and scale.divides
        and scale.offset is None
        and np.dtype(scale.values.dtype) == _E4M3
        and np.dtype(scale.scale.dtype) == np.float32
        and tuple(scale.scale.shape[-2:]) == (1, 1)
        and tuple(scale.values.shape[-2:]) == (weight.in_dim // _NV_BLOCK, weight.out_dim)
    )


def unfit_floats(weight: Any) -> list[str]:
    """Why a weight is none of the floats that compressed-tensors has, if it is none."""
    if weight.offset is not None:
        return ["has offsets, which floats have not in this format"]
    if mx_form(weight) is not None:
        return []
    scale = weight.scale
    if isinstance(weight, NarrowFloat):
        if np.dtype(weight.values.dtype) != _E4M3:
            return [f"holds {weight.values.dtype}, but this format has e4m3. Quantize to that"]
        if np.dtype(scale.dtype) not in FLOAT:
            return [
                f"has scales {scale.dtype} {tuple(scale.shape)}, but FP8 has floating ones, and "
                "MXFP8 powers of two for every 32 inputs. Use quantize.fp8 or "
                "quantize.mx(element='e4m3')"
            ]
        return []
    if not has_levels(weight, 4, E2M1) and not has_levels(weight, 6, E2M3):
        return [
            "has levels that this format does not know. Use quantize.mx(element='e2m1'), "
            "quantize.mx(element='e2m3') or quantize.nvfp4"
        ]
    if weight.bits == 4 and is_nvfp4(weight):
        return []
    return [
        f"has scales {scale.dtype} {tuple(scale.shape)}, but MXFP4 and MXFP6 have powers of two "
        "for every 32 inputs and NVFP4 e4m3 for every 16, divided by one number. Use quantize.mx "
        "or quantize.nvfp4"
    ]
