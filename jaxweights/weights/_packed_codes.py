"""Several narrow codes in a byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def codes_per_byte(bits: int, in_dim: int) -> int:
    """How many codes of consecutive rows share a byte: 8, 4, 2 or 1."""
    if bits == 1 and in_dim % 8 == 0:
        return 8
    if bits <= 2 and in_dim % 4 == 0:
        return 4
    return 2 if bits <= 4 and in_dim % 2 == 0 else 1


def pack_codes(codes: jax.Array, per_byte: int, *, signed: bool) -> jax.Array:
    """Puts `per_byte` consecutive rows of `(*stack, in, out)` codes into each byte.

    Args:
      codes: Integers that fit into `8 / per_byte` bits.
      per_byte: 1, 2, 4 or 8; divides `in`.
      signed: Whether codes may be negative.

    Returns:
      `(*stack, in / per_byte, out)`, uint8, or int8 where a signed code fills the byte.

    Example:
      >>> pack_codes(jnp.array([[1], [-1]]), 2, signed=True)
      Array([[241]], dtype=uint8)
    """
    if per_byte == 1:
        return codes.astype(jnp.int8 if signed else jnp.uint8)
    *stack, in_dim, out_dim = codes.shape
    share = 8 // per_byte
    rows = codes.reshape(*stack, in_dim // per_byte, per_byte, out_dim)
    # In int32: shifting int8 left is not safe on every backend, and narrowing once is cheaper.
    packed = jnp.zeros([], jnp.int32)
    for i in range(per_byte):
        field = rows[..., i, :].astype(jnp.int32) & jnp.int32(2**share - 1)
        packed = field if i == 0 else packed | (field << jnp.int32(share * i))
    return packed.astype(jnp.uint8)


def unpack_codes(packed: jax.Array, per_byte: int, *, signed: bool) -> jax.Array:
    """The inverse of `pack_codes`: `(*stack, in, out)`, int8 where signed, else uint8.

    Example:
      >>> unpack_codes(jnp.array([[241]], jnp.uint8), 2, signed=True).tolist()
      [[1], [-1]]
    """
    if per_byte == 1:
        return packed
    *stack, rows, out_dim = packed.shape
    share = 8 // per_byte
    shifts = np.arange(0, 8, share, dtype=np.uint8).reshape((1,) * (len(stack) + 1) + (-1, 1))
    fields = (packed[..., :, None, :] >> shifts) & jnp.uint8(2**share - 1)
    codes = fields.reshape(*stack, rows * per_byte, out_dim)
    if not signed:
        return codes
    # Two's complement of `share` bits: flipping the sign bit and subtracting it extends it.
    sign = 2 ** (share - 1)
    return (codes ^ jnp.uint8(sign)).astype(jnp.int8) - jnp.int8(sign)
