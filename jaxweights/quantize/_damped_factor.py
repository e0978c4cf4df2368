"""The triangular factor of a Gram matrix, with damping that grows until there is one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.core._lapack import cholesky_of_symmetric
from jaxweights.weights._divide import divide

_HIGHEST = "highest"
_MOST = 1.0  # a ridge as large as the mean diagonal: beyond it nothing of the matrix is left
_LEAST = 1e-4  # where an escalation from zero starts


class Factor(NamedTuple):
    r"""How each input's error is made up for by the inputs after it.

    With :math:`G + d I = R R^\top`, R upper triangular, the loss of a change D of the weight is
    :math:`\operatorname{tr}(D^\top (G + d I) D) = \|R^\top D\|_F^2`, and row i of
    :math:`R^\top D` knows of no row after i: it is
    :math:`R_{ii} (D_i + \sum_{j<i} S_{ij} D_j)` with :math:`S_{ij} = R_{ji} / R_{ii}`.

    Attributes:
      spread: S, `(n, n)`, lower triangular with ones on the diagonal.
      diagonal: The diagonal of R, `(n,)`, positive.
      damping: d; NaN where no damping helped and the factor is the identity.
    """

    spread: Float[Array, "n n"]
    diagonal: Float[Array, " n"]
    damping: Float[Array, ""]


def normalize_gram(gram: Float[Array, "n n"], *, fill: float | None = None) -> Float[Array, "n n"]:
    """A Gram matrix in float32 with a mean diagonal of 1, so that damping is a fraction of it.

    Args:
      gram: Symmetric, positive semidefinite.
      fill: Put on the diagonal, before, of inputs that never came; None puts the mean of the
        others, which leaves the mean as it is.

    Returns:
      The matrix.

    Example:
      >>> normalize_gram(jnp.diag(jnp.array([6.0, 0.0, 2.0]))).diagonal().tolist()
      [1.5, 1.0, 0.5]
    """
    gram = gram.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    live_mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    filling = jnp.where(jnp.all(dead), 1, live_mean) if fill is None else jnp.float32(fill)
    diagonal = jnp.where(dead, filling, diagonal)
    filled = jnp.where(jnp.eye(gram.shape[0], dtype=bool), diagonal, gram)
    return divide(filled, jnp.mean(diagonal))


def over_mean(change: Float[Array, "n n"], gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """A float32 matrix over the number that `normalize_gram` divides a Gram matrix by.

    Example:
      >>> over_mean(jnp.ones((2, 2)), jnp.diag(jnp.array([4.0, 0.0]))).tolist()
      [[0.25, 0.25], [0.25, 0.25]]
    """
    diagonal = jnp.diagonal(gram).astype(jnp.float32)
    live = jnp.maximum(jnp.sum(diagonal != 0), 1).astype(jnp.float32)
    mean = divide(jnp.sum(diagonal), live)
    return divide(change, jnp.where(mean > 0, mean, 1))


def damped_factor(gram: Float[Array, "n n"], damping: float) -> Factor:
    """Factors G + d I for the least d that works.

    Starts at `damping` and multiplies by ten, up to 1, until the Cholesky factorization succeeds.
    Reversing both axes makes its factor upper triangular. Nothing is inverted: where other GPTQ
    codes need the factor of the inverse, and pay four times as much for it, the errors of earlier
    rows are weighed here by the factor itself.

    Args:
      gram: G, symmetric, with a mean diagonal of 1.
      damping: The first d.

    Returns:
      The factor.

    Example:
      >>> factor = damped_factor(jnp.array([[1.0, 0.5], [0.5, 1.0]]), 0.0)
      >>> factor.spread.tolist(), float(factor.damping)
      ([[1.0, 0.0], [0.5, 1.0]], 0.0)
    """
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    # Transposed in one place, out of the loop: elsewhere rows stay rows.
    turned = ((gram + gram.T) / 2)[::-1, ::-1]

    def attempt(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, d, _, _ = state
        with jax.default_matmul_precision(_HIGHEST):
            upper = cholesky_of_symmetric((turned + d * identity).T).T
        # A sum, because maxima may lose NaN; a failed factorization is NaN throughout.
        works = jnp.isfinite(jnp.sum(jnp.diagonal(upper) * 0))
        following = jnp.clip(10 * d, _LEAST, _MOST)
        stop = works | (d >= _MOST)
        return upper, jnp.where(stop, d, following), works, stop

    start = (identity, jnp.asarray(damping, gram.dtype), jnp.asarray(False), jnp.asarray(False))
    upper, used, works, _ = jax.lax.while_loop(lambda state: ~state[3], attempt, start)
    transposed = jnp.where(works, upper, identity)[::-1, ::-1]
    diagonal = jnp.diagonal(transposed)
    return Factor(divide(transposed, diagonal[:, None]), diagonal, jnp.where(works, used, jnp.nan))
