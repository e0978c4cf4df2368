"""quantize_kv: keys and values of attention in few bits."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxweights.quantize._fp8_kv import Fp8KV, dequantize_fp8_kv
from jaxweights.quantize._settings import check_between, check_count, check_float_dtype
from jaxweights.weights._divide import divide
from jaxweights.weights._packed_codes import codes_per_byte, pack_codes, unpack_codes

_NAME = "quantize.quantize_kv"


class Blocks(NamedTuple):
    """Unsigned codes of activations, with a step and a smallest value for each group.

    Attributes:
      codes: uint8; two or four narrow ones share a byte along the grouped axis.
      scale: Step of each group; the grouped axis has one entry a group.
      low: Value of code 0, like `scale`.
    """

    codes: jax.Array
    scale: jax.Array
    low: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKV:
    """Keys and values of `quantize_kv`; every array has the tokens along axis -2, in groups or not.

    Args:
      keys: Grouped along tokens: `(..., tokens / g, head_dim)` scales.
      values: Grouped along channels: `(..., tokens, head_dim / g)` scales.
      codes_per_byte: 1, 2, 4 or 8.
    """

    keys: Blocks
    values: Blocks
    codes_per_byte: int = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))


def quantize_kv(
    keys: Float[Array, "*batch tokens head_dim"],
    values: Float[Array, "*batch tokens head_dim"],
    *,
    bits: int = 2,
    group_size: int = 32,
    scale_dtype: DTypeLike | None = None,
) -> QuantizedKV:
    r"""Rounds keys channel by channel and values token by token.

    Keys have channels that are large for every token, so a group is `group_size` tokens of one
    channel; values have none, so a group is `group_size` channels of one token. Codes are
    :math:`\mathrm{round}((x - \min) / s)` with :math:`s = (\max - \min) / (2^b - 1)`. Shapes are
    static: keep the newest tokens in floats until they fill a group, then write them with
    `update_kv` into a cache of the full length, made by quantizing zeros.

    Args:
      keys: After rotation, if the model rotates them.
      values: With as many tokens.
      bits: Bits per code, 1 to 8.
      group_size: Tokens, or channels, that share a step; divides both lengths.
      scale_dtype: Dtype of steps and smallest values; None takes that of `keys`.

    Returns:
      The codes.

    Raises:
      ValueError: If a setting is out of range or a group does not fit.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (8, 64, 32))  # 8 heads, 64 tokens
      >>> small = quantize_kv(x, x, bits=4, scale_dtype=jnp.float16)
      >>> small.nbytes / (2 * x.nbytes)
      0.15625
      >>> bool(jnp.abs(dequantize_kv(small)[0] - x).max() < 0.3)
      True

    Source: Liu et al. 2024, arXiv:2402.02750, section 3.
    """
    bits = check_between(_NAME, "bits", bits, 1, 8)
    check_count(_NAME, "group_size", group_size)
    if scale_dtype is not None:
        check_float_dtype(_NAME, scale_dtype=scale_dtype)
    if keys.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"{_NAME}: keys have shape {keys.shape} and values {values.shape}. All but the last "
            "axis must be equal."
        )
    for name, length in (("tokens", keys.shape[-2]), ("channels of values", values.shape[-1])):
        if length % group_size:
            raise ValueError(
                f"{_NAME}: group_size={group_size} does not divide the {length} {name}. Choose a "
                "divisor; the newest tokens may wait in floats until they fill a group."
            )
    dtype = jnp.dtype(keys.dtype if scale_dtype is None else scale_dtype)
    turned = _quantize(jnp.swapaxes(values, -1, -2), bits, group_size, dtype)
    per_byte = codes_per_byte(bits, group_size)
    return QuantizedKV(_quantize(keys, bits, group_size, dtype), _turn(turned), per_byte)


def dequantize_kv(
    quantized: QuantizedKV | Fp8KV, *, dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "*batch tokens head_dim"], Float[Array, "*batch tokens head_dim"]]:
    """The keys and values that codes stand for.

    Args:
      quantized: Of `quantize_kv` or `fp8_kv`.
      dtype: Dtype of the result.

    Returns:
      Keys and values.

    Example:
      >>> x = jnp.arange(4.0).reshape(2, 2)
      >>> dequantize_kv(quantize_kv(x, x, group_size=2))[1].tolist()
      [[0.0, 1.0], [2.0, 3.0]]
    """
    if isinstance(quantized, Fp8KV):
        return dequantize_fp8_kv(quantized, dtype)
    keys = _dequantize(quantized.keys, quantized.codes_per_byte)
    turned = _dequantize(_turn(quantized.values), quantized.codes_per_byte)
    return keys.astype(dtype), jnp.swapaxes(turned, -1, -2).astype(dtype)


def update_kv(cache: QuantizedKV, new: QuantizedKV, start: int | jax.Array) -> QuantizedKV:
    """Writes the tokens of one cache into a longer one.

    Args:
      cache: The longer one.
      new: Of the same settings, with fewer tokens.
      start: Token to begin at, maybe traced; a multiple of the group size.

    Returns:
      The longer one, overwritten from `start` on.

    Raises:
      ValueError: If the two were quantized with different settings.

    Example:
      >>> cache = quantize_kv(jnp.zeros((4, 2)), jnp.zeros((4, 2)), group_size=2)
      >>> new = quantize_kv(jnp.ones((2, 2)), jnp.ones((2, 2)), group_size=2)
      >>> dequantize_kv(update_kv(cache, new, 2))[0][:, 0].tolist()
      [0.0, 0.0, 1.0, 1.0]
    """
    tokens = new.values.scale.shape[-2]
    sizes = [kv.values.codes.shape[-2] // kv.keys.scale.shape[-2] for kv in (cache, new)]
    if sizes[0] != sizes[1] or cache.codes_per_byte != new.codes_per_byte:
        raise ValueError(
            f"quantize.update_kv: the cache has groups of {sizes[0]} tokens and "
            f"{cache.codes_per_byte} codes a byte, the new tokens {sizes[1]} and "
            f"{new.codes_per_byte}. Quantize both with the same bits and group_size."
        )

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        # Where a group, or a byte, holds several tokens, it starts that much earlier.
        at = jnp.asarray(start, jnp.int32) * part.shape[-2] // tokens
        return jax.lax.dynamic_update_slice_in_dim(whole, part, at, axis=-2)

    return jax.tree.map(write, cache, new)


def _turn(blocks: Blocks) -> Blocks:
    """Exchanges tokens and channels."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), blocks)


def _quantize(x: jax.Array, bits: int, group_size: int, dtype: jnp.dtype) -> Blocks:
    """Codes of `(..., n, m)` activations, grouped along axis -2."""
    *batch, length, width = x.shape
    groups = x.astype(jnp.float32).reshape(*batch, length // group_size, group_size, width)
    # Codes are chosen for the numbers that are stored, so those are rounded first.
    low = jnp.min(groups, axis=-2, keepdims=True).astype(dtype).astype(jnp.float32)
    high = jnp.max(groups, axis=-2, keepdims=True)
    scale = divide(high - low, 2**bits - 1).astype(dtype).astype(jnp.float32)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    codes = jnp.clip(jnp.round(divide(groups - low, scale)), 0, 2**bits - 1)
    per_byte = codes_per_byte(bits, group_size)
    packed = pack_codes(codes.astype(jnp.int32).reshape(x.shape), per_byte, signed=False)
    return Blocks(packed, scale.squeeze(-2).astype(dtype), low.squeeze(-2).astype(dtype))


def _dequantize(blocks: Blocks, per_byte: int) -> jax.Array:
    codes = unpack_codes(blocks.codes, per_byte, signed=False).astype(jnp.float32)
    *batch, groups, width = blocks.scale.shape
    split = codes.reshape(*batch, groups, -1, width)
    scale, low = (x.astype(jnp.float32)[..., :, None, :] for x in (blocks.scale, blocks.low))
    return (split * scale + low).reshape(codes.shape)
