"""The integer tensors of compressed-tensors checkpoints, as llm-compressor writes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._gptq import unfit_groups
from jaxweights.checkpoint.exchange._module import (
    FLOAT,
    INT32,
    Parts,
    check_parts,
    host_weight,
    lazy,
    per_output,
    read_groups,
    unsigned_codes,
    written_group_index,
)
from jaxweights.checkpoint.exchange._words import pack_words, unpack_words, word_count
from jaxweights.weights._quantized import Quantized

_INT8 = (np.dtype(np.int8),)
_INT64 = (np.dtype(np.int64),)


def unpack_pack_quantized(parts: Parts, *, bits: int, symmetric: bool) -> Quantized:
    """Reads one module of the format `pack-quantized`.

    Args:
      parts: `weight_packed` int32 `(out, ceil(in * bits / 32))`, `weight_scale` `(out, groups)`,
        `(out, 1)` or `(1,)`, `weight_shape` int64 `(2,)`; where not symmetric,
        `weight_zero_point` int32 `(ceil(out * bits / 32), groups)`; perhaps `weight_g_idx`.
      bits: Bits per code, 1 to 8.
      symmetric: Whether there are no zero points.

    Returns:
      A weight of shape `(out, in)`.

    Raises:
      ValueError: If a part is missing, of another dtype or shape, or contradicts the others.

    Source: compressed-tensors 0.20, `compressors/pack_quantized`.
    """
    check_parts(parts, {"weight_shape": (_INT64, (2,)), "weight_packed": (INT32, (None, None))})
    out_dim, in_dim = (int(n) for n in parts["weight_shape"].read())
    held = parts["weight_packed"].shape
    if not (0 < out_dim == held[0] and 0 < in_dim <= held[1] * 32):
        raise ValueError(f"'weight_shape' is {(out_dim, in_dim)}, but 'weight_packed' is {held}")
    scale_shape = _scale_shape(parts, out_dim)
    groups = scale_shape[1]
    expected: dict[str, Any] = {"weight_packed": (INT32, (out_dim, word_count(in_dim, bits)))}
    if not symmetric:
        expected["weight_zero_point"] = (INT32, (word_count(out_dim, bits), groups))
    if "weight_g_idx" in parts:
        expected["weight_g_idx"] = ((*INT32, *_INT64), (in_dim,))
    check_parts(parts, expected)
    codes = unpack_words(parts["weight_packed"].read(), bits=bits, count=in_dim, axis=1).T
    zero = None
    if symmetric:
        codes = (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    else:
        packed = parts["weight_zero_point"].read()
        zero = unpack_words(packed, bits=bits, count=out_dim, axis=0).T
    index, full_group = read_groups(_written_index(parts), in_dim, groups, name="weight_g_idx")
    scale = parts["weight_scale"].read().reshape(scale_shape).T
    return host_weight(
        codes,
        scale,
        bits=bits,
        dtype=scale.dtype,
        zero_point=zero,
        group_index=index,
        full_group=full_group,
    )


def unpack_int_quantized(parts: Parts, *, symmetric: bool) -> Quantized:
    """Reads one module of the format `int-quantized`, 8 bits.

    Args:
      parts: `weight` int8 `(out, in)`, `weight_scale` `(out, groups)`, `(out, 1)` or `(1,)`; where
        not symmetric, `weight_zero_point` int8 of the scale's shape.
      symmetric: Whether there are no zero points.

    Returns:
      A weight of shape `(out, in)`.

    Raises:
      ValueError: If a part is missing, of another dtype or shape.
    """
    check_parts(parts, {"weight": (_INT8, (None, None))})
    out_dim, in_dim = parts["weight"].shape
    scale_shape = _scale_shape(parts, out_dim)
    if in_dim % scale_shape[1]:
        raise ValueError(f"{in_dim} inputs are no {scale_shape[1]} equal groups")
    codes, zero = parts["weight"].read().T, None
    if not symmetric:
        check_parts(parts, {"weight_zero_point": (_INT8, parts["weight_scale"].shape)})
        zero = parts["weight_zero_point"].read().reshape(scale_shape).T.astype(np.int16) + 128
        codes = (codes.astype(np.int16) + 128).astype(np.uint8)
    scale = parts["weight_scale"].read().reshape(scale_shape).T
    return host_weight(codes, scale, bits=8, dtype=scale.dtype, zero_point=zero)


def _scale_shape(parts: Parts, out_dim: int) -> tuple[int, int]:
    """`(out, groups)`, or `(1, 1)` for one scale."""
    part = parts.get("weight_scale")
    if part is not None and part.shape in ((), (1,)):
        check_parts(parts, {"weight_scale": (FLOAT, part.shape)})
        return 1, 1
    check_parts(parts, {"weight_scale": (FLOAT, (out_dim, None))})
    assert part is not None
    if not part.shape[1]:
        raise ValueError("'weight_scale' is empty")
    return out_dim, part.shape[1]


def _written_index(parts: Parts) -> np.ndarray | None:
    if "weight_g_idx" not in parts:
        return None
    index = parts["weight_g_idx"].read()
    return None if np.all(index == -1) else index  # not filled in


def pack_pack_quantized(weight: Quantized) -> dict[str, LazyTensor]:
    """The tensors of a module of the format `pack-quantized`, made when they are written."""
    bits, in_dim, out_dim = weight.bits, weight.in_dim, weight.out_dim
    groups = weight.scale.shape[-2]
    parts = {
        "weight_packed": lazy(
            (out_dim, word_count(in_dim, bits)),
            np.int32,
            lambda: pack_words(unsigned_codes(weight).T, bits=bits, axis=1),
        ),
        "weight_scale": _written_scale(weight),
        "weight_shape": lazy((2,), np.int64, lambda: np.array([out_dim, in_dim])),
    }
    if weight.zero_point is not None:
        parts["weight_zero_point"] = lazy(
            (word_count(out_dim, bits), groups),
            np.int32,
            lambda: pack_words(per_output(weight.zero_point, weight).T, bits=bits, axis=0),
        )
    if weight.group_index is not None:
        parts["weight_g_idx"] = lazy((in_dim,), np.int32, lambda: written_group_index(weight))
    return parts


def pack_int_quantized(weight: Quantized) -> dict[str, LazyTensor]:
    """The tensors of a module of the format `int-quantized`, made when they are written."""
    signed = lambda x: (x.astype(np.int16) - 128).astype(np.int8)  # noqa: E731
    parts = {
        "weight": lazy(
            (weight.out_dim, weight.in_dim), np.int8, lambda: signed(unsigned_codes(weight).T)
        ),
        "weight_scale": _written_scale(weight),
    }
    if weight.zero_point is not None:
        parts["weight_zero_point"] = lazy(
            parts["weight_scale"].shape,
            np.int8,
            lambda: signed(per_output(weight.zero_point, weight).T),
        )
    return parts


def _written_scale(weight: Quantized) -> LazyTensor:
    if scales_tensor(weight):
        return lazy((1,), weight.scale.dtype, lambda: np.asarray(weight.scale).reshape(1))
    shape = (weight.out_dim, weight.scale.shape[-2])
    return lazy(shape, weight.scale.dtype, lambda: per_output(weight.scale, weight).T)


def scales_tensor(weight: Quantized) -> bool:
    """Whether one scale serves the whole tensor and is written as one."""
    return weight.scale.shape[-2:] == (1, 1) and weight.zero_point is None


def unfit_compressed_tensors(weight: Quantized) -> list[str]:
    """Why a weight cannot be written as compressed-tensors integers, if it cannot."""
    problems = unfit_groups(weight)
    if weight.full_group:  # and scattered: `in_equal_groups` knows no smaller groups then
        problems.append(
            f"has scattered groups of {weight.full_group} inputs of which the last is shorter, and "
            "readers of compressed-tensors want groups of one size. Quantize without act-order or "
            "with static groups, or write GPTQ"
        )
    if np.dtype(weight.scale.dtype) not in FLOAT:
        problems.append(f"has scales of dtype {weight.scale.dtype}. Cast them to float32")
    return problems
