"""How GPTQ's later rows make up for the errors of earlier rows' inputs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.core._lapack import solve_unit_lower
from jaxweights.quantize._damped_factor import Factor
from jaxweights.weights._divide import divide

_matmul = functools.partial(jnp.matmul, precision="highest")


class Asymmetric(NamedTuple):
    """A factor, and what is added to a weight, so that plain GPTQ makes up for errors of inputs.

    Attributes:
      factor: Its spread is that of changes and of errors of inputs together.
      carry: M, `(n, n)`: rows of `weight + M @ weight` are rounded in place of those of `weight`.
    """

    factor: Factor
    carry: Float[Array, "n n"]


def asymmetric_factor(
    factor: Factor, cross_change: Float[Array, "n n"], share: float
) -> Asymmetric:
    r"""What turns GPTQ's rows into those of its asymmetric form.

    With inputs X of the quantized model and :math:`X_f` of the original one, row i of the weight is
    met by inputs that are wrong by :math:`X_f - X`, and rows after it are changed to make up for
    that. In terms of `Factor`, with :math:`B_{ki}`, k > i, the strict lower triangle of
    :math:`\alpha \, \mathrm{diag}(R)^{-1} R^{-1} X^\top (X_f - X)`, what is rounded in row k is

    .. math:: r_k = w_k + \sum_{j<k} S_{kj} D_j + \sum_{i<k} B_{ki} r_i,

    a recursion in what was rounded before. Solved for r it is that of GPTQ without B, for another
    weight and another S: with :math:`D = v - \hat w`,

    .. math::
        r_k = v_k + \sum_{j<k} \tilde S_{kj} D_j, \quad \tilde S = (I - B)^{-1} (S - B), \quad
        v = w + (S - B)^{-1} B w.

    Args:
      factor: Of the damped Gram matrix over the mean of its diagonal; the identity, with damping
        NaN, where there is none.
      cross_change: :math:`X^\top (X_f - X)` over the same mean, rows and columns in the same order.
      share: Alpha, 0 to 1.

    Returns:
      The factor with the other S, and M = v - w as a matrix.

    Example:
      >>> factor = Factor(jnp.eye(2), jnp.ones(2), jnp.float32(0))
      >>> asymmetric_factor(factor, jnp.array([[9.0, 9.0], [0.5, 9.0]]), 1.0).carry.tolist()
      [[0.0, 0.0], [0.5, 0.0]]
    """
    spread, diagonal, damping = factor
    # R = S^T diag(R): its inverse is applied by a solve with both axes turned around.
    solved = solve_unit_lower(spread.T[::-1, ::-1], cross_change[::-1])[::-1]
    scaled = jnp.tril(divide(solved, (diagonal * diagonal)[:, None]), -1)
    # Without a factor each row is rounded to nearest, alone.
    passed_on = jnp.where(jnp.isnan(damping), 0, share * scaled)
    identity = jnp.eye(spread.shape[0], dtype=spread.dtype)
    rest = spread - passed_on
    together = solve_unit_lower(identity - passed_on, rest)
    return Asymmetric(factor._replace(spread=together), solve_unit_lower(rest, passed_on))


def carried(
    weight: Float[Array, "in out"], carry: Float[Array, "in in"] | None
) -> Float[Array, "in out"]:
    """`weight + carry @ weight`, in float32; the weight itself without a `carry`."""
    return weight if carry is None else weight + _matmul(carry, weight)
