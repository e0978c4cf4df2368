"""Products and convolutions of integers: activations are rounded, sums are of 32 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxweights.weights._divide import divide

if TYPE_CHECKING:
    from jaxweights.weights._quantized_product import QuantizedProduct

# A product with fewer rows is no matrix product to XLA's CPU backend, which then takes many times
# as long as with four (seen with jax 0.10.2).
_FEWEST_ROWS = 4


def largest_integer(bits: int) -> int:
    """The largest magnitude that activations are rounded to."""
    return 2 ** (bits - 1) - 1


def round_inputs(
    x: jax.Array, bits: int, scale: jax.Array | None = None, *, over: tuple[int, ...] = (-1,)
) -> tuple[jax.Array, jax.Array]:
    """Rounds activations to integers.

    Args:
      x: Activations, such as `(..., in)`, floating.
      bits: Bits of the integers, 2 to 8.
      scale: Step, broadcasting against `x`; None gives all that lies along `over` the one that its
        largest magnitude asks for.
      over: Axes that share a step.

    Returns:
      int8 integers of the shape of `x`, and their steps, float32, of length 1 along `over` where
      found. Where all is zero the step is 1.
    """
    x = x.astype(jnp.float32)
    largest = largest_integer(bits)
    if scale is None:
        scale = divide(jnp.max(jnp.abs(x), axis=over, keepdims=True), largest)
        scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    steps = jnp.clip(jnp.round(divide(x, scale)), -largest, largest)
    return steps.astype(jnp.int8), scale


def fill_up(field: jax.Array, length: int) -> jax.Array:
    """A field with zeros behind its last axis, up to this length."""
    missing = length - field.shape[-1]
    return jnp.pad(field, [(0, 0)] * (field.ndim - 1) + [(0, missing)]) if missing else field


@jax.custom_jvp
def matrix_product(x: jax.Array, latent: jax.Array | None, weight: QuantizedProduct) -> jax.Array:
    """`x @ weight` for `x` of shape `(*stack, tokens, in)`, float32.

    Args:
      x: Activations.
      latent: What the gradient of the integers goes to, `(*stack, in, out)`, or None.
      weight: The integers, without latent weights.
    """
    del latent
    integers, step = round_inputs(x, weight.input_bits, weight.input_scale)
    integers = fill_up(integers, weight.codes.shape[-1])
    if weight.order is not None:
        integers = jnp.take_along_axis(integers, weight.order[..., None, :], axis=-1)
    scale = weight.scale.astype(jnp.float32)
    if scale.shape[-2] == 1:
        return _sums(integers, weight.codes) * (step * scale)
    return _sums_of_groups(integers, weight.codes, scale) * step


@matrix_product.defjvp
def _matrix_product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, latent, weight = primals
    dx, dlatent, dweight = tangents
    integers, step = round_inputs(x, weight.input_bits, weight.input_scale)
    rounded = integers.astype(jnp.float32) * step
    tangent = jnp.matmul(dx.astype(jnp.float32), weight.matrix().astype(jnp.float32))
    if weight.scale.shape[-2] == 1:
        sums = _sums(integers, weight.codes) * step
        tangent = tangent + sums * dweight.scale.astype(jnp.float32)
    else:
        tangent = tangent + jnp.matmul(rounded, weight.scaled_by(dweight.scale))
    if latent is not None:
        tangent = tangent + jnp.matmul(rounded, dlatent.astype(jnp.float32))
    return matrix_product(x, latent, weight), tangent


def _sums_of_groups(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """The sums of every group of inputs times its scales, added up in float32.

    Args:
      x: int8 `(*stack, tokens, in)`.
      codes: int8 `(*stack, out, in)`.
      scale: `(*stack, groups, out)` or `(*stack, groups, 1)`.
    """
    size = codes.shape[-1] // scale.shape[-2]

    def scaled(index: Any, row: jax.Array) -> jax.Array:
        part = lambda field: jax.lax.dynamic_slice_in_dim(field, index * size, size, axis=-1)  # noqa: E731
        return _sums(part(x), part(codes)) * row[..., None, :]

    def add(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + scaled(*one), None

    # One group at a time: all at once would hold a product for each of them.
    rows = jnp.moveaxis(scale, -2, 0)
    rest = (jnp.arange(1, len(rows), dtype=jnp.int32), rows[1:])
    return jax.lax.scan(add, scaled(0, rows[0]), rest)[0]


def _sums(x: jax.Array, codes: jax.Array) -> jax.Array:
    """`x @ codes.T` for int8 `(*stack, tokens, in)` and `(*stack, out, in)`, as float32."""
    tokens, stack = x.shape[-2], codes.shape[:-2]
    if 0 < tokens < _FEWEST_ROWS:
        x = jnp.pad(x, [(0, 0)] * len(stack) + [(0, _FEWEST_ROWS - tokens), (0, 0)])
    x = jnp.broadcast_to(x, (*stack, *x.shape[-2:]))
    axes = tuple(range(len(stack)))
    last = len(stack) + 1
    # Weights first: faster with up to 64 tokens on a CPU. Turned as floats: XLA turns the operands
    # of a product that is itself turned.
    sums = jax.lax.dot_general(
        codes, x, (((last,), (last,)), (axes, axes)), preferred_element_type=jnp.int32
    )  # (*stack, out, tokens)
    return jnp.swapaxes(sums[..., :tokens].astype(jnp.float32), -1, -2)


def convolution(x: jax.Array, weight: QuantizedProduct, params: dict[str, Any]) -> jax.Array | None:
    """`jax.lax.conv_general_dilated(x, weight, **params)`, float32, with a step for every example.

    Returns:
      The result; None where the kernel's matrix is not the one that is contracted, or examples mix.
    """
    numbers = params["dimension_numbers"]
    axes, ndim = weight.view.axes, weight.ndim
    out_axis, *in_axes = numbers.rhs_spec
    inputs = sorted(axis % ndim for axis in axes.inputs)
    fits = [axis % ndim for axis in axes.outputs] == [out_axis] and inputs == sorted(in_axes)
    if not fits or params["batch_group_count"] != 1:
        return None
    batch, *others = numbers.lhs_spec
    along = lambda axis, length: tuple(length if i == axis else 1 for i in range(x.ndim))  # noqa: E731
    steps, channels = along(numbers.out_spec[0], x.shape[batch]), along(numbers.out_spec[1], -1)
    kernel = lambda matrix: weight.view.from_matrix(matrix)  # noqa: E731
    convolve = lambda x, matrix, **options: jax.lax.conv_general_dilated(  # noqa: E731
        x, kernel(matrix), **{**params, **options}
    )
    floats = {"preferred_element_type": jnp.float32}

    def rounded(x: jax.Array, weight: QuantizedProduct) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Integers, their steps, and the sums times the steps."""
        fixed = weight.input_scale
        scale = None if fixed is None else fixed.reshape((1,) * x.ndim)
        integers, step = round_inputs(x, weight.input_bits, scale, over=tuple(others))
        sums = convolve(
            integers,
            jnp.swapaxes(weight.codes, -1, -2),
            precision=None,
            preferred_element_type=jnp.int32,
        )
        own = step if fixed is not None else step.reshape(steps)
        return integers, step, sums.astype(jnp.float32) * own

    @jax.custom_jvp
    def product(x: jax.Array, latent: jax.Array | None, weight: QuantizedProduct) -> jax.Array:
        del latent
        return rounded(x, weight)[2] * weight.scale.astype(jnp.float32).reshape(channels)

    @product.defjvp
    def product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        x, latent, weight = primals
        dx, dlatent, dweight = tangents
        integers, step, sums = rounded(x, weight)
        matrix = weight.matrix().astype(jnp.float32)
        tangent = convolve(dx.astype(jnp.float32), matrix, **floats)
        tangent = tangent + sums * dweight.scale.astype(jnp.float32).reshape(channels)
        if latent is not None:
            values = integers.astype(jnp.float32) * step
            tangent = tangent + convolve(values, dlatent.astype(jnp.float32), **floats)
        return product(x, latent, weight), tangent

    return product(x, weight.latent, weight.without_latent())
