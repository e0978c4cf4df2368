"""The triangular factor of an inverse, with damping that grows until there is one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_HIGHEST = "highest"
_MOST = 1.0  # a ridge as large as the mean diagonal: beyond it nothing of the matrix is left
_LEAST = 1e-4  # where an escalation from zero starts


def inverse_factor(gram: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    r"""Upper triangular U with :math:`U^\top U = (G + d I)^{-1}`, for the least d that works.

    Starts at `damping` and multiplies by ten, up to 1, until the Cholesky factorization succeeds.
    Reversing both axes makes the factor of G itself upper triangular, :math:`G = R R^\top`, and
    :math:`U = R^{-1}`, so that one factorization and one triangular solve suffice.

    Args:
      gram: G, `(n, n)`, symmetric, with a mean diagonal of 1.
      damping: The first d.

    Returns:
      U, `(n, n)`, and the d that was used. Where none worked, the identity and NaN.

    Example:
      >>> factor, used = inverse_factor(jnp.diag(jnp.array([1.0, 4.0])), 0.0)
      >>> factor.tolist(), float(used)
      ([[1.0, 0.0], [0.0, 0.5]], 0.0)
    """
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)

    def attempt(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, d, _, _ = state
        with jax.default_matmul_precision(_HIGHEST):
            lower = jnp.linalg.cholesky((gram + d * identity)[::-1, ::-1])
            factor = jax.lax.linalg.triangular_solve(
                lower[::-1, ::-1], identity, left_side=True, lower=False
            )
        # A sum, because maxima may lose NaN; a failed factorization is NaN throughout.
        works = jnp.isfinite(jnp.sum(factor * 0))
        following = jnp.clip(10 * d, _LEAST, _MOST)
        stop = works | (d >= _MOST)
        return factor, jnp.where(stop, d, following), works, stop

    start = (
        identity,
        jnp.asarray(damping, gram.dtype),
        jnp.asarray(False),
        jnp.asarray(False),
    )
    factor, used, works, _ = jax.lax.while_loop(lambda state: ~state[3], attempt, start)
    return jnp.where(works, factor, identity), jnp.where(works, used, jnp.nan)
