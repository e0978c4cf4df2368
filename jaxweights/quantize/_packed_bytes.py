"""packed_bytes: what a weight takes where its codes are stored without gaps."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxweights.core._plan import leaf_bytes
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._weight import is_weight


def packed_bytes(leaf: Any) -> int:
    """Bytes of a leaf in a file that stores every code in exactly its bits.

    Codes of 3, 5, 6 and 7 bits take 4 or 8 bits each in `Quantized` and `Codebook`, which keep the
    rows that share a byte whole, and zero points a byte; GPTQ and compressed-tensors files pack
    both in their own bits. All other arrays, scales among them, count as they are.

    Args:
      leaf: Array, abstract array or represented weight, however deeply nested.

    Returns:
      The bytes, rounded up for each leaf.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> rounded = jw.quantize.round_to_nearest(bits=3, group_size=64)
      >>> weight = jw.apply(rounded, {"kernel": jnp.ones((64, 8))})["kernel"]
      >>> weight.nbytes, packed_bytes(weight)
      (288, 224)
    """
    if not is_weight(leaf):
        return leaf_bytes(leaf)
    fields = {
        field.name: getattr(leaf, field.name)
        for field in dataclasses.fields(leaf)
        if not field.metadata.get("static")
    }
    packed = 0
    if isinstance(leaf, Quantized | Codebook):
        del fields["codes"]
        zeros = fields.pop("zero_point", None)
        integers = leaf.size + (0 if zeros is None else zeros.size)
        packed = -(-integers * leaf.bits // 8)
    return packed + sum(packed_bytes(field) for field in fields.values() if field is not None)
