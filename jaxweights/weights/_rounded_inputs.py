"""RoundedInputs: a weight whose inputs become narrow floats before they are multiplied."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._divide import divide
from jaxweights.weights._masked import Masked
from jaxweights.weights._matrix_weight import MatrixWeight, matrix_parts, wide_dtype
from jaxweights.weights._microscaling import InputForm, ScaleRule, input_block, round_to_blocks
from jaxweights.weights._minifloat import ELEMENTS, nearest_minifloat
from jaxweights.weights._weight import Weight, is_weight, materialize, static, weight_dataclass

LARGEST = ELEMENTS["e4m3"].largest


@weight_dataclass
class RoundedInputs(MatrixWeight):
    r"""A matrix whose inputs are rounded to narrow floats when it is multiplied.

    Products with activations scale each token to the range of e4m3 and round it:

        y[t, o] = a[t] * sum_i e4m3(x[t, i] / a[t]) * base[i, o]
        a[t] = max_i |x[t, i]| / 448, or input_scale

    with a sum in float32. With a `group_size`, every so many inputs of a token have an `a` of their
    own. In a convolution the magnitude that sets it is the largest of an example, whose windows
    share their inputs. A base of 8-bit floats makes this the FP8 product of other runtimes; one of
    four-bit integers their W4A8. With a `form`, blocks of inputs of a token are rounded to a
    microscaling format instead, whose scales are narrow, too.

    The gradient of `x` is that of the product with the base, as if nothing had been rounded; that
    of the base, where it has one, is that of its product with the rounded activations. Other uses
    than `x @ weight` and convolutions, such as a look-up, take the base and round nothing else.

    Args:
      base: The `(*stack, in, out)` matrix: an array, or a represented weight of this shape.
      input_scale: `(*stack, 1, 1)` float32, the `a` of all tokens; None finds one for each. Of the
        form "nvfp4" it is G, by which the scales of blocks are divided, and has to be given.
      group_size: Inputs of a token that share an `a`, which divide their number; None for all.
      form: "mxfp4", "mxfp6", "mxfp8" or "nvfp4", whose block divides the inputs; None for `a`s.
      scale_rule: How the scales of MX formats are found, as in `mx`.
      view: How the matrix relates to the leaf.

    Example:
      >>> weight = RoundedInputs.of(jnp.eye(2))
      >>> jax.jit(jw.lift(lambda w, x: x @ w))(weight, jnp.array([[448.0, 1.03]]))
      Array([[448.,   1.]], dtype=float32)
    """

    base: Any
    input_scale: jax.Array | None = None
    group_size: int | None = static(default=None)
    form: InputForm | None = static(default=None)
    scale_rule: ScaleRule = static(default="floor")
    view: View = static(default=None)

    @classmethod
    def of(
        cls,
        weight: Any,
        input_scale: jax.Array | None = None,
        *,
        group_size: int | None = None,
        form: InputForm | None = None,
        scale_rule: ScaleRule = "floor",
        view: View | None = None,
    ) -> RoundedInputs:
        """Rounds the inputs of a weight.

        Args:
          weight: Dense array, a `Scaled` weight or one that is `Masked`.
          input_scale: As in the class.
          group_size: As in the class.
          form: As in the class.
          scale_rule: As in the class.
          view: How the matrix relates to the leaf; None takes the weight's own, of an array that
            of a matrix.

        Returns:
          The weight.

        Raises:
          ValueError: If groups or blocks do not divide the inputs, groups are asked for beside
            `input_scale` or `form`, or G is missing or means nothing.
        """
        view = view or _view_of(weight)
        if form is None:
            problem = unfit_groups(group_size, view.in_dim, input_scale is not None)
        else:
            problem = _unfit_form(form, group_size, input_scale) or unfit_form(form, view.in_dim)
        if problem is not None:
            raise ValueError(f"RoundedInputs: {problem}")
        matrix = _as_matrix(weight, view)
        return cls(matrix, input_scale, group_size, form, scale_rule, view)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight."""
        return self.base.dtype

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.base.shape[:-2])

    @property
    def _has_blocks(self) -> bool:
        return self.group_size is not None or self.form is not None

    def around(self, weight: Any) -> RoundedInputs:
        """Another weight, whose inputs are rounded as those of this one."""
        return RoundedInputs.of(
            weight,
            self.input_scale,
            group_size=self.group_size,
            form=self.form,
            scale_rule=self.scale_rule,
        )

    def weight_only(self) -> Any:
        """The same weight, whose inputs are multiplied as they are."""
        return _as_leaf(self.base, self.view)

    def matrix(self) -> jax.Array:
        """Dense `(*stack, in, out)` matrix."""
        return materialize(self.base)

    def astype(self, dtype: DTypeLike) -> RoundedInputs | None:
        """The weight with its base in another dtype."""
        base = self.base.astype(dtype)
        return None if base is None else dataclasses.replace(self, base=base)

    def multiply(
        self,
        x: jax.Array,
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """Rounds `x` of shape `(*stack, tokens, in)`, multiplies, and scales the result."""
        wide = wide_dtype(x.dtype)
        options = {"precision": precision, "preferred_element_type": wide}
        if self._has_blocks:  # sums of several scales
            y = self._times(self._rounded(x).astype(wide), **options)
        else:
            units, step = round_to_e4m3(x, self.input_scale)
            y = self._times(units, **options) * step.astype(wide)
        return y.astype(preferred_element_type or x.dtype)

    def multiply_transposed(self, x: jax.Array, **options: Any) -> jax.Array | None:
        """`x @ matrix.T`: what meets the outputs is not rounded."""
        y = self.base.multiply_transposed(x, **options) if _multiplies(self.base) else None
        return MatrixWeight.multiply_transposed(self, x, **options) if y is None else y

    def conv(self, x: jax.Array, **params: Any) -> jax.Array | None:
        """Rounds the inputs, example by example, and convolves."""
        if self._has_blocks or params["batch_group_count"] != 1:
            return None
        over = tuple(params["dimension_numbers"].lhs_spec[1:])
        fixed = self.input_scale
        scale = None if fixed is None else fixed.reshape((1,) * x.ndim)
        units, step = round_to_e4m3(x, scale, over=over)
        rounded = (units.astype(jnp.float32) * step).astype(x.dtype)
        return jax.lax.conv_general_dilated(rounded, self.materialize(), **params)

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array, **options: Any) -> jax.Array | None:
        """Rounds every row as its own matrix of the stack wants it."""
        if not self.view.is_plain or self.ndim != 3:
            return None
        scale = self.input_scale
        if scale is not None:
            ends = jnp.cumsum(group_sizes)
            group = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side="right")
            scale = jnp.take(scale[..., 0], group, axis=0, mode="clip")
        rounded = self._rounded(x, scale).astype(x.dtype)
        return jax.lax.ragged_dot(rounded, self.materialize(), group_sizes, **options)

    def columns(self, indices: jax.Array) -> jax.Array | None:
        """Columns of the base as rows."""
        return self.base.columns(indices) if _multiplies(self.base) else None

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Split by outputs or by matrices; a token's scale needs all of its inputs."""
        parts = matrix_parts(self.view, self.ndim, spec)
        apart = self._has_blocks or self.input_scale is None
        if parts is None or (parts[-2] is not None and apart):
            return None
        whole = PartitionSpec(*parts)
        base = self.base.partition(whole, mesh) if is_weight(self.base) else whole
        if base is None:
            return None
        scale = None if self.input_scale is None else PartitionSpec(*parts[:-2], None, None)
        return dataclasses.replace(self, base=base, input_scale=scale)

    def as_part(self, shape: tuple[int, ...]) -> Weight:
        """Takes over the lengths of the part."""
        view = View.of(shape, self.view.axes)
        stack = tuple(shape[a] for a in view.stack_axes(len(shape)))
        base = self.base
        if is_weight(base):
            base = base.as_part((*stack, view.in_dim, view.out_dim))
        return dataclasses.replace(self, base=base, view=view)

    def _times(self, x: jax.Array, **options: Any) -> jax.Array:
        y = self.base.multiply(x, **options) if _multiplies(self.base) else None
        return MatrixWeight.multiply(self, x, **options) if y is None else y  # type: ignore

    def _rounded(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """Rows `(..., tokens, in)` as the base meets them, float32."""
        shape = x.shape
        if self.form is not None:
            overall = self.input_scale if scale is None else scale
            return round_to_blocks(x, self.form, rule=self.scale_rule, overall=overall)
        if self.group_size is not None:
            x = x.reshape(*shape[:-1], shape[-1] // self.group_size, self.group_size)
        units, step = round_to_e4m3(x, scale)
        return (units.astype(jnp.float32) * step).reshape(shape)


def unfit_groups(group_size: int | None, in_dim: int, fixed: bool) -> str | None:
    """What is wrong with the groups of a token's inputs, if anything."""
    if group_size is None:
        return None
    if fixed:
        return (
            f"group_size={group_size}, but input_scale is that of all inputs. Leave one of them "
            "out."
        )
    if in_dim % group_size == 0:
        return None
    divisors = ", ".join(str(d) for d in range(1, in_dim + 1) if in_dim % d == 0)
    return (
        f"groups of {group_size} inputs of a token do not divide the input axis, which has length "
        f"{in_dim}. Choose one of {divisors}, or None for all inputs of a token."
    )


def unfit_form(form: InputForm, in_dim: int) -> str | None:
    """What is wrong with a microscaling format for so many inputs, if anything."""
    size = input_block(form)
    if in_dim % size == 0:
        return None
    return (
        f"blocks of {size} inputs, which {form} has, do not divide the input axis, which has "
        f"length {in_dim}. Leave this weight out with `partition`, or round its inputs in another "
        "way."
    )


def _unfit_form(form: InputForm, group_size: int | None, overall: Any) -> str | None:
    if group_size is not None:
        return f"group_size={group_size}, but form={form!r} has blocks. Leave one of them out."
    if (form == "nvfp4") != (overall is not None):
        needed = "needs G as input_scale" if form == "nvfp4" else "has no input_scale"
        return f"form={form!r} {needed}. 'nvfp4' alone divides the scales of its blocks by one."
    return None


def round_to_e4m3(
    x: jax.Array, scale: jax.Array | None = None, *, over: tuple[int, ...] = (-1,)
) -> tuple[jax.Array, jax.Array]:
    """Rounds activations to 8-bit floats; the gradient passes straight through.

    Args:
      x: Activations, such as `(..., in)`, floating.
      scale: Of what is rounded, broadcasting against `x`; None gives all that lies along `over` the
        one that brings its largest magnitude to 448.
      over: Axes that share a scale.

    Returns:
      Numbers of `float8_e4m3fn` in the dtype of `x`, which holds them all, and their scales,
      float32, of length 1 along `over` where found. Where all is zero the scale is 1.
    """
    wide = x.astype(jnp.float32)
    if scale is None:
        scale = divide(jnp.max(jnp.abs(wide), axis=over, keepdims=True, initial=0.0), LARGEST)
        scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    scale = jax.lax.stop_gradient(scale)
    return nearest_minifloat(divide(wide, scale), ELEMENTS["e4m3"]).astype(x.dtype), scale


def _multiplies(base: Any) -> bool:
    return isinstance(base, MatrixWeight)


def _view_of(weight: Any) -> View:
    if isinstance(weight, Masked):
        return _view_of(weight.base)
    return weight.view if is_weight(weight) else View.of(weight.shape)


def _as_matrix(weight: Any, view: View) -> Any:
    """The `(*stack, in, out)` matrix of a leaf, represented as the leaf is."""
    if not is_weight(weight):
        return view.to_matrix(weight)
    if isinstance(weight, Masked):
        return Masked(_as_matrix(weight.base, view), view.to_matrix(weight.mask))
    stack = (weight.shape[a] for a in view.stack_axes(weight.ndim))
    plain = View.of((*stack, view.in_dim, view.out_dim))
    return dataclasses.replace(weight, view=plain)


def _as_leaf(matrix: Any, view: View) -> Any:
    """The leaf of a `(*stack, in, out)` matrix."""
    if not is_weight(matrix):
        return view.from_matrix(matrix)
    if isinstance(matrix, Masked):
        return Masked(_as_leaf(matrix.base, view), view.from_matrix(matrix.mask))
    return dataclasses.replace(matrix, view=view)
