"""QuantizedProduct: integer weights that are multiplied with integer activations."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._matrix_weight import MatrixWeight, matrix_parts, take_columns
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._weight import static, weight_dataclass

_INT32_MAX = 2**31 - 1
# A product with fewer rows is no matrix product to XLA's CPU backend, which then takes many times
# as long as with four (seen with jax 0.10.2).
_FEWEST_ROWS = 4


@weight_dataclass
class QuantizedProduct(MatrixWeight):
    r"""A matrix of integers whose products with activations are products of integers.

    Multiplying rounds each token to integers of `input_bits` bits and accumulates in int32:

        y[t, o] = (sum_i round(x[t, i] / a[t]) * codes[o, i]) * a[t] * scale[o]
        a[t] = max_i |x[t, i]| / (2**(input_bits-1) - 1), or input_scale

    The gradient of `x` is that of the product with the weight that the integers stand for, as if
    nothing had been rounded; that of `latent`, where there is one, is that of the weight that the
    rounded activations were multiplied with. Integers have none. Other uses than `x @ weight`, such
    as a look-up, take the weight that the integers stand for and round nothing else.

    Codes are stored a byte each and output by output, which is how integer units read them.

    Args:
      codes: `(*stack, out, in)` int8.
      scale: `(*stack, 1, out)` or `(*stack, 1, 1)`, floating.
      input_scale: `(*stack, 1, 1)` float32 step of the activations; None finds one for each token.
      latent: `(*stack, in, out)` weights that the integers were rounded from and that training
        moves, or None.
      bits: Bits of the codes, 2 to 8.
      input_bits: Bits of the activations, 2 to 8.
      dtype: Dtype that it materialises to.
      view: How the matrix relates to the leaf.

    Example:
      >>> q = Quantized.from_codes(jnp.array([[3], [-4]], jnp.int8), jnp.full((1, 1), 0.5), bits=8)
      >>> weight = QuantizedProduct.of(q)
      >>> jax.jit(jw.lift(lambda w, x: x @ w))(weight, jnp.array([[127.0, 0.0], [1.0, 1.0]]))
      Array([[190.5],
             [ -0.5]], dtype=float32)
    """

    codes: jax.Array
    scale: jax.Array
    input_scale: jax.Array | None = None
    latent: jax.Array | None = None
    bits: int = static(default=8)
    input_bits: int = static(default=8)
    dtype: Any = static(default=np.dtype(np.float32))
    view: View = static(default=None)

    @classmethod
    def of(
        cls, weight: Quantized, input_scale: jax.Array | None = None, *, input_bits: int = 8
    ) -> QuantizedProduct:
        """Multiplies the integers of a weight in place of its values.

        Args:
          weight: Integers with one scale an output or one in all, and zero points only where there
            are fewer than 8 bits, up to `2**bits`: codes minus zero points then fit a byte, with a
            bit more each.
          input_scale: As in the class.
          input_bits: As in the class.

        Returns:
          The weight.

        Raises:
          ValueError: If products of integers cannot express the weight, or would overflow.
        """
        problem = unfit_for_product(weight, input_bits)
        if problem is not None:
            raise ValueError(f"QuantizedProduct: {problem}")
        cols = weight.scale.shape[-1]
        scale = weight.scale
        if cols not in (1, weight.out_dim):
            scale = jnp.repeat(scale, weight.out_dim // cols, axis=-1)
        return cls(
            codes=jnp.swapaxes(weight.units(jnp.int16).astype(jnp.int8), -1, -2),
            scale=scale,
            input_scale=input_scale,
            bits=_centred_bits(weight),
            input_bits=input_bits,
            dtype=weight.dtype,
            view=weight.view,
        )

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    def weight_only(self) -> Quantized:
        """The same integers, multiplied as the values that they stand for."""
        codes = jnp.swapaxes(self.codes, -1, -2)
        return Quantized.from_codes(
            codes, self.scale, bits=self.bits, dtype=self.dtype, view=self.view
        )

    def matrix(self) -> jax.Array:
        """Dense `(*stack, in, out)` matrix, in `dtype`."""
        codes = jnp.swapaxes(self.codes, -1, -2).astype(jnp.float32)
        return (codes * self.scale.astype(jnp.float32)).astype(self.dtype)

    def astype(self, dtype: DTypeLike) -> QuantizedProduct | None:
        """The same integers, materialising to another dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def multiply(
        self,
        x: jax.Array,
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """Rounds `x` of shape `(*stack, tokens, in)` and multiplies integers."""
        del precision  # integers are exact
        y = _product(x, self.latent, dataclasses.replace(self, latent=None))
        return y.astype(preferred_element_type or x.dtype)

    def columns(self, indices: jax.Array) -> jax.Array:
        """Columns of an unstacked matrix as rows, `(n, in)`; NaN for an index out of range."""
        out_dim = self.codes.shape[-2]
        scale = jnp.broadcast_to(self.scale[0].astype(jnp.float32), (out_dim,))

        def columns(column: jax.Array) -> jax.Array:
            rows = jnp.take(self.codes, column, axis=0).astype(jnp.float32)
            return (rows * scale[column][:, None]).astype(self.dtype)

        return take_columns(indices, out_dim, columns)

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Split by outputs or by matrices; a token's scale needs all of its inputs."""
        del mesh
        parts = matrix_parts(self.view, self.ndim, spec)
        if parts is None or parts[-2] is not None:
            return None
        *stack, _, outputs = parts
        shared = PartitionSpec(*stack, None, None)
        return dataclasses.replace(
            self,
            codes=PartitionSpec(*stack, outputs, None),
            scale=PartitionSpec(*stack, None, outputs) if self.scale.shape[-1] > 1 else shared,
            input_scale=None if self.input_scale is None else shared,
            latent=None if self.latent is None else PartitionSpec(*stack, None, outputs),
        )


def unfit_for_product(weight: Quantized, input_bits: int) -> str | None:
    """Why the integers of a weight cannot be multiplied with integers; None where they can."""
    if weight.offset is not None or (weight.zero_point is not None and weight.bits == 8):
        return (
            "the weight has offsets, or zero points of 8 bits, with which its integers do not fit "
            "a byte. Quantize it on a symmetric grid, such as 'narrow', or with fewer bits."
        )
    if weight.scale.shape[-2] > 1 or weight.group_index is not None:
        return (
            f"the weight has {weight.scale.shape[-2]} scales for the inputs of one output, but "
            "sums of integers can only be scaled as a whole. Quantize it with group_size=None or "
            "'tensor'."
        )
    zero = weight.zero_point
    if zero is not None and not isinstance(zero, Tracer | jax.ShapeDtypeStruct):
        most = int(jnp.max(zero, initial=0))
        if most > 2**weight.bits:
            return (
                f"the weight has a zero point of {most}, too far from its {weight.bits}-bit codes "
                "for their difference to fit a byte as it should: at most "
                f"{2**weight.bits} is. Dequantize it with `materialize`, and quantize it anew."
            )
    return unfit_length(weight.in_dim, _centred_bits(weight), input_bits)


def _centred_bits(weight: Quantized) -> int:
    return weight.bits + (weight.zero_point is not None)


def unfit_length(in_dim: int, bits: int, input_bits: int) -> str | None:
    """Says so where a sum of `in_dim` products may not fit into 32 bits."""
    longest = _INT32_MAX // (2 ** (bits - 1) * _largest(input_bits))
    if in_dim <= longest:
        return None
    return (
        f"sums of {in_dim} products of {bits}-bit weights and {input_bits}-bit inputs may not fit "
        f"into 32 bits. At most {longest} are safe; choose fewer bits, or leave this weight out "
        "with `partition`."
    )


def round_inputs(
    x: jax.Array, bits: int, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds activations to integers, token by token.

    Args:
      x: `(..., in)`, floating.
      bits: Bits of the integers, 2 to 8.
      scale: Step, broadcasting against `x`; None gives each token the one that its largest
        magnitude asks for.

    Returns:
      int8 integers of the shape of `x`, and their steps, float32 `(..., 1)` where found. A token of
      zeros has step 1.
    """
    x = x.astype(jnp.float32)
    largest = _largest(bits)
    if scale is None:
        scale = _divide(jnp.max(jnp.abs(x), axis=-1, keepdims=True), jnp.float32(largest))
        scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    steps = jnp.clip(jnp.round(_divide(x, scale)), -largest, largest)
    return steps.astype(jnp.int8), scale


@jax.custom_jvp
def _product(x: jax.Array, latent: jax.Array | None, weight: QuantizedProduct) -> jax.Array:
    del latent
    integers, step = round_inputs(x, weight.input_bits, weight.input_scale)
    return _integer_product(integers, weight.codes) * (step * weight.scale.astype(jnp.float32))


@_product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, latent, weight = primals
    dx, dlatent, dweight = tangents
    integers, step = round_inputs(x, weight.input_bits, weight.input_scale)
    sums = _integer_product(integers, weight.codes) * step
    tangent = jnp.matmul(dx.astype(jnp.float32), weight.matrix().astype(jnp.float32))
    tangent = tangent + sums * dweight.scale.astype(jnp.float32)
    if latent is not None:
        rounded = integers.astype(jnp.float32) * step
        tangent = tangent + jnp.matmul(rounded, dlatent.astype(jnp.float32))
    return _product(x, latent, weight), tangent


def _integer_product(x: jax.Array, codes: jax.Array) -> jax.Array:
    """`x @ codes.T` for int8 `(*stack, tokens, in)` and `(*stack, out, in)`, as float32."""
    tokens, stack = x.shape[-2], codes.shape[:-2]
    if 0 < tokens < _FEWEST_ROWS:
        x = jnp.pad(x, [(0, 0)] * len(stack) + [(0, _FEWEST_ROWS - tokens), (0, 0)])
    x = jnp.broadcast_to(x, (*stack, *x.shape[-2:]))
    axes = tuple(range(len(stack)))
    last = len(stack) + 1
    # Weights first: faster with few tokens on a CPU.
    sums = jax.lax.dot_general(
        codes, x, (((last,), (last,)), (axes, axes)), preferred_element_type=jnp.int32
    )  # (*stack, out, tokens)
    return jnp.swapaxes(sums[..., :tokens], -1, -2).astype(jnp.float32)


def _divide(values: jax.Array, by: jax.Array) -> jax.Array:
    """The exact quotient in every program, as in `quantize._grid.divide`."""
    return values / jnp.where(values == 0, jnp.float32(1), by)


def _largest(bits: int) -> int:
    return 2 ** (bits - 1) - 1
