"""Sums and truncations of low-rank products, from their thin factors alone; arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core._lapack import qr, svd
from jaxweights.core._map_over_stack import map_over_stack


def concatenated(
    downs: Sequence[jax.Array], ups: Sequence[jax.Array], coefficients: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Factors of the sum of `coefficient * down @ up`: side by side, and so exact.

    Args:
      downs: `(*stack, in, r_i)`.
      ups: `(*stack, r_i, out)`.
      coefficients: `stack`.

    Returns:
      `(*stack, in, R)` and `(*stack, R, out)` with R the sum of the ranks.
    """
    scaled = [c[..., None, None] * up for c, up in zip(coefficients, ups, strict=True)]
    return jnp.concatenate(list(downs), axis=-1), jnp.concatenate(scaled, axis=-2)


def truncated(down: jax.Array, up: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The best approximation of `down @ up` by a product of lower rank.

    With :math:`A = Q_a R_a` and :math:`B^\top = Q_b R_b`, the singular values of :math:`AB` are
    those of the core :math:`R_a R_b^\top`, which is as wide as the rank: O((in + out) R²), and no
    array of the size of the product.

    Args:
      down: `(*stack, in, R)`.
      up: `(*stack, R, out)`.
      rank: Rank wanted, at most min(in, out, R).

    Returns:
      Balanced factors `(*stack, in, rank)` and `(*stack, rank, out)`, whose columns and rows have
      the roots of the singular values as norms; and all singular values, descending.
    """
    left, right, core = _cored(down, up)
    u, values, vt = svd(core)
    down, up = balanced(u, values, vt, rank)
    product = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
    return product(left, down), product(up, jnp.swapaxes(right, -1, -2)), values


def truncated_dense(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `truncated`, of dense matrices, one after another.

    Args:
      matrix: `(*stack, in, out)`.
      rank: Rank wanted, at most min(in, out).

    Returns:
      As `truncated`.
    """

    def one(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, values, vt = svd(matrix)
        return *balanced(u, values, vt, rank), values

    return map_over_stack(one, matrix, matrix.shape[:-2])


def product_norm(down: jax.Array, up: jax.Array) -> jax.Array:
    """Frobenius norm of `down @ up`, `stack`, without forming it."""
    return jnp.sqrt(jnp.sum(jnp.square(_cored(down, up)[2]), axis=(-2, -1)))


def balanced(
    u: jax.Array, values: jax.Array, vt: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array]:
    """Factors of the first `rank` singular triples, each with half of the singular values."""
    root = jnp.sqrt(values[..., :rank])
    return u[..., :, :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def relative_tail(values: jax.Array, rank: int) -> jax.Array:
    """Relative Frobenius error of cutting all matrices of a stack to `rank`; 0 for zeros."""
    largest = jnp.max(values, initial=0)
    unit = values / jnp.where(largest > 0, largest, 1)
    total = jnp.sum(jnp.square(unit))
    tail = jnp.sum(jnp.square(unit[..., rank:]))
    return jnp.sqrt(tail / jnp.where(total > 0, total, 1))


def _cored(down: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    left, r_left = qr(down)
    right, r_right = qr(jnp.swapaxes(up, -1, -2))
    core = jnp.matmul(r_left, jnp.swapaxes(r_right, -1, -2), precision="highest")
    return left, right, core
