"""output_error: what a change of a weight does to its layer's outputs."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def output_error(
    weight: Float[Array, "in out"],
    approximation: Float[Array, "in out"],
    gram: Float[Array, "in in"],
    *,
    relative: bool = False,
) -> Float[Array, ""]:
    r"""Squared change of a layer's outputs, summed over tokens and outputs.

    With :math:`H = X^\top X` it is :math:`\|X W - X \hat W\|_F^2 = \operatorname{tr}(D^\top H D)`,
    :math:`D = W - \hat W`: exact without the inputs themselves. The measure by which calibrated
    methods compare what they could do.

    Args:
      weight: W, `(in, out)`, floating.
      approximation: What takes its place, `(in, out)`, floating.
      gram: H, `(in, in)`: a sum over tokens, or a mean, of which the result then is a mean.
      relative: Whether to divide by :math:`\operatorname{tr}(W^\top H W)`, the outputs' own sum of
        squares. Then the scale of `gram` does not matter, and no change is 0 even of zero outputs.

    Returns:
      The error, float32, accumulated in float32.

    Example:
      >>> weight = jnp.array([[2.0], [1.0]])
      >>> gram = jnp.diag(jnp.array([1.0, 4.0]))
      >>> float(output_error(weight, jnp.round(weight / 2) * 2, gram))
      4.0
      >>> float(output_error(weight, jnp.zeros_like(weight), gram, relative=True))
      1.0
    """
    weight = weight.astype(jnp.float32)
    gram = gram.astype(jnp.float32)

    def energy(matrix: Float[Array, "in out"]) -> Float[Array, ""]:
        return jnp.sum(matrix * jnp.matmul(gram, matrix, precision="highest"))

    error = energy(weight - approximation.astype(jnp.float32))
    if not relative:
        return error
    return jnp.where(error == 0, 0.0, error / energy(weight))
