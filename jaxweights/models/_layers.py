"""The few modules and the attention that decoder and encoder share."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Linear(nn.Module):
    """`x @ kernel + bias`, computed in the dtype of `x`.

    Attributes:
      features: Length of the output axis.
      use_bias: Whether a bias is added.
      param_dtype: Dtype that `init` gives the parameters.
    """

    features: int
    use_bias: bool = False
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the last axis."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        y = jnp.matmul(x, kernel.astype(x.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
            y = y + along_last(bias, y)
        return y


class RMSNorm(nn.Module):
    """Scales the last axis to unit root mean square, in float32, then by `scale`."""

    epsilon: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises; the result has the dtype of `x`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * along_last(scale, y)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Centres the last axis and scales it to unit variance, in float32, then `scale`, `bias`."""

    epsilon: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises; the result has the dtype of `x`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * along_last(scale, y) + along_last(bias, y)).astype(x.dtype)


class Table(nn.Module):
    """Rows looked up by index; an index that has no row gives NaN, never another row.

    Attributes:
      rows: Number of entries.
      features: Length of an entry.
      param_dtype: Dtype that `init` gives the table.
    """

    rows: int
    features: int
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Declares the table."""
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (self.rows, self.features), self.param_dtype)

    def __call__(self, indices: jax.Array) -> jax.Array:
        """Rows of the table, `(*indices.shape, features)`."""
        return jnp.take(self.embedding, indices, axis=0)

    def attend(self, x: jax.Array) -> jax.Array:
        """Products of `x` with every row, float32: the tied head contracts the table as it is."""
        table = self.embedding.astype(x.dtype)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`vector` with the leading ones that make it broadcast over `like` explicitly."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention; several query heads may share a key head.

    Args:
      query: `(batch, time, heads, head_dim)`.
      key: `(batch, slots, kv_heads, head_dim)`; `kv_heads` divides `heads`.
      value: As `key`.
      mask: True where a query may see a slot, `(batch or 1, time, slots)`. A query that may see
        nothing (padding) gets the mean of all values, a finite number that nobody should read.

    Returns:
      `(batch, time, heads * head_dim)` in the dtype of `value`. Scores and softmax are float32.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
    # Finite, so that a row without any visible slot has no 0/0.
    hidden = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, hidden)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", shares, value)
    return mixed.reshape(batch, time, heads * head_dim)
