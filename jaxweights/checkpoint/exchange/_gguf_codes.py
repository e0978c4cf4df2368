"""GGUF's blocks as integers, scales and offsets, and back, bit for bit.

The layouts are those of ggml's `ggml-common.h`; `checkpoint._gguf_blocks` reads the same blocks as
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxweights.checkpoint._gguf_blocks import (
    five_bits,
    k_scales_and_minima,
    nibbles,
    q3_k_scales,
    two_bits,
)
from jaxweights.checkpoint.exchange._module import (
    beyond_float16,
    host_weight,
    in_equal_groups,
    unpacked_codes,
)
from jaxweights.weights._quantized import Quantized


class Blocks(NamedTuple):
    """Blocks taken apart: runs of a block share a scale."""

    codes: np.ndarray  # (blocks, values), uint8 where there are offsets, else int8
    scale: np.ndarray  # (blocks, runs), as stored where a block has one, else float32
    offset: np.ndarray | None  # like scale


def _half(data: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(data[:, start : start + 2]).view("<f2")


def _float(data: np.ndarray, start: int) -> np.ndarray:
    return _half(data, start).astype(np.float32)


def _codes(data: np.ndarray, values: int, dtype: type) -> np.ndarray:
    return np.empty((len(data), values), dtype)


def _split_q4_0(data: np.ndarray) -> Blocks:
    codes = _codes(data, 32, np.int8)
    nibbles(data[:, 2:], codes)
    return Blocks(codes - np.int8(8), _half(data, 0), None)


def _split_q4_1(data: np.ndarray) -> Blocks:
    codes = _codes(data, 32, np.uint8)
    nibbles(data[:, 4:], codes)
    return Blocks(codes, _half(data, 0), _half(data, 2))


def _split_q5_0(data: np.ndarray) -> Blocks:
    codes = _codes(data, 32, np.uint8)
    five_bits(data[:, 2:6], data[:, 6:], codes)
    return Blocks(codes.astype(np.int8) - np.int8(16), _half(data, 0), None)


def _split_q5_1(data: np.ndarray) -> Blocks:
    codes = _codes(data, 32, np.uint8)
    five_bits(data[:, 4:8], data[:, 8:], codes)
    return Blocks(codes, _half(data, 0), _half(data, 2))


def _split_q8_0(data: np.ndarray) -> Blocks:
    return Blocks(data[:, 2:].view(np.int8), _half(data, 0), None)


# A sub-scale has at most 8 bits and float16 eleven, so products with it are exact in float32, and
# so are theirs with codes.


def _split_q2_k(data: np.ndarray) -> Blocks:
    scales = data[:, :16]
    scale = _float(data, 80) * (scales & 0x0F)
    return Blocks(two_bits(data[:, 16:80]), scale, -(_float(data, 82) * (scales >> 4)))


def _split_q3_k(data: np.ndarray) -> Blocks:
    mask = data[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = two_bits(data[:, 32:96]).astype(np.int8)
    codes -= ((mask.reshape(-1, 256) ^ 1) * np.uint8(4)).astype(np.int8)
    return Blocks(codes, _float(data, 108) * q3_k_scales(data[:, 96:108]), None)


def _k_affine(codes: np.ndarray, data: np.ndarray) -> Blocks:
    scales, minima = k_scales_and_minima(data[:, 4:16])
    return Blocks(codes, _float(data, 0) * scales, -(_float(data, 2) * minima))


def _split_q4_k(data: np.ndarray) -> Blocks:
    codes = _codes(data, 256, np.uint8)
    nibbles(data[:, 16:].reshape(-1, 4, 32), codes.reshape(-1, 4, 64))
    return _k_affine(codes, data)


def _split_q5_k(data: np.ndarray) -> Blocks:
    codes = _codes(data, 256, np.uint8)
    nibbles(data[:, 48:].reshape(-1, 4, 32), codes.reshape(-1, 4, 64))
    high = data[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes += high.reshape(-1, 256) << 4
    return _k_affine(codes, data)


def _split_q6_k(data: np.ndarray) -> Blocks:
    codes = _codes(data, 256, np.uint8)
    halves = codes.reshape(-1, 2, 128)
    nibbles(data[:, :128].reshape(-1, 2, 64), halves)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = data[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    halves += high.reshape(-1, 2, 128) << 4
    scale = _float(data, 208) * data[:, 192:208].view(np.int8)
    return Blocks(codes.astype(np.int8) - np.int8(32), scale, None)


_SPLIT: dict[str, tuple[int, Callable[[np.ndarray], Blocks]]] = {  # bits, and how
    "Q4_0": (4, _split_q4_0),
    "Q4_1": (4, _split_q4_1),
    "Q5_0": (5, _split_q5_0),
    "Q5_1": (5, _split_q5_1),
    "Q8_0": (8, _split_q8_0),
    "Q2_K": (2, _split_q2_k),
    "Q3_K": (3, _split_q3_k),
    "Q4_K": (4, _split_q4_k),
    "Q5_K": (5, _split_q5_k),
    "Q6_K": (6, _split_q6_k),
}
INTEGER_TYPES = tuple(_SPLIT)


def unpack_gguf(kind: str, data: np.ndarray, shape: tuple[int, int]) -> Quantized:
    """Reads a tensor of blocks of integers.

    Args:
      kind: One of `INTEGER_TYPES`.
      data: Its blocks, `(blocks, bytes of a block)` uint8.
      shape: Of the tensor, `(out, in)`.

    Returns:
      A weight of that shape which stands for the numbers that ggml computes, to the last bit.
      Q4_1, Q5_1, Q2_K, Q4_K and Q5_K have offsets. The two levels of scales that K types have are
      multiplied out, exactly.
    """
    bits, split = _SPLIT[kind]
    blocks = split(data)
    out_dim, in_dim = shape
    by_input = lambda x: np.ascontiguousarray(x.reshape(out_dim, -1).T)  # noqa: E731
    return host_weight(
        blocks.codes.reshape(out_dim, in_dim).T,
        by_input(blocks.scale),
        bits=bits,
        dtype=np.float32,
        offset=None if blocks.offset is None else by_input(blocks.offset),
    )


def _join_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] & 0x0F | codes[:, 16:] << 4


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def join_blocks(kind: str, codes: np.ndarray, scale: np.ndarray, offset: np.ndarray | None):
    """The inverse of reading: Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 blocks of 32.

    Args:
      kind: Which.
      codes: `(blocks, 32)`, signed for `_0`, unsigned for `_1`.
      scale: `(blocks, 1)` float16.
      offset: `(blocks, 1)` float16 for `_1`, else None.

    Returns:
      `(blocks, bytes)` uint8.
    """
    head = [scale.astype("<f2").view(np.uint8)]
    if offset is not None:
        head.append(offset.astype("<f2").view(np.uint8))
    if kind == "Q8_0":
        return np.concatenate([*head, codes.astype(np.int8).view(np.uint8)], axis=1)
    shift = {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)
    unsigned = (codes.astype(np.int16) + shift).astype(np.uint8)
    if kind.startswith("Q5"):
        head.append(_fifth_bits(unsigned))
        unsigned &= np.uint8(0x0F)
    return np.concatenate([*head, _join_nibbles(unsigned)], axis=1)


def gguf_type(weight: Quantized) -> str:
    """The narrowest block type that holds a weight's codes as they are.

    Codes with zero points are centred first, which takes one bit more.
    """
    if weight.offset is not None:
        return "Q4_1" if weight.bits <= 4 else "Q5_1"
    bits = weight.bits + (weight.zero_point is not None)
    return "Q4_0" if bits <= 4 else "Q5_0" if bits <= 5 else "Q8_0"


def pack_gguf(weight: Quantized) -> np.ndarray:
    """The blocks of a weight for which `unfit_gguf` has nothing to say, `(blocks, bytes)`.

    Example:
      >>> import jax.numpy as jnp
      >>> weight = Quantized.from_codes(jnp.full((32, 1), -3), jnp.ones((1, 1)), bits=4)
      >>> pack_gguf(weight)[0, :3].tolist()  # 1.0 in float16, and two codes of 8 - 3
      [0, 60, 85]
    """
    weight = in_equal_groups(weight)
    runs = weight.in_dim // 32
    codes = unpacked_codes(weight)
    if weight.zero_point is not None:
        codes = codes.astype(np.int16) - _spread(weight.zero_point, weight, weight.in_dim)
    scale = _spread(weight.scale, weight, runs).astype(np.float16)
    offset = None
    if weight.offset is not None:
        offset = _spread(weight.offset, weight, runs).astype(np.float16).T.reshape(-1, 1)
    blocks = np.ascontiguousarray(codes.T).reshape(-1, 32)
    return join_blocks(gguf_type(weight), blocks, scale.T.reshape(-1, 1), offset)


def _spread(field: object, weight: Quantized, rows: int) -> np.ndarray:
    """A field for every so many inputs and every output, `(rows, out)`."""
    field = np.asarray(field)
    if field.dtype.kind == "u":
        field = field.astype(np.int16)
    field = np.repeat(field, rows // field.shape[0], axis=0)
    return np.repeat(field, weight.out_dim // field.shape[1], axis=1)


def unfit_gguf(weight: Quantized) -> list[str]:
    """Why a weight cannot be written as GGUF's blocks of 32, if it cannot."""
    weight, problems = in_equal_groups(weight), []
    rows = weight.scale.shape[-2]
    if weight.in_dim % 32:
        problems.append(
            f"has {weight.in_dim} inputs, which blocks of 32 do not divide. Dequantize it with "
            "`materialize`, or leave it out with `partition`"
        )
    elif (weight.in_dim // rows) % 32:
        problems.append(
            f"has groups of {weight.in_dim // rows} inputs, but GGUF's blocks have 32. Quantize "
            "with a group_size that is a multiple of 32"
        )
    if weight.group_index is not None:
        problems.append(
            "has groups in another order than its inputs, which GGUF cannot say. Quantize without "
            "act-order"
        )
    if weight.offset is not None and weight.bits > 5:
        problems.append(f"has offsets and {weight.bits} bits, but Q4_1 and Q5_1 hold at most 5")
    if not problems and weight.zero_point is not None and gguf_type(weight) == "Q8_0":
        codes = unpacked_codes(weight).astype(np.int16)
        centred = codes - _spread(weight.zero_point, weight, weight.in_dim)
        if centred.min() < -128 or centred.max() > 127:
            problems.append(
                f"has codes from {centred.min()} to {centred.max()} around its zero points, but "
                "Q8_0 holds -128 to 127. Quantize on a symmetric grid"
            )
    remedy = "Set what is so small to 0, dequantize it with `materialize`, or leave it out"
    if lost := beyond_float16(weight.scale):
        problems.append(f"has {lost}, in which GGUF holds scales. {remedy} with `partition`")
    if weight.offset is not None and (
        lost := beyond_float16(weight.offset, word="offsets", may_vanish=True)
    ):
        problems.append(f"has {lost}, in which GGUF holds offsets. {remedy} with `partition`")
    return problems
