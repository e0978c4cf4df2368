"""The BERT encoder, with its layers stacked for scan, and sentence embeddings from it."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.models._checks import Fields
from jaxweights.models._layers import LayerNorm, Linear, Table, attention


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; its activation is the exact (erf) GELU.

    Attributes:
      vocab_size: Rows of the word embedding.
      hidden_size: Features of the residual stream, a multiple of `num_heads`.
      intermediate_size: Features inside the MLP.
      num_layers: Encoder layers.
      num_heads: Attention heads.
      max_positions: Rows of the position embedding: the longest input.
      type_vocab_size: Rows of the token type embedding.
      norm_eps: Added to the variance inside every LayerNorm.

    Raises:
      TypeError: If a field has the wrong kind; every bad field is listed.
      ValueError: If a field has an impossible value; every bad field is listed.

    Example:
      >>> BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... ).head_dim
      8
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    type_vocab_size: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Checks every field."""
        fields = Fields("models.BertConfig", self)
        names = [field.name for field in dataclasses.fields(self) if field.name != "norm_eps"]
        fine = all([fields.integer(name, minimum=1) for name in names])
        fields.number("norm_eps", minimum=0.0)
        if fine and self.hidden_size % self.num_heads:
            fields.add(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}."
            )
        fields.check()

    @property
    def head_dim(self) -> int:
        """Features a head."""
        return self.hidden_size // self.num_heads


class Bert(nn.Module):
    """Encodes every token in the light of all others.

    Parameters: `embed/word|position|type/embedding`, `embed/norm/scale|bias`; `layers/...` with a
    leading layer axis: `attn/q|k|v|o/kernel|bias`, `attn_norm/scale|bias`,
    `mlp/up|down/kernel|bias`, `mlp_norm/scale|bias`; kernels are (in, out).

    Attributes:
      config: Sizes.
      dtype: Dtype of activations; None takes the word embedding's. Norms and softmax are float32.
      param_dtype: Dtype that `init` gives the parameters.
      remat: Whether the backward pass computes a layer's activations again.

    Example:
      >>> config = BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... )
      >>> model, tokens = Bert(config), jnp.zeros((1, 5), jnp.int32)
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> model.apply({"params": params}, tokens).shape
      (1, 5, 32)

    Source: Devlin et al. 2019, arXiv:1810.04805.
    Differs: (1) the pooler behind the first token is left out. (2) No dropout.
    """

    config: BertConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Reads tokens and returns their encodings.

        Args:
          tokens: `(batch, time)`, integers.
          attention_mask: True (or 1) for a token, False (or 0) for padding, `(batch, time)`. What
            padding yields has no meaning.
          token_types: `(batch, time)`; None means 0.
          positions: `(batch, time)`; None counts from the left, padding included.

        Returns:
          `(batch, time, hidden)` in the compute dtype.
        """
        config = self.config
        if tokens.ndim != 2:
            raise ValueError(
                f"models.Bert: tokens have shape {tokens.shape}. They must be (batch, time): "
                "add a batch axis with tokens[None]."
            )
        if positions is None:
            if tokens.shape[1] > config.max_positions:
                raise ValueError(
                    f"models.Bert: {tokens.shape[1]} tokens in a row exceed "
                    f"max_positions={config.max_positions}. Truncate the input."
                )
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(positions, tokens.shape)
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        valid = (
            jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        )

        x = _Embed(config, self.param_dtype, name="embed")(tokens, positions, token_types)
        x = x if self.dtype is None else x.astype(self.dtype)
        scanned = nn.scan(
            nn.remat(_Layer, prevent_cse=False) if self.remat else _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,),  # type: ignore[arg-type]  # Flax declares an int
            length=config.num_layers,
            check_constancy_invariants=False,
        )(config, self.param_dtype, name="layers")
        x, _ = scanned(x, valid[:, None, :])  # (batch, 1, slots): the same for every reader
        return x


class _Embed(nn.Module):
    """Sum of word, position and type embeddings, normalised."""

    config: BertConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens, positions, token_types):
        config = self.config
        x = jnp.zeros((), self.param_dtype)
        for name, rows, indices in (
            ("word", config.vocab_size, tokens),
            ("position", config.max_positions, positions),
            ("type", config.type_vocab_size, token_types),
        ):
            entry = Table(rows, config.hidden_size, self.param_dtype, name=name)(indices)
            x = entry if name == "word" else x + entry.astype(x.dtype)
        return LayerNorm(config.norm_eps, self.param_dtype, name="norm")(x)


class _Layer(nn.Module):
    """One encoder layer: each sublayer is added, then the sum is normalised."""

    config: BertConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x, mask):
        for name, norm, sublayer in (
            ("attn", "attn_norm", _SelfAttention),
            ("mlp", "mlp_norm", _MLP),
        ):
            y = sublayer(self.config, self.param_dtype, name=name)(x, mask)
            x = LayerNorm(self.config.norm_eps, self.param_dtype, name=norm)(x + y)
        return x, None


class _SelfAttention(nn.Module):
    """Attention of all tokens to all that are not padding."""

    config: BertConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x, mask):
        config = self.config
        split = (*x.shape[:-1], config.num_heads, config.head_dim)
        query, key, value = (
            Linear(config.hidden_size, True, self.param_dtype, name=name)(x).reshape(split)
            for name in ("q", "k", "v")
        )
        mixed = attention(query, key, value, mask)
        return Linear(config.hidden_size, True, self.param_dtype, name="o")(mixed)


class _MLP(nn.Module):
    """`down(gelu(up(x)))`."""

    config: BertConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x, mask):
        del mask
        x = Linear(self.config.intermediate_size, True, self.param_dtype, name="up")(x)
        x = jax.nn.gelu(x, approximate=False)
        return Linear(self.config.hidden_size, True, self.param_dtype, name="down")(x)


def sentence_embedding(hidden: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
    """Averages the encodings of a sentence's tokens and scales the mean to unit length.

    Args:
      hidden: Encodings, `(batch, time, hidden)`.
      attention_mask: True (or 1) for tokens that count, `(batch, time)`; None means all.

    Returns:
      `(batch, hidden)`, float32, of unit length; zero where a row has no token.

    Example:
      >>> sentence_embedding(jnp.array([[[3.0, 0.0], [3.0, 8.0]]]))
      Array([[0.6, 0.8]], dtype=float32)

    Source: Reimers and Gurevych 2019, arXiv:1908.10084, mean pooling.
    """
    hidden = hidden.astype(jnp.float32)
    if attention_mask is not None:
        hidden = jnp.where(attention_mask.astype(bool)[:, :, None], hidden, 0.0)
    # The mean's divisor cancels in the normalisation.
    total = jnp.sum(hidden, axis=1)
    squared = jnp.sum(jnp.square(total), axis=-1, keepdims=True)
    return jnp.where(squared > 0, total * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
