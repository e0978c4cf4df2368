"""The decoder of Llama, SmolLM2, Mistral, Qwen2, Qwen3 and OLMo 2, with layers stacked for scan."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.models._cache import KVCache, advance, write_layer
from jaxweights.models._layers import Linear, RMSNorm, Table, attention
from jaxweights.models._llama_config import LlamaConfig
from jaxweights.models._rope import rope_frequencies, rotary_angles, rotate


class Llama(nn.Module):
    """Predicts the next token of every prefix.

    Parameters: `embed/embedding` (vocab, hidden); `layers/...` with a leading layer axis:
    `attn/q|k|v|o/kernel`, `mlp/gate|up|down/kernel` (in, out), the norms' `scale`, the biases that
    the config asks for; `final_norm/scale`; `head/kernel` (hidden, vocab) unless tied.

    Attributes:
      config: Sizes and options.
      dtype: Dtype of activations; None takes the embedding's. Norms, softmax, rotations and
        logits are float32 in any case.
      param_dtype: Dtype that `init` gives the parameters.
      remat: Whether the backward pass computes a layer's activations again instead of keeping
        them.

    Example:
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4
      ... )
      >>> model = Llama(config)
      >>> tokens = jnp.zeros((1, 5), jnp.int32)
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> params["layers"]["attn"]["q"]["kernel"].shape
      (2, 64, 64)
      >>> model.apply({"params": params}, tokens).shape
      (1, 5, 256)

    Source: Touvron et al. 2023, arXiv:2302.13971; grouped queries and windows: Jiang et al. 2023,
      arXiv:2310.06825; biases: Yang et al. 2024, arXiv:2407.10671; norms behind the sublayers:
      OLMo et al. 2024, arXiv:2501.00656; norms of heads: Yang et al. 2025, arXiv:2505.09388.
    Differs: (1) norms and rotations are computed in float32 to their end, also under bfloat16.
      (2) a token outside the vocabulary gives NaN logits instead of an error.
    """

    config: LlamaConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        cache: KVCache | None = None,
        logits_at: jax.Array | None = None,
    ) -> Any:
        """Reads tokens and returns the scores of what may come next.

        Args:
          tokens: `(batch, time)`, integers.
          positions: `(batch, time)`, int32. None counts the real tokens of a row from the left,
            going on from the cache.
          attention_mask: True (or 1) for a token, False (or 0) for padding on either side,
            `(batch, time)`. What a row's padding yields has no meaning.
          cache: Tokens read earlier; these are appended. More tokens than the cache has slots
            left give NaN.
          logits_at: `(batch, k)`: the time steps whose logits are wanted; None gives all.

        Returns:
          Logits `(batch, time or k, vocab)`, float32; with a cache, the pair (logits, cache).
        """
        config = self.config
        if tokens.ndim != 2:
            raise ValueError(
                f"models.Llama: tokens have shape {tokens.shape}. They must be (batch, time): "
                "add a batch axis with tokens[None]."
            )
        valid = (
            jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        )
        if positions is None:
            positions = _count_positions(valid, cache)
        positions = jnp.broadcast_to(positions.astype(jnp.int32), tokens.shape)
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        if cache is not None:
            cache = advance(cache, positions, valid)

        embed = Table(config.vocab_size, config.hidden_size, self.param_dtype, name="embed")
        x = embed(tokens)
        x = x if self.dtype is None else x.astype(self.dtype)
        if cache is not None:  # an update beyond the last slot would silently land elsewhere
            x = jnp.where(cache.length <= cache.valid.shape[1], x, jnp.nan)

        x, keys, values = self._layers(x, positions, valid, cache, start)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, :, None], axis=1)
        x = RMSNorm(config.norm_eps, self.param_dtype, name="final_norm")(x)
        if config.tie_embeddings:
            logits = embed.attend(x)
        else:
            logits = _Head(config.vocab_size, self.param_dtype, name="head")(x)
        return logits if cache is None else (logits, cache._replace(key=keys, value=values))

    def _layers(self, x, positions, valid, cache, start):
        """Scans the stacked layers; the cache travels in the carry, so it is updated in place."""
        config = self.config
        near, far = _masks(config.sliding_window, positions, valid, cache, start)
        slides = config.sliding_layers or (config.sliding_window is not None,) * config.num_layers
        angles = rotary_angles(
            positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        )
        block = nn.remat(_Layer, prevent_cse=False) if self.remat else _Layer
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # type: ignore[arg-type]  # Flax declares an int
            length=config.num_layers,
            # The check costs a second trace of the layer.
            check_constancy_invariants=False,
        )(config, self.param_dtype, name="layers")
        layer = (np.arange(config.num_layers, dtype=np.int32), np.asarray(slides))
        keys, values = (None, None) if cache is None else (cache.key, cache.value)
        carry, _ = scanned((x, keys, values), layer, (angles, near, far, start))
        return carry


class _Layer(nn.Module):
    """One decoder layer as scan sees it: (carry, this layer's inputs, shared inputs)."""

    config: LlamaConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, carry, layer, shared):
        x, keys, values = carry
        attn = _Attention(self.config, self.param_dtype, name="attn")
        mlp = _GatedMLP(self.config, self.param_dtype, name="mlp")

        def norm(name):
            return RMSNorm(self.config.norm_eps, self.param_dtype, name=name)

        if self.config.norm_position == "pre":
            mixed, keys, values = attn(norm("attn_norm")(x), keys, values, layer, shared)
            x = x + mixed
            x = x + mlp(norm("mlp_norm")(x))
        else:
            mixed, keys, values = attn(x, keys, values, layer, shared)
            x = x + norm("attn_post_norm")(mixed)
            x = x + norm("mlp_post_norm")(mlp(x))
        return (x, keys, values), None


class _Attention(nn.Module):
    """Rotary attention with shared key heads, a window, and an optional cache."""

    config: LlamaConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x, keys, values, layer, shared):
        config = self.config
        (index, slides), (angles, near, far, start) = layer, shared
        query, key, value = self._project(x)
        query, key = rotate(query, *angles), rotate(key, *angles)
        if keys is not None:
            keys = write_layer(keys, key, index, start)
            values = write_layer(values, value, index, start)
            key, value = keys[index].astype(x.dtype), values[index].astype(x.dtype)
        if config.sliding_layers is not None:
            mask = jnp.where(slides, near, far)
        else:
            mask = far if config.sliding_window is None else near
        mixed = attention(query, key, value, mask)
        out = Linear(config.hidden_size, config.out_bias, self.param_dtype, name="o")(mixed)
        return out, keys, values

    def _project(self, x):
        """Queries, keys and values, each `(batch, time, heads, head_dim)`."""
        config = self.config
        split = []
        for name, heads in (
            ("q", config.num_heads),
            ("k", config.num_kv_heads),
            ("v", config.num_kv_heads),
        ):
            width = heads * config.head_dim
            y = Linear(width, config.qkv_bias, self.param_dtype, name=name)(x)
            norm = None
            if config.qk_norm is not None and name != "v":
                norm = RMSNorm(config.norm_eps, self.param_dtype, name=f"{name}_norm")
            if norm is not None and config.qk_norm == "whole":
                y = norm(y)
            y = y.reshape(*x.shape[:-1], heads, config.head_dim)
            if norm is not None and config.qk_norm == "head":
                y = norm(y)
            split.append(y)
        return split


class _GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    config: LlamaConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        config, dtype = self.config, self.param_dtype
        gate = Linear(config.intermediate_size, config.mlp_bias, dtype, name="gate")(x)
        up = Linear(config.intermediate_size, config.mlp_bias, dtype, name="up")(x)
        return Linear(config.hidden_size, config.mlp_bias, dtype, name="down")(nn.silu(gate) * up)


class _Head(nn.Module):
    """Untied head: products accumulate and stay in float32."""

    features: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _count_positions(valid: jax.Array, cache: KVCache | None) -> jax.Array:
    """Numbers the real tokens of each row from 0, or from where the cache ends."""
    count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    before = jnp.int32(-1)
    if cache is not None:
        before = before + jnp.sum(cache.valid.astype(jnp.int32), axis=1, keepdims=True)
    return jnp.maximum(count + before, 0)


def _masks(window, positions, valid, cache, start):
    """Masks with and without the window, `(batch, time, slots)`; the same one if there is none.

    Order of reading decides what lies in the past, positions decide what lies in the window:
    padding between tokens then takes no room in it.
    """
    slot_positions, slot_valid = (positions, valid) if cache is None else cache[2:4]
    reader = start + jnp.arange(positions.shape[1], dtype=jnp.int32)
    slots = jnp.arange(slot_positions.shape[1], dtype=jnp.int32)
    far = (slots[None, :] <= reader[:, None])[None] & slot_valid[:, None, :]
    if window is None:
        return far, far
    return far & (positions[:, :, None] - slot_positions[:, None, :] < window), far
