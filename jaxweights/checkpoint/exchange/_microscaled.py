"""The microscaling formats of compressed-tensors: MXFP8, MXFP6 and MXFP4."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._module import (
    TORCH_LINEAR,
    Parts,
    check_parts,
    lazy,
    share_bytes,
    unpacked_codes,
)
from jaxweights.checkpoint.exchange._words import pack_words, unpack_words
from jaxweights.weights._axes import View
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._narrow_float import NarrowFloat

MXForm = Literal["mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"]

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_U8 = np.dtype(np.uint8)
_BLOCK = 32

# By their codes, whose highest bit is the sign.
_E2M1_SIZES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
_E2M3_SIZES = [m / 8 for m in range(8)] + [(8 + m) * 2**e / 8 for e in range(3) for m in range(8)]
E2M1, E2M3 = (
    np.array([*sizes, *(-size for size in sizes)], np.float32)
    for sizes in (_E2M1_SIZES, _E2M3_SIZES)
)
E2M1[8], E2M3[32] = -0.0, -0.0


def mx_form(weight: Codebook | NarrowFloat) -> MXForm | None:
    """The format whose numbers and scales a weight has; None if it is none of these."""
    scale = weight.scale
    blocks = (weight.in_dim // _BLOCK, weight.out_dim)
    if weight.in_dim % _BLOCK or getattr(scale, "dtype", None) != _E8M0:
        return None
    if tuple(scale.shape[-2:]) != blocks or weight.offset is not None:
        return None
    if isinstance(weight, NarrowFloat):
        is_e4m3 = np.dtype(weight.values.dtype) == _E4M3 and not weight.divides
        return "mxfp8-quantized" if is_e4m3 else None
    if has_levels(weight, 4, E2M1):
        return "mxfp4-pack-quantized"
    return "mxfp6-pack-quantized" if has_levels(weight, 6, E2M3) else None


def has_levels(weight: Codebook, bits: int, levels: np.ndarray) -> bool:
    """Whether a weight has codes of so many bits, and these levels."""
    return weight.bits == bits and np.array_equal(np.asarray(weight.table), levels)


def unpack_mx(parts: Parts, *, form: MXForm, dtype: Any = np.float32) -> Codebook | NarrowFloat:
    """Reads one module.

    Args:
      parts: `weight_scale` uint8 `(out, in / 32)`, exponents with a bias of 127; and, of MXFP8
        `weight` float8_e4m3fn `(out, in)`, of MXFP6 `weight_packed` uint8 `(out, 3 in / 4)`, four
        codes in three bytes, of MXFP4 `weight_packed` uint8 `(out, in / 2)`; the first inputs in
        the low bits.
      form: The format.
      dtype: Dtype that it materialises to, which the file does not say.

    Returns:
      A weight of shape `(out, in)`.

    Raises:
      ValueError: If a part is missing or of another dtype or shape.

    Source: compressed-tensors 0.20, `compressors/mxfp4`, `mxfp6` and `mxfp8`.
    """
    if form == "mxfp8-quantized":
        check_parts(parts, {"weight": ((_E4M3,), (None, None))})
        shape = parts["weight"].shape
        if shape[1] % _BLOCK:
            raise ValueError(f"{shape[1]} inputs are no blocks of {_BLOCK}")
        blocks = (shape[0], shape[1] // _BLOCK)
        check_parts(parts, {"weight_scale": ((_U8,), blocks)})
        return NarrowFloat(
            values=np.ascontiguousarray(parts["weight"].read().T),  # type: ignore[arg-type]
            scale=_exponents(parts),
            dtype=np.dtype(dtype),
            view=View.of(shape, TORCH_LINEAR),
        )
    bits = 4 if form == "mxfp4-pack-quantized" else 6
    check_blocks_of(parts, bits, _BLOCK, (_U8,))
    if bits == 4:
        return four_bits(parts, _exponents(parts), dtype)
    packed = parts["weight_packed"].read()
    words = np.ascontiguousarray(packed).view(np.int32)
    codes = unpack_words(words, bits=bits, count=packed.shape[1] * 8 // bits, axis=1)
    return _codebook(codes, bits, E2M3, _exponents(parts), dtype)


def pack_mx(weight: Codebook | NarrowFloat) -> dict[str, LazyTensor]:
    """The tensors of a module whose weight has an `mx_form`, made when they are written."""
    out_dim, in_dim = weight.out_dim, weight.in_dim
    scale = lazy(
        (out_dim, in_dim // _BLOCK),
        np.uint8,
        lambda: np.ascontiguousarray(np.asarray(weight.scale).T).view(np.uint8),
    )
    if isinstance(weight, NarrowFloat):
        values = lazy((out_dim, in_dim), _E4M3, lambda: np.asarray(weight.values).T)
        return {"weight": values, "weight_scale": scale}
    packed = packed_fours(weight)
    if weight.bits == 6:
        packed = lazy(
            (out_dim, in_dim * 6 // 8),
            np.uint8,
            lambda: pack_words(unpacked_codes(weight).T, bits=6, axis=1).view(np.uint8),
        )
    return {"weight_packed": packed, "weight_scale": scale}


def check_blocks_of(
    parts: Parts, bits: int, block: int, dtypes: tuple[np.dtype, ...]
) -> tuple[int, int]:
    """Checks packed codes and the scales of blocks, and gives the shape of these, `(out, blocks)`.

    Raises:
      ValueError: If a part is missing or of another dtype or shape.
    """
    packed = parts.get("weight_packed")
    out_dim, stored = packed.shape if packed and len(packed.shape) == 2 else (0, 0)
    if stored * 8 % (block * bits):
        raise ValueError(f"{stored * 8 / bits:g} inputs are no blocks of {block}")
    blocks = (out_dim, stored * 8 // (block * bits))
    check_parts(
        parts, {"weight_packed": ((_U8,), (out_dim, stored)), "weight_scale": (dtypes, blocks)}
    )
    return blocks


def four_bits(parts: Parts, scale: Any, dtype: Any) -> Codebook:
    """The weight of checked parts with e2m1 numbers, the even input in the low bits."""
    data = parts["weight_packed"].read()
    codes = np.stack([data & 0x0F, data >> 4], axis=-1).reshape(len(data), -1)
    return _codebook(codes, 4, E2M1, scale, dtype)


def packed_fours(weight: Codebook) -> LazyTensor:
    """The inverse of `four_bits`."""

    def packed() -> np.ndarray:
        codes = unpacked_codes(weight).T
        return codes[:, ::2] | codes[:, 1::2] << 4

    return lazy((weight.out_dim, weight.in_dim // 2), np.uint8, packed)


def _codebook(codes: np.ndarray, bits: int, table: np.ndarray, scale: Any, dtype: Any) -> Codebook:
    """A weight of `(out, in)` codes."""
    per_byte = 2 if bits == 4 else 1
    return Codebook(
        codes=share_bytes(codes.T, per_byte, signed=False),  # type: ignore[arg-type]
        table=table,  # type: ignore[arg-type]
        scale=scale,
        bits=bits,
        codes_per_byte=per_byte,
        dtype=np.dtype(dtype),
        view=View.of(codes.shape, TORCH_LINEAR),
    )


def _exponents(parts: Parts) -> np.ndarray:
    """The scales, `(in / 32, out)`."""
    return np.ascontiguousarray(parts["weight_scale"].read().T).view(_E8M0)
