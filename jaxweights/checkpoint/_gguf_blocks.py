"""The block formats of GGUF: how many bytes a block takes and which float32 values it stands for.

Every decoder fills `out`, `(blocks, values)` float32, from `data`, `(blocks, bytes)` uint8. Layouts
are those of ggml's `ggml-common.h`; products are formed in the order of its reference code, so
that results are equal to the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

# A chunk's codes and values stay in the processor's cache between the passes over them.
_CHUNK_VALUES = 1 << 17


@dataclasses.dataclass(frozen=True)
class BlockType:
    """One storage type of GGUF.

    Args:
      name: What ggml calls it.
      values: Values in a block, along the last axis of the tensor.
      nbytes: Bytes in a block.
      decode: Fills float32 values from a block's bytes; None for plain numbers.
      dtype: What plain numbers are; None for blocks.
    """

    name: str
    values: int
    nbytes: int
    decode: Callable[[np.ndarray, np.ndarray], None] | None = None
    dtype: np.dtype | None = None


def dequantize(block_type: BlockType, data: np.ndarray) -> np.ndarray:
    """Decodes blocks.

    Args:
      block_type: Their type, which has a decoder.
      data: `(blocks, bytes)` uint8.

    Returns:
      `(blocks, values)` float32.
    """
    assert block_type.decode is not None, "plain numbers need no decoding"
    out = np.empty((len(data), block_type.values), np.float32)
    step = max(1, _CHUNK_VALUES // block_type.values)
    # Infinite scales are the file's; looking for NaN is the business of whoever uses the values.
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(0, len(data), step):
            block_type.decode(data[i : i + step], out[i : i + step])
    return out


def _half(data: np.ndarray, start: int) -> np.ndarray:
    """Float16 at byte `start` of every block, as `(blocks, 1)` float32."""
    return np.ascontiguousarray(data[:, start : start + 2]).view("<f2").astype(np.float32)


def nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    """Low nibbles, then high nibbles, of `(..., n)` bytes into `(..., 2 n)` values."""
    n = packed.shape[-1]
    out[..., :n] = packed & 0x0F
    out[..., n:] = packed >> 4


def _q4_0(data: np.ndarray, out: np.ndarray) -> None:
    nibbles(data[:, 2:], out)
    out -= 8
    out *= _half(data, 0)


def _q4_1(data: np.ndarray, out: np.ndarray) -> None:
    nibbles(data[:, 4:], out)
    out *= _half(data, 0)
    out += _half(data, 2)


def five_bits(high: np.ndarray, packed: np.ndarray, out: np.ndarray) -> None:
    """Nibbles whose fifth bits are the bits of `high`, `(blocks, 4)`, lowest first."""
    nibbles(packed, out)
    out += np.unpackbits(high, axis=1, bitorder="little") * np.uint8(16)


def _q5_0(data: np.ndarray, out: np.ndarray) -> None:
    five_bits(data[:, 2:6], data[:, 6:], out)
    out -= 16
    out *= _half(data, 0)


def _q5_1(data: np.ndarray, out: np.ndarray) -> None:
    five_bits(data[:, 4:8], data[:, 8:], out)
    out *= _half(data, 0)
    out += _half(data, 2)


def _q8_0(data: np.ndarray, out: np.ndarray) -> None:
    np.multiply(data[:, 2:].view(np.int8), _half(data, 0), out=out)


def two_bits(packed: np.ndarray) -> np.ndarray:
    """Values of 64 bytes, each byte holding four that lie 32 apart: `(blocks, 256)` uint8."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)


def _in_runs(out: np.ndarray, length: int) -> np.ndarray:
    """Runs that share a scale: `(blocks, runs, length)`, the same memory as `out`."""
    return out.reshape(len(out), -1, length)


def _q2_k(data: np.ndarray, out: np.ndarray) -> None:
    scales = data[:, :16]
    out[:] = two_bits(data[:, 16:80])
    runs = _in_runs(out, 16)
    runs *= (_half(data, 80) * (scales & 0x0F))[:, :, None]
    runs -= (_half(data, 82) * (scales >> 4))[:, :, None]


def q3_k_scales(packed: np.ndarray) -> np.ndarray:
    """Sixteen scales of six bits: low nibbles of 8 bytes, their high nibbles, then the top bits."""
    low = np.concatenate([packed[:, :8] & 0x0F, packed[:, :8] >> 4], axis=1)
    high = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return (low | high.reshape(-1, 16) << 4).astype(np.int8) - np.int8(32)


def _q3_k(data: np.ndarray, out: np.ndarray) -> None:
    scales = q3_k_scales(data[:, 96:108])
    out[:] = two_bits(data[:, 32:96])
    # Bit b of mask byte i belongs to value 32 b + i; where it is clear, 4 is subtracted.
    mask = data[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    out -= (mask.reshape(-1, 256) ^ 1) * np.uint8(4)
    runs = _in_runs(out, 16)
    runs *= (_half(data, 108) * scales)[:, :, None]


def k_scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits each, out of twelve bytes."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 0x3F, c & 0x0F | a >> 2 & 0x30], axis=1)
    minima = np.concatenate([b & 0x3F, c >> 4 | b >> 2 & 0x30], axis=1)
    return scales, minima


def _scale_runs_of_32(data: np.ndarray, out: np.ndarray) -> None:
    scales, minima = k_scales_and_minima(data[:, 4:16])
    runs = _in_runs(out, 32)
    runs *= (_half(data, 0) * scales)[:, :, None]
    runs -= (_half(data, 2) * minima)[:, :, None]


def _q4_k(data: np.ndarray, out: np.ndarray) -> None:
    nibbles(data[:, 16:].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    _scale_runs_of_32(data, out)


def _q5_k(data: np.ndarray, out: np.ndarray) -> None:
    nibbles(data[:, 48:].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    # Bit b of byte i is the fifth bit of value 32 b + i.
    high = data[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    out += high.reshape(-1, 256) << 4
    _scale_runs_of_32(data, out)


def _q6_k(data: np.ndarray, out: np.ndarray) -> None:
    halves = out.reshape(-1, 2, 128)
    nibbles(data[:, :128].reshape(-1, 2, 64), halves)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = data[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    halves += high.reshape(-1, 2, 128) << 4
    out -= 32
    runs = _in_runs(out, 16)
    runs *= (_half(data, 208) * data[:, 192:208].view(np.int8))[:, :, None]


def _q8_k(data: np.ndarray, out: np.ndarray) -> None:
    scale = np.ascontiguousarray(data[:, :4]).view("<f4")
    np.multiply(data[:, 4:260].view(np.int8), scale, out=out)


# The sixteen levels of the non-linear four-bit types, `kvalues_iq4nl` in ggml.
_IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def _levels(packed: np.ndarray, levels: np.ndarray, out: np.ndarray) -> None:
    """Entries of a table of sixteen, by low nibbles and then by high nibbles."""
    n = packed.shape[-1]
    out[..., :n] = levels[packed & 0x0F]
    out[..., n:] = levels[packed >> 4]


def _iq4_nl(data: np.ndarray, out: np.ndarray) -> None:
    _levels(data[:, 2:], _IQ4_LEVELS, out)
    out *= _half(data, 0)


def _iq4_xs(data: np.ndarray, out: np.ndarray) -> None:
    runs = _in_runs(out, 32)
    _levels(data[:, 8:].reshape(-1, 8, 16), _IQ4_LEVELS, runs)
    low = data[:, 4:8, None] >> np.array([0, 4], np.uint8) & 0x0F
    high = np.ascontiguousarray(data[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype="<u2") & 3
    scales = (low.reshape(-1, 8) | high << 4).astype(np.int16) - np.int16(32)
    runs *= (_half(data, 0) * scales)[:, :, None]


# E2M1's values doubled, so that they are whole; the block's scale is halved in turn.
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _mxfp4(data: np.ndarray, out: np.ndarray) -> None:
    _levels(data[:, 1:], _E2M1_DOUBLED, out)
    out *= np.ldexp(np.float32(1), data[:, :1].astype(np.int32) - 128)


def _plain(name: str, dtype: str) -> BlockType:
    numpy_dtype = np.dtype(dtype)
    return BlockType(name, 1, numpy_dtype.itemsize, dtype=numpy_dtype)


BLOCK_TYPES: dict[int, BlockType] = {
    0: _plain("F32", "<f4"),
    1: _plain("F16", "<f2"),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    15: BlockType("Q8_K", 256, 292, _q8_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    24: _plain("I8", "<i1"),
    25: _plain("I16", "<i2"),
    26: _plain("I32", "<i4"),
    27: _plain("I64", "<i8"),
    28: _plain("F64", "<f8"),
    30: BlockType("BF16", 1, 2, dtype=np.dtype(ml_dtypes.bfloat16)),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}

# Types that exist but are not read here, so that an error can call them by name.
OTHER_TYPES: dict[int, str] = {
    4: "Q4_2 (withdrawn)",
    5: "Q4_3 (withdrawn)",
    9: "Q8_1",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    31: "Q4_0_4_4 (withdrawn)",
    32: "Q4_0_4_8 (withdrawn)",
    33: "Q4_0_8_8 (withdrawn)",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}
