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
from jaxweights.weights._integer_product import (
    convolution,
    fill_up,
    largest_integer,
    matrix_product,
)
from jaxweights.weights._matrix_weight import MatrixWeight, matrix_parts, take_columns
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._scaled import combine
from jaxweights.weights._weight import static, weight_dataclass

_INT32_MAX = 2**31 - 1


@weight_dataclass
class QuantizedProduct(MatrixWeight):
    r"""A matrix of integers whose products with activations are products of integers.

    Multiplying rounds each token to integers of `input_bits` bits and accumulates in int32:

        y[t, o] = a[t] * sum_r scale[r, o] * (sum_i round(x[t, i] / a[t]) * codes[o, i])
        a[t] = max_i |x[t, i]| / (2**(input_bits-1) - 1), or input_scale

    with `i` in group `r` of the inputs. The inner sums are exact; they are rounded to float32 where
    they exceed 2**24, which takes a thousand inputs at 8 bits, then scaled, and added in float32.
    In a convolution the magnitude that sets a step is the largest of an example, whose windows
    share their inputs.

    The gradient of `x` is that of the product with the weight that the integers stand for, as if
    nothing had been rounded; that of `latent`, where there is one, is that of the weight that the
    rounded activations were multiplied with. Integers have none. Other uses than `x @ weight` and
    convolutions, such as a look-up, take the weight that the integers stand for and round nothing
    else.

    Codes are stored a byte each and output by output, which is how integer units read them.

    Args:
      codes: `(*stack, out, in)` int8; where the last group is shorter, zeros fill it up.
      scale: `(*stack, groups, out)` or `(*stack, groups, 1)`, floating, for groups of as many
        inputs each; one group where it is a convolution's.
      input_scale: `(*stack, 1, 1)` float32 step of the activations; None finds one for each token.
      latent: `(*stack, in, out)` weights that the integers were rounded from and that training
        moves, or None.
      order: Input of every code, `(*stack, in)` int32; None where groups are consecutive inputs.
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
    order: jax.Array | None = None
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
          weight: Integers whose scales belong to groups of as many inputs each, or to all; zero
            points only where there are fewer than 8 bits, up to `2**bits`: codes minus zero points
            then fit a byte, with a bit more each.
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
        codes = jnp.swapaxes(weight.units(jnp.int16).astype(jnp.int8), -1, -2)
        if weight.full_group:  # sums are those of groups of one size
            codes = fill_up(codes, weight.full_group * scale.shape[-2])
        order = None
        if weight.group_index is not None:
            order = jnp.argsort(weight.group_index, axis=-1, stable=True).astype(jnp.int32)
            codes = jnp.take_along_axis(codes, order[..., None, :], axis=-1)
        return cls(
            codes=codes,
            scale=scale,
            input_scale=input_scale,
            order=order,
            bits=_centred_bits(weight),
            input_bits=input_bits,
            dtype=weight.dtype,
            view=weight.view,
        )

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    @property
    def _full_group(self) -> int:
        """As in `Quantized`."""
        length = self.codes.shape[-1]
        return 0 if length == self.view.in_dim else length // self.scale.shape[-2]

    def weight_only(self) -> Quantized:
        """The same integers, multiplied as the values that they stand for."""
        codes, group_index = jnp.swapaxes(self._codes_by_input(), -1, -2), None
        if self.order is not None:
            places = jnp.argsort(self.order, axis=-1)  # of every input among the codes
            group_index = (places // (codes.shape[-2] // self.scale.shape[-2])).astype(jnp.int32)
        return Quantized.from_codes(
            codes,
            self.scale,
            None,
            group_index,
            bits=self.bits,
            full_group=self._full_group,
            dtype=self.dtype,
            view=self.view,
        )

    def with_integers(self, weight: Quantized) -> QuantizedProduct:
        """Other integers and scales of the shape of these, such as `weight_only` gives them."""
        codes = jnp.swapaxes(weight.units(jnp.int16).astype(jnp.int8), -1, -2)
        if self.order is not None:
            codes = jnp.take_along_axis(codes, self.order[..., None, :], axis=-1)
        return dataclasses.replace(self, codes=codes, scale=weight.scale)

    def without_latent(self) -> QuantizedProduct:
        """The same integers, without the weights that training moves."""
        return dataclasses.replace(self, latent=None)

    def masked(self, kept: jax.Array) -> QuantizedProduct:
        """With code 0 where a bool matrix `(*stack, in, out)` is False."""
        kept = fill_up(jnp.swapaxes(kept, -1, -2), self.codes.shape[-1])
        if self.order is not None:
            kept = jnp.take_along_axis(kept, self.order[..., None, :], axis=-1)
        return dataclasses.replace(self, codes=jnp.where(kept, self.codes, jnp.int8(0)))

    def matrix(self) -> jax.Array:
        """Dense `(*stack, in, out)` matrix, in `dtype`."""
        return self.scaled_by(self.scale).astype(self.dtype)

    def scaled_by(self, scale: jax.Array) -> jax.Array:
        """The matrix in float32, with other scales of the same shape."""
        codes = jnp.swapaxes(self.codes, -1, -2).astype(jnp.float32)
        values = combine(codes, scale.astype(jnp.float32), jnp.multiply)
        if self.order is None:
            return values[..., : self.view.in_dim, :]
        return jnp.take_along_axis(values, jnp.argsort(self.order, axis=-1)[..., None], axis=-2)

    def _codes_by_input(self) -> jax.Array:
        """Codes `(*stack, out, in)` in the order of the inputs."""
        if self.order is None:
            return self.codes[..., : self.view.in_dim]
        places = jnp.argsort(self.order, axis=-1)
        return jnp.take_along_axis(self.codes, places[..., None, :], axis=-1)

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
        y = matrix_product(x, self.latent, self.without_latent())
        return y.astype(preferred_element_type or x.dtype)

    def conv(self, x: jax.Array, **params: Any) -> jax.Array | None:
        """Rounds the inputs, example by example, and convolves integers."""
        if self.scale.shape[-2] > 1:
            return None
        y = convolution(x, self, params)
        wanted = params["preferred_element_type"] or jnp.result_type(x.dtype, self.dtype)
        return None if y is None else y.astype(wanted)

    def columns(self, indices: jax.Array) -> jax.Array:
        """Columns of an unstacked matrix as rows, `(n, in)`; NaN for an index out of range."""
        out_dim = self.codes.shape[-2]
        scale = jnp.broadcast_to(self.scale, (self.scale.shape[-2], out_dim))

        def columns(column: jax.Array) -> jax.Array:
            codes = jnp.take(self.codes, column, axis=0)
            picked = dataclasses.replace(
                self.without_latent(), codes=codes, scale=jnp.take(scale, column, axis=1)
            )
            return picked.matrix().T

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
            order=None if self.order is None else PartitionSpec(*stack, None),
        )


def unfit_for_product(weight: Quantized, input_bits: int) -> str | None:
    """Why the integers of a weight cannot be multiplied with integers; None where they can."""
    if weight.offset is not None or (weight.zero_point is not None and weight.bits == 8):
        return (
            "the weight has offsets, or zero points of 8 bits, with which its integers do not fit "
            "a byte. Quantize it on a symmetric grid, such as 'narrow', or with fewer bits."
        )
    if weight.scale.shape[-2] > 1 and weight.view.axes.kind == "conv":
        return (
            f"the weight has {weight.scale.shape[-2]} scales for the inputs of one output, but the "
            "sums of a convolution's window can only be scaled as a whole. Quantize it with "
            "group_size=None or 'tensor'."
        )
    if weight.group_index is not None and (problem := _unfit_index(weight)):
        return problem
    zero = weight.zero_point
    if zero is not None and not isinstance(zero, Tracer | jax.ShapeDtypeStruct):
        most = int(jnp.max(zero, initial=0))
        if most > 2**weight.bits:
            return (
                f"the weight has a zero point of {most}, too far from its {weight.bits}-bit codes "
                "for their difference to fit a byte as it should: at most "
                f"{2**weight.bits} is. Dequantize it with `materialize`, and quantize it anew."
            )
    longest = weight.group_size or weight.in_dim
    return unfit_length(longest, _centred_bits(weight), input_bits)


def _unfit_index(weight: Quantized) -> str | None:
    index, rows = weight.group_index, weight.scale.shape[-2]
    if isinstance(index, Tracer):
        return (
            "the weight has inputs of groups in an order that is traced, of which nothing can be "
            "told. Call this outside `jit`."
        )
    if isinstance(index, jax.ShapeDtypeStruct) and not weight.full_group:
        return None
    if weight.full_group:
        return (
            f"the weight has scattered groups of {weight.full_group} inputs and one of "
            f"{weight.in_dim % weight.full_group}, but sums of integers are those of groups of one "
            f"size. Choose a group_size that divides the {weight.in_dim} inputs."
        )
    counts = jax.nn.one_hot(index, rows, dtype=jnp.int32).sum(-2)
    if (counts == weight.in_dim // rows).all():
        return None
    return (
        f"the weight has groups of {int(counts.min())} to {int(counts.max())} inputs, but sums of "
        "integers are those of groups of one size. Choose a group_size that divides the "
        f"{weight.in_dim} inputs."
    )


def _centred_bits(weight: Quantized) -> int:
    return weight.bits + (weight.zero_point is not None)


def unfit_length(in_dim: int, bits: int, input_bits: int) -> str | None:
    """Says so where a sum of `in_dim` products may not fit into 32 bits."""
    longest = _INT32_MAX // (2 ** (bits - 1) * largest_integer(input_bits))
    if in_dim <= longest:
        return None
    return (
        f"sums of {in_dim} products of {bits}-bit weights and {input_bits}-bit inputs may not fit "
        f"into 32 bits. At most {longest} are safe; choose fewer bits, or leave this weight out "
        "with `partition`."
    )
