"""What a layer makes up for of the errors of the layers before it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.core._lapack import cholesky, solve_factored
from jaxweights.quantize._damped_factor import normalize_gram, over_mean

_HIGHEST = "highest"


def propagation_matrix(
    gram: Float[Array, "n n"],
    cross_gram: Float[Array, "n n"],
    damping: Float[Array, ""],
) -> Float[Array, "n n"]:
    r"""The matrix M with which `weight + share * M @ weight` makes up for errors of the inputs.

    With inputs X of the quantized model and :math:`X_f` of the original one,
    :math:`M = (X^\top X + d I)^{-1} X^\top (X_f - X)`, so that `weight + M @ weight` gives what the
    original layer gave, :math:`X_f W`, as nearly as a linear function of X can.

    Args:
      gram: :math:`X^\top X`.
      cross_gram: :math:`X^\top X_f`.
      damping: d as a fraction of the mean diagonal of `gram`; NaN gives zeros.

    Returns:
      M, float32. Rows of inputs that never came are zero.

    Example:
      >>> x, original = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.5, 0.0], [0.0, 1.0]])
      >>> propagation_matrix(x.T @ x, x.T @ original, jnp.float32(0)).tolist()
      [[0.5, 0.0], [0.0, -0.5]]
    """
    gram = gram.astype(jnp.float32)
    dead = jnp.diagonal(gram) == 0
    change = over_mean(cross_gram.astype(jnp.float32) - gram, gram)
    identity = jnp.eye(gram.shape[0], dtype=jnp.float32)
    known = jnp.where(jnp.isnan(damping), 1, damping).astype(jnp.float32)
    lower = cholesky(normalize_gram(gram) + known * identity)
    found = solve_factored(lower, change)
    return jnp.where(jnp.isnan(damping) | dead[:, None], 0, found)


def make_up(
    weight: Float[Array, "in out"], matrix: Float[Array, "in in"], share: float
) -> Float[Array, "in out"]:
    """`weight + share * matrix @ weight`, in float32.

    Example:
      >>> make_up(jnp.ones((1, 2)), jnp.array([[0.5]]), 0.5).tolist()
      [[1.25, 1.25]]
    """
    wide = weight.astype(jnp.float32)
    return wide + share * jnp.matmul(matrix, wide, precision=_HIGHEST)
