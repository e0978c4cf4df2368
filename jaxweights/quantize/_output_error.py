"""output_error: what a change of a weight does to its layer's outputs."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.core._computed_first import computed_first
from jaxweights.quantize._unit import unit_of

# Of a symmetric matrix in strips of so many rows, products of 10 of 16 blocks are enough.
_STRIPS = 4
_LEAST_ROWS = 256  # below which smaller products cost more than fewer of them spare


def output_error(
    weight: Float[Array, "*stack in out"],
    approximation: Float[Array, "*stack in out"],
    gram: Float[Array, "*stack in in"],
    *,
    relative: bool = False,
) -> Float[Array, ""]:
    r"""Squared change of a layer's outputs, summed over tokens and outputs.

    With :math:`H = X^\top X` it is :math:`\|X W - X \hat W\|_F^2 = \operatorname{tr}(D^\top H D)`,
    :math:`D = W - \hat W`: exact without the inputs themselves. The measure by which calibrated
    methods compare what they could do.

    Args:
      weight: W, `(*stack, in, out)`, floating.
      approximation: What takes its place, `(*stack, in, out)`, floating.
      gram: H, `(*stack, in, in)`: a sum over tokens, or a mean, of which the result then is a mean.
      relative: Whether to divide by :math:`\operatorname{tr}(W^\top H W)`, the outputs' own sum of
        squares. Then the scale of `gram` does not matter, and no change is 0 even of zero outputs.

    Returns:
      The error, float32, accumulated in float32, in all matrices of a stack together.

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
    change = weight - approximation.astype(jnp.float32)
    if not relative:
        return jnp.sum(output_errors(change, gram))
    unit = unit_of(weight)
    error = jnp.sum(output_errors(change / unit, gram))
    return jnp.where(error == 0, 0.0, error / jnp.sum(output_errors(weight / unit, gram)))


def output_errors(
    change: Float[Array, "*stack in out"],
    moments: Float[Array, "*stack in in"] | Float[Array, "*stack in"],
) -> Float[Array, "*stack out"]:
    r"""What a change of a weight does to each output: :math:`d^\top H d` of every column d.

    As H is symmetric, a block off its diagonal stands for two: not all are multiplied.

    Args:
      change: Float32.
      moments: H, the Gram matrix of the inputs, float32; or its diagonal alone.

    Returns:
      Squared changes, summed over tokens.
    """
    if moments.ndim < change.ndim:
        return jnp.sum(jnp.square(change) * moments[..., None], axis=-2)
    in_dim = change.shape[-2]
    size = max(-(-in_dim // _STRIPS), _LEAST_ROWS)
    strips = [slice(start, start + size) for start in range(0, in_dim, size)]
    changes = [computed_first(change[..., rows, :]) for rows in strips]
    errors = jnp.zeros((*change.shape[:-2], change.shape[-1]))
    for i, own in enumerate(changes):
        for j, other in enumerate(changes[: i + 1]):
            block = moments[..., strips[i], strips[j]]
            product = jnp.matmul(block, other, precision="highest")
            errors = errors + (1 if i == j else 2) * jnp.sum(own * product, axis=-2)
    return errors
