"""query_key_product: one matrix for each head in place of its query and key kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_NAME = "quantize.query_key_product"


class QueryKey(NamedTuple):
    """What attention logits need of queries and keys: `(x @ product[h] + offset[h]) @ y.T`.

    Attributes:
      product: `(heads, dim, dim)`, query inputs first.
      offset: `(heads, dim)`, what a bias of the queries adds; None without one.
    """

    product: jax.Array
    offset: jax.Array | None


def query_key_product(
    query: Float[Array, "dim heads head_dim"],
    key: Float[Array, "dim heads head_dim"],
    *,
    rotary: bool,
    query_bias: Float[Array, "heads head_dim"] | None = None,
) -> QueryKey:
    r"""Multiplies the query and key kernels of each head, for training at few bits.

    Where queries and keys are rounded each by itself, a change of one moves the best level of the
    other. Their product :math:`W_q W_k^\top` is rounded once instead, with one scale a row:
    `statsq` with the axes `Axes(inputs=(-1,), outputs=(-2,))`. It takes `heads * dim**2` weights
    instead of `2 * dim * heads * head_dim`, each of another size, so that the learning rate has to
    be chosen anew, and the model must compute its logits with `query_key_logits`. A bias of the
    keys adds the same to all logits of a query, which the softmax takes away again: leave it out.

    Args:
      query: Kernel of the queries.
      key: Kernel of the keys, with as many heads.
      rotary: Whether the model rotates queries and keys by their positions; the product cannot.
      query_bias: Bias of the queries, or None.

    Returns:
      The product and the offset, in the dtype of `query`, with which attention computes what it
      did before.

    Raises:
      ValueError: If the model rotates queries and keys, or shares keys between heads.

    Example:
      >>> query, key = jnp.ones((6, 2, 3)), jnp.ones((6, 2, 3))
      >>> query_key_product(query, key, rotary=False).product.shape
      (2, 6, 6)

    Source: Liu et al. 2023, arXiv:2302.02210, section 4.3.
    Differs: the bias of the queries is kept, exactly.
    """
    if rotary:
        raise ValueError(
            f"{_NAME}: rotary=True. Between the two kernels such a model rotates queries and keys "
            "by an angle that depends on their positions, so that no one matrix can stand for "
            "both. Quantize query and key kernels each by itself."
        )
    if query.ndim != 3 or key.ndim != 3 or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            f"{_NAME}: query has shape {query.shape} and key {key.shape}. Both must be (dim, "
            "heads, head_dim); split the heads with `reshape` first."
        )
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{_NAME}: query has {query.shape[1]} heads, but key has {key.shape[1]}. Keys shared "
            "by several heads would be stored once for each of them, in matrices that can no "
            "longer share them. Quantize query and key kernels each by itself."
        )
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    product = jnp.einsum("dhk,ehk->hde", wide(query), wide(key), precision="highest")
    offset = None
    if query_bias is not None:
        offset = jnp.einsum("hk,ehk->he", wide(query_bias), wide(key), precision="highest")
        offset = offset.astype(query.dtype)
    return QueryKey(product.astype(query.dtype), offset)


def query_key_logits(
    x: Float[Array, "*batch queries dim"],
    y: Float[Array, "*batch keys dim"],
    product: Float[Array, "heads dim dim"],
    *,
    head_dim: int,
    offset: Float[Array, "heads dim"] | None = None,
) -> Float[Array, "*batch heads queries keys"]:
    """Attention logits from inputs and the product of the query and key kernels.

    Args:
      x: What queries were made of.
      y: What keys were made of; `x` again in self-attention.
      product: Of `query_key_product`; a represented weight under `lift`.
      head_dim: Width of a head before, whose root divides the logits.
      offset: Of `query_key_product`.

    Returns:
      The logits before the softmax.

    Example:
      >>> x, product = jnp.ones((5, 6)), jnp.ones((2, 6, 6))
      >>> query_key_logits(x, x, product, head_dim=3).shape
      (2, 5, 5)
    """
    queries = jnp.einsum("...qd,hde->...hqe", x, product)
    if offset is not None:
        shape = (1,) * (queries.ndim - 3) + (offset.shape[0], 1, offset.shape[1])
        queries = queries + offset.reshape(shape)
    return jnp.einsum("...hqe,...ke->...hqk", queries, y) / math.sqrt(head_dim)
