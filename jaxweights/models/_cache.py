"""Keys and values of the tokens that a decoder has read."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.models._llama_config import LlamaConfig


class KVCache(NamedTuple):
    """What decoding keeps of the tokens read so far; slots are filled in the order of reading.

    Attributes:
      key: `(layers, batch, slots, kv_heads, head_dim)`, already rotated.
      value: As `key`.
      positions: Position of the token in each slot, `(batch, slots)`, int32.
      valid: Whether a slot holds a token and not padding, `(batch, slots)`, bool.
      length: Slots filled, the same for the whole batch, `()`, int32.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    valid: jax.Array
    length: jax.Array


def init_cache(
    config: LlamaConfig, batch_size: int, slots: int, *, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """An empty cache.

    Args:
      config: Of the decoder.
      batch_size: Sequences decoded together.
      slots: Most tokens the cache will hold, prompt included.
      dtype: Of keys and values; the decoder's compute dtype.

    Returns:
      A cache of length 0. Give it to the decoder, which returns it filled.

    Example:
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4
      ... )
      >>> init_cache(config, 1, 10).key.shape
      (2, 1, 10, 4, 16)
    """
    shape = (config.num_layers, batch_size, slots, config.num_kv_heads, config.head_dim)
    return KVCache(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        positions=jnp.zeros((batch_size, slots), jnp.int32),
        valid=jnp.zeros((batch_size, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


def advance(cache: KVCache, positions: jax.Array, valid: jax.Array) -> KVCache:
    """Notes position and validity of tokens to be read, `(batch, time)`; fills no keys yet."""
    start = (0, cache.length)
    return cache._replace(
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
        valid=jax.lax.dynamic_update_slice(cache.valid, valid, start),
        length=cache.length + positions.shape[1],
    )


def write_layer(stacked: jax.Array, new: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
    """Writes the new keys or values of one layer, `(batch, time, kv_heads, head_dim)`, in place."""
    zero = jnp.zeros((), jnp.int32)
    start = (layer, zero, slot, zero, zero)
    return jax.lax.dynamic_update_slice(stacked, new[None].astype(stacked.dtype), start)
