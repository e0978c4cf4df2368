"""LearnedStep: a weight that is trained on an integer grid whose step is trained, too."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._matrix_weight import MatrixWeight, matrix_parts
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._scaled import combine
from jaxweights.weights._weight import static, weight_dataclass

# Steps are numbers above 0; one that an optimizer moved past it stands for the smallest.
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)


@weight_dataclass
class LearnedStep(MatrixWeight):
    r"""Latent weights and the steps of the grid that they are rounded to, both trained.

        matrix = clip(round(latent / step), -2**(bits-1), 2**(bits-1) - 1) * step

    in float32, rounded once to `dtype`. The gradient of a latent weight is that of its rounded one,
    zero where it was clipped; that of a step is the rounding error in steps, summed over its
    weights, or the code where that was clipped, over `sqrt(weights * (2**(bits-1) - 1))`. So an
    optimizer may hold the whole tree: both fields are floating arrays.

    Args:
      latent: `(*stack, in, out)`, floating.
      step: `(*stack, rows, cols)` float32, rows and cols dividing those of `latent`.
      bits: Bits per code, 2 to 8.
      full_group: Rows of every group but the last, which has fewer; 0 where all have as many.
      dtype: Dtype that it materialises to.
      view: How the matrix relates to the leaf.

    Example:
      >>> weight = LearnedStep(jnp.array([[0.4, 3.0]]), jnp.array([[0.5]]), 2, view=View.of((1, 2)))
      >>> weight.materialize()
      Array([[0.5, 0.5]], dtype=float32)
      >>> jax.grad(lambda w: w.materialize().sum())(weight).latent
      Array([[1., 0.]], dtype=float32)
    """

    rows_follow_inputs: ClassVar[bool] = True

    latent: jax.Array
    step: jax.Array
    bits: int = static(default=8)
    dtype: Any = static(default=np.dtype(np.float32))
    view: View = static(default=None)
    full_group: int = static(default=0)

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.latent.shape[:-2])

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def matrix(self) -> jax.Array:
        """The rounded matrix, `(*stack, in, out)`."""
        latent, step = self.latent.astype(jnp.float32), self.step.astype(jnp.float32)
        if not self.full_group:
            return self._rounded(latent, step).astype(self.dtype)
        # The shorter group has fewer weights to a step, by which its gradient is scaled.
        full = self.latent.shape[-2] // self.full_group * self.full_group
        parts = [
            self._rounded(latent[..., :full, :], step[..., :-1, :]),
            self._rounded(latent[..., full:, :], step[..., -1:, :]),
        ]
        return jnp.concatenate(parts, axis=-2).astype(self.dtype)

    def _rounded(self, latent: jax.Array, step: jax.Array) -> jax.Array:
        """Rows whose groups have one size, rounded."""
        shared = math.prod(latent.shape[-2:]) // max(math.prod(step.shape[-2:]), 1)
        gradient_scale = 1 / math.sqrt(max(shared, 1) * self.code_range[1])

        def round_to_step(latent: jax.Array, step: jax.Array) -> jax.Array:
            return learned_round(latent, step, *self.code_range, gradient_scale)

        return combine(latent, step, round_to_step)

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Splits groups with the inputs, where all of them have one size."""
        parts = matrix_parts(self.view, self.ndim, spec) if self.full_group else None
        if self.full_group and (parts is None or parts[-2] is not None):
            return None
        return super().partition(spec, mesh)

    def astype(self, dtype: DTypeLike) -> LearnedStep | None:
        """The same latent weights and steps, materialising to another dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def quantized(self) -> Quantized:
        """The integers that training ended at: the same values to the bit, in `bits` bits."""
        step = positive(self.step)

        def code(latent: jax.Array, step: jax.Array) -> jax.Array:
            return _codes(latent, step, *self.code_range)

        of_row = step
        if self.full_group:
            rows = self.latent.shape[-2]
            of_row = jnp.repeat(step, self.full_group, axis=-2)[..., :rows, :]
        codes = combine(self.latent.astype(jnp.float32), of_row, code)
        return Quantized.from_codes(
            codes.astype(jnp.int32),
            step,
            bits=self.bits,
            full_group=self.full_group,
            dtype=self.dtype,
            view=self.view,
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def learned_round(
    x: jax.Array, step: jax.Array, smallest: int, largest: int, gradient_scale: float
) -> jax.Array:
    """Rounds float32 values to multiples of a step that broadcasts against them.

    Args:
      x: Values.
      step: Of a shape that broadcasts to that of `x`, float32.
      smallest: Smallest multiple.
      largest: Largest multiple.
      gradient_scale: What gradients of steps are multiplied with.

    Returns:
      The multiples nearest to `x`, halves to even.
    """
    del gradient_scale
    step = positive(step)
    return _codes(x, step, smallest, largest) * step


@learned_round.defjvp
def _learned_round_jvp(
    smallest: int, largest: int, gradient_scale: float, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    x, step = primals[0], positive(primals[1])
    place = x / step
    inside = (place >= smallest) & (place <= largest)
    codes = _codes(x, step, smallest, largest)
    per_step = gradient_scale * jnp.where(inside, codes - place, codes)
    return codes * step, jnp.where(inside, tangents[0], 0) + per_step * tangents[1]


def positive(step: jax.Array) -> jax.Array:
    """Steps as they are used."""
    return jnp.maximum(step.astype(jnp.float32), jnp.float32(_SMALLEST_STEP))


def _codes(x: jax.Array, step: jax.Array, smallest: int, largest: int) -> jax.Array:
    """Codes as floats; the quotient is exact in every program, as in `quantize._grid.divide`."""
    place = x / jnp.where(x == 0, jnp.float32(1), step)
    return jnp.clip(jnp.round(place), smallest, largest)
