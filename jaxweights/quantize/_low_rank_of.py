"""The low-rank matrix that leaves least of a residual in a layer's outputs; arrays only."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.core._lapack import eigh, qr
from jaxweights.quantize._settings import check_count
from jaxweights.quantize._unit import unit_of

_matmul = functools.partial(jnp.matmul, precision="highest")


def low_rank_of(
    residual: Float[Array, "in out"],
    gram: Float[Array, "in in"] | None,
    *,
    rank: int,
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
    r"""Factors of the rank-r matrix L with the least :math:`\operatorname{tr}(D^\top H D)`.

    With :math:`D = R - L`, :math:`H = C^\top C`, the best L has :math:`C L` the truncated singular
    value decomposition of :math:`C R`; that is :math:`L = R V V^\top` with V its first right
    singular vectors. So C is never inverted, and dead inputs and singular H are no trouble. V comes
    from the eigenvectors of a symmetric matrix as wide as the narrower side of R.

    Args:
      residual: R, `(in, out)`, floating.
      gram: H, `(in, in)`; its scale does not matter. None stands for the identity.
      rank: Rank, 0 to min(in, out).

    Returns:
      Factors in float32, balanced: column i of the first and row i of the second have one norm.

    Example:
      >>> residual = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> down, up = low_rank_of(residual, jnp.diag(jnp.array([9.0, 1.0])), rank=1)
      >>> (down @ up).round(4).tolist()  # the input with the large activations, not the large entry
      [[1.0, 0.0], [0.0, 0.0]]

    Source: Liu et al. 2024, arXiv:2410.21271 (EoRA); Zhang et al. 2024, arXiv:2410.06040 (QERA),
      theorem 1.
    """
    check_count("quantize.low_rank_of", "rank", rank, least=0)
    if rank > min(residual.shape):
        raise ValueError(
            f"quantize.low_rank_of: rank={rank} exceeds what a matrix {residual.shape} can have. "
            f"Choose at most {min(residual.shape)}."
        )
    residual = residual.astype(jnp.float32)
    unit = unit_of(residual)
    residual = residual / unit
    in_dim, out_dim = residual.shape
    if not rank:
        return jnp.zeros((in_dim, 0)), jnp.zeros((0, out_dim))
    gram = None if gram is None else gram.astype(jnp.float32)
    if out_dim <= in_dim:
        weighted = residual if gram is None else _matmul(gram, residual)
        directions = _first_eigenvectors(_matmul(residual.T, weighted), rank)  # (out, rank)
    else:
        seen = residual if gram is None else _matmul(_root(gram), residual)  # C R
        left = _first_eigenvectors(_matmul(seen, seen.T), rank)
        # Orthonormal also where singular values are zero or close to each other.
        directions, _ = qr(_matmul(seen.T, left))
    down = _matmul(residual, directions)
    norm = jnp.sqrt(jnp.sqrt(jnp.sum(jnp.square(down), axis=0)))  # root of each column's norm
    root = jnp.sqrt(unit)  # 1 but for weights that no model has
    return root * down / jnp.where(norm > 0, norm, 1)[None], root * norm[:, None] * directions.T


def _first_eigenvectors(matrix: jax.Array, rank: int) -> jax.Array:
    """Eigenvectors of the largest eigenvalues, the largest first, `(n, rank)`."""
    scale = jnp.max(jnp.abs(matrix))
    _, vectors = eigh(matrix / jnp.where(scale > 0, scale, 1))
    return vectors[:, ::-1][:, :rank]


def _root(gram: jax.Array) -> jax.Array:
    """C with `gram = C.T @ C`, also where it is singular."""
    values, vectors = eigh(gram)
    return jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
