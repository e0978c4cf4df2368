"""Scales that are quantized themselves: 8-bit codes about their mean."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxweights.quantize._blocks import block_max, in_units
from jaxweights.quantize._levels import nearest_code
from jaxweights.quantize._stored_scale import stored_scale
from jaxweights.weights._codebook import Codebook

_BLOCK = 256


def dynamic_levels() -> np.ndarray:
    """The 256 levels of bitsandbytes' 8-bit "dynamic" float, ascending from -0.993 to 1.

    Seven decades below 1, each with twice as many levels as the one before: the midpoints of evenly
    spaced intervals. 0 and 1 besides.

    Example:
      >>> levels = dynamic_levels()
      >>> len(levels), float(levels[127]), float(levels[-1])
      (256, 0.0, 1.0)
    """
    positive = []
    for decade in range(7):
        edges = _evenly_spaced(2**decade)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (decade - 6)) * middles)
    positive = np.concatenate(positive)
    return np.sort(np.concatenate([-positive, [0], positive, [1]])).astype(np.float32)


def quantize_scales(scale: Float[Array, "rows cols"]) -> Codebook:
    """Scales as 8-bit codes about their mean, in blocks of up to 256.

    Blocks run along the input axis first, as bitsandbytes' do where their ends coincide with the
    ends of outputs; otherwise they are the largest smaller ones that tile the scales.

    Args:
      scale: `(rows, cols)`, float32.

    Returns:
      The scales, `(rows, cols)`: 8 bits each, and 32 for every block.

    Example:
      >>> quantized = quantize_scales(jnp.array([[1.0, 3.0]]))
      >>> quantized.codes.tolist(), quantized.scale.tolist(), quantized.offset.tolist()
      ([[0, 255]], [[1.0]], [[2.0]])
    """
    rows, cols = scale.shape
    tall = _largest_divisor(rows, _BLOCK)
    wide = _largest_divisor(cols, _BLOCK // rows) if tall == rows and rows else 1
    counts = (rows // max(tall, 1), cols // max(wide, 1))
    mean = jnp.sum(scale, keepdims=True) / max(scale.size, 1)
    centred = scale - mean
    largest = stored_scale(block_max(centred, counts), jnp.float32)
    levels = dynamic_levels()
    codes = nearest_code(in_units(centred, largest), levels)
    return Codebook.from_codes(codes, jnp.asarray(levels), largest, mean, bits=8)


def _evenly_spaced(intervals: int) -> np.ndarray:
    """From 0.1 to 1 with the rounding of `torch.linspace`, so that the levels are the peers' bits.

    It counts from the nearer end, in float32 with one rounding of product and sum.
    """
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(intervals))
    i = np.arange(intervals + 1)
    rising, falling = first + step * i, last - step * (intervals - i)
    return np.where(i < (intervals + 1) // 2, rising, falling).astype(np.float32)


def _largest_divisor(length: int, limit: int) -> int:
    return max((d for d in range(1, min(length, limit) + 1) if length % d == 0), default=1)
