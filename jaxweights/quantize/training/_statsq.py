"""statsq: a grid whose range follows the mean magnitude of each output's weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxweights.core._compiled import compiled
from jaxweights.core._transform import Transform
from jaxweights.quantize._leaves import represented
from jaxweights.quantize._ordered_sum import ordered_sum
from jaxweights.quantize._settings import check_between
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._divide import divide

_NAME = "quantize.statsq"
_BELOW_ONE = np.float32(1 - 1e-6)  # of the authors' code, so that 1 rounds into the last level


def statsq(*, bits: int) -> Transform:
    r"""Rounds to levels at odd multiples of a fraction of twice the mean magnitude.

    With :math:`s = 2\,\mathrm{mean}|w|` of an output's weights and :math:`n = 2^{b-1}`, the levels
    are :math:`\pm s (2i + 1) / 2n`; 0 is none of them. The range follows the weights as they are
    trained and is not learned, so that no step size reacts to weights that cross a threshold.
    Meant for training, inside `fake_quant`: the range is narrow, and more bits do not cure what it
    clips. `oscillation_monitor` tells whether fewer weights swing than with `lsq`, which depends on
    the model and the learning rate.

    Args:
      bits: Bits per code, 1 to 8.

    Returns:
      A transform from dense or masked matrices to `Codebook` ones, of the same shape and dtype.

    Raises:
      TypeError: If `bits` is no integer.
      ValueError: If `bits` is out of range; when it sees a tree, if a leaf is already represented
        or holds values that are not finite.

    Example:
      >>> params = {"kernel": jnp.array([[1.0], [-0.2], [-3.0], [0.8]])}
      >>> jw.materialize(jw.apply(jw.quantize.statsq(bits=2), params))["kernel"].ravel().tolist()
      [0.625, -0.625, -1.875, 0.625]

    Source: Liu et al. 2023, arXiv:2302.02210, section 4.1, and the authors' code.
    Differs: (1) each matrix of a stack has scales of its own. (2) Codes are clamped to the levels,
      which matters at 1 bit. (3) An output of zeros stays zero.
    """
    bits = check_between(_NAME, "bits", bits, 1, 8)
    return represented(functools.partial(statsq_matrix, bits=bits), name=_NAME, group_size=None)


@compiled
def statsq_matrix(weight: Float[Array, "in out"], *, bits: int) -> Codebook:
    """Rounds one matrix as `statsq` says.

    Args:
      weight: `(in, out)`, floating.
      bits: Bits per code, 1 to 8.

    Returns:
      The matrix, with a scale for each output.

    Example:
      >>> statsq_matrix(jnp.array([[0.5], [-1.5]]), bits=1).materialize().ravel().tolist()
      [1.0, -1.0]
    """
    bits = check_between(f"{_NAME}_matrix", "bits", bits, 1, 8)
    dense = weight.astype(jnp.float32)
    half = 2 ** (bits - 1)
    scale = divide(2 * ordered_sum(jnp.abs(dense)), max(dense.shape[0], 1))  # (1, out)
    place = jnp.clip(divide(dense, _nonzero(scale)), -1, _BELOW_ONE)
    codes = jnp.clip(jnp.round(place * half - 0.5), -half, half - 1).astype(jnp.int32) + half
    levels = (2 * np.arange(2 * half) + 1 - 2 * half) / np.float32(2 * half)
    return Codebook.from_codes(codes, jnp.asarray(levels, jnp.float32), scale, bits=bits)


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)
