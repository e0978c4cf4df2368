"""The floating tensors of compressed-tensors checkpoints: FP8 and MXFP4."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._module import (
    FLOAT,
    TORCH_LINEAR,
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


def unpack_float_quantized(parts: Parts) -> NarrowFloat:
    """Reads one module of the format `float-quantized`: FP8.

    Args:
      parts: `weight` float8_e4m3fn `(out, in)`; `weight_scale` `(out, groups)`, `(out, 1)`, `(1,)`,
        or one for each tile, `(out / a, in / b)`.

    Returns:
      A weight of shape `(out, in)`.

    Raises:
      ValueError: If a part is missing, of another dtype or shape, or tiles do not fit.
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
    scale = np.ascontiguousarray(part.read().reshape(cols, rows).T)
    return NarrowFloat(
        values=np.ascontiguousarray(parts["weight"].read().T),  # type: ignore[arg-type]
        scale=scale,
        dtype=scale.dtype,
        view=View.of((out_dim, in_dim), TORCH_LINEAR),
    )


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
    packed = parts.get("weight_packed")
    out_dim, half = packed.shape if packed and len(packed.shape) == 2 else (0, 0)
    check_parts(
        parts,
        {
            "weight_packed": (_U8, (out_dim, half)),
            "weight_scale": (_U8, (out_dim, 2 * half // _MX_BLOCK)),
        },
    )
    if half % (_MX_BLOCK // 2):
        raise ValueError(f"{2 * half} inputs are no blocks of {_MX_BLOCK}")
    data = parts["weight_packed"].read()
    codes = np.stack([data & 0x0F, data >> 4], axis=-1).reshape(out_dim, 2 * half)
    return Codebook(
        codes=share_bytes(codes.T, 2, signed=False),  # type: ignore[arg-type]
        table=E2M1,  # type: ignore[arg-type]
        scale=np.ascontiguousarray(parts["weight_scale"].read().T).view(_E8M0),
        bits=4,
        codes_per_byte=2,
        dtype=np.dtype(dtype),
        view=View.of((out_dim, 2 * half), TORCH_LINEAR),
    )


def pack_mxfp4(weight: Codebook) -> dict[str, LazyTensor]:
    """The tensors of a module of the format `mxfp4-pack-quantized`, made when they are written."""
    out_dim, in_dim = weight.out_dim, weight.in_dim

    def packed() -> np.ndarray:
        codes = unpacked_codes(weight).T
        return codes[:, ::2] | codes[:, 1::2] << 4

    return {
        "weight_packed": lazy((out_dim, in_dim // 2), np.uint8, packed),
        "weight_scale": lazy(
            (out_dim, in_dim // _MX_BLOCK),
            np.uint8,
            lambda: np.ascontiguousarray(np.asarray(weight.scale).T).view(np.uint8),
        ),
    }


def unfit_floats(weight: Any) -> list[str]:
    """Why a weight is neither FP8 nor MXFP4 as compressed-tensors has them, if it is not."""
    if weight.offset is not None:
        return ["has offsets, which floats have not in this format"]
    scale = weight.scale
    if isinstance(weight, NarrowFloat):
        if np.dtype(weight.values.dtype) != _E4M3:
            return [f"holds {weight.values.dtype}, but this format has e4m3. Quantize to that"]
        if np.dtype(scale.dtype) not in FLOAT:
            return [f"has scales in {scale.dtype}, but FP8 has floating ones. Use quantize.fp8"]
        return []
    blocks = (weight.in_dim // _MX_BLOCK, weight.out_dim)
    if not np.array_equal(np.asarray(weight.table), E2M1) or weight.bits != 4:
        return ["has levels that this format does not know. Use quantize.mx(element='e2m1')"]
    if np.dtype(scale.dtype) != _E8M0 or tuple(scale.shape[-2:]) != blocks:
        return [
            f"has scales {scale.dtype} {tuple(scale.shape)}, but MXFP4 has powers of two for every "
            "32 inputs. Use quantize.mx(element='e2m1')"
        ]
    return []
