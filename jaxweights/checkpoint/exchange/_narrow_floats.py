"""The floating tensors of compressed-tensors checkpoints: FP8, MXFP4 and NVFP4."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._module import (
    FLOAT,
    TORCH_LINEAR,
    Part,
    Parts,
    check_parts,
    lazy,
    share_bytes,
    unpacked_codes,
)
from jaxweights.weights._axes import View
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._narrow_float import NarrowFloat

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_U8 = (np.dtype(np.uint8),)
# e2m1 by its code, whose highest bit is the sign.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_MX_BLOCK = 32
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


def unpack_mxfp4(parts: Parts, *, dtype: Any = np.float32) -> Codebook:
    """Reads one module of the format `mxfp4-pack-quantized`.

    Args:
      parts: `weight_packed` uint8 `(out, in / 2)`, the even input in the low bits; `weight_scale`
        uint8 `(out, in / 32)`, exponents with a bias of 127.
      dtype: Dtype that it materialises to, which the file does not say.

    Returns:
      A weight of shape `(out, in)`.

    Raises:
      ValueError: If a part is missing or of another dtype or shape.
    """
    blocks = _check_four_bits(parts, _MX_BLOCK, "weight_scale", _U8)
    scale = np.ascontiguousarray(parts["weight_scale"].read().T).view(_E8M0)
    return _four_bits(parts, scale, blocks, dtype)


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
    blocks = _check_four_bits(parts, _NV_BLOCK, "weight_scale", (_E4M3,))
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
    return _four_bits(parts, scale, blocks, dtype)


def _check_four_bits(
    parts: Parts, block: int, scale: str, dtypes: tuple[np.dtype, ...]
) -> tuple[int, int]:
    """Checks codes and scales, and gives the shape of the scales, `(out, blocks)`."""
    packed = parts.get("weight_packed")
    out_dim, half = packed.shape if packed and len(packed.shape) == 2 else (0, 0)
    if half % (block // 2):
        raise ValueError(f"{2 * half} inputs are no blocks of {block}")
    blocks = (out_dim, 2 * half // block)
    check_parts(parts, {"weight_packed": (_U8, (out_dim, half)), scale: (dtypes, blocks)})
    return blocks


def _four_bits(parts: Parts, scale: Any, blocks: tuple[int, int], dtype: Any) -> Codebook:
    data = parts["weight_packed"].read()
    out_dim, half = data.shape
    codes = np.stack([data & 0x0F, data >> 4], axis=-1).reshape(out_dim, 2 * half)
    return Codebook(
        codes=share_bytes(codes.T, 2, signed=False),  # type: ignore[arg-type]
        table=E2M1,  # type: ignore[arg-type]
        scale=scale,
        bits=4,
        codes_per_byte=2,
        dtype=np.dtype(dtype),
        view=View.of((out_dim, 2 * half), TORCH_LINEAR),
    )


def pack_mxfp4(weight: Codebook) -> dict[str, LazyTensor]:
    """The tensors of a module of the format `mxfp4-pack-quantized`, made when they are written."""
    return {
        "weight_packed": _packed(weight),
        "weight_scale": lazy(
            (weight.out_dim, weight.in_dim // _MX_BLOCK),
            np.uint8,
            lambda: np.ascontiguousarray(np.asarray(weight.scale).T).view(np.uint8),
        ),
    }


def pack_nvfp4(weight: Codebook) -> dict[str, LazyTensor]:
    """The tensors of a module of the format `nvfp4-pack-quantized`, made when they are written."""
    return {
        "weight_packed": _packed(weight),
        "weight_scale": lazy(
            (weight.out_dim, weight.in_dim // _NV_BLOCK),
            _E4M3,
            lambda: np.ascontiguousarray(np.asarray(weight.scale.values).T),
        ),
        "weight_global_scale": lazy(
            (1,), np.float32, lambda: np.asarray(weight.scale.scale).reshape(1)
        ),
    }


def _packed(weight: Codebook) -> LazyTensor:
    def packed() -> np.ndarray:
        codes = unpacked_codes(weight).T
        return codes[:, ::2] | codes[:, 1::2] << 4

    return lazy((weight.out_dim, weight.in_dim // 2), np.uint8, packed)


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
    """Why a weight is none of FP8, MXFP4 and NVFP4 as compressed-tensors has them, if it is not."""
    if weight.offset is not None:
        return ["has offsets, which floats have not in this format"]
    scale = weight.scale
    if isinstance(weight, NarrowFloat):
        if np.dtype(weight.values.dtype) != _E4M3:
            return [f"holds {weight.values.dtype}, but this format has e4m3. Quantize to that"]
        if np.dtype(scale.dtype) not in FLOAT:
            return [f"has scales in {scale.dtype}, but FP8 has floating ones. Use quantize.fp8"]
        return []
    if not np.array_equal(np.asarray(weight.table), E2M1) or weight.bits != 4:
        return [
            "has levels that this format does not know. Use quantize.mx(element='e2m1') or "
            "quantize.nvfp4"
        ]
    blocks = (weight.in_dim // _MX_BLOCK, weight.out_dim)
    if is_nvfp4(weight):
        return []
    if np.dtype(scale.dtype) != _E8M0 or tuple(scale.shape[-2:]) != blocks:
        return [
            f"has scales {scale.dtype} {tuple(scale.shape)}, but MXFP4 has powers of two for every "
            "32 inputs and NVFP4 e4m3 for every 16, divided by one number. Use "
            "quantize.mx(element='e2m1') or quantize.nvfp4"
        ]
    return []
