"""LowRank: a base weight plus a product of two thin trainable factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._matrix_weight import MatrixWeight, matrix_parts
from jaxweights.weights._weight import Weight, is_weight, materialize, static, weight_dataclass


@weight_dataclass
class LowRank(Weight):
    r"""A weight :math:`W + s\,A B` that keeps the base :math:`W` and the factors apart.

    A product with activations costs the base's product and two thin ones, and its gradient for
    the factors never forms a matrix of the weight's size. The base may itself be represented:
    over a quantized base this is QLoRA. A base that has no cheap product of its own is
    materialised for it, alone, so that the factors stay thin in any case.

    Invariants, with `(*stack, in, out) = view.to_matrix(base).shape`:
    `down.shape == (*stack, in, rank)`, `up.shape == (*stack, rank, out)`,
    `scaling.shape == stack`, and `materialize()` is `base + scaling * (down @ up)`, summed in
    float32 (or wider) and rounded once to the base's dtype.

    Args:
      base: The weight under the factors, dense or represented, of the logical shape.
      down: First factor; activations meet it first.
      up: Second factor.
      scaling: Factor of the product, `alpha / rank` for LoRA. An array, so that changing it
        compiles nothing anew.
      view: How the base's axes form the matrix.

    Example:
      >>> base = jnp.eye(4)
      >>> weight = LowRank.over(base, jnp.ones((4, 1)), jnp.ones((1, 4)), scaling=0.5)
      >>> weight.materialize()[0]
      Array([1.5, 0.5, 0.5, 0.5], dtype=float32)
    """

    base: Any
    down: jax.Array
    up: jax.Array
    scaling: jax.Array
    view: View = static()

    @classmethod
    def over(
        cls,
        base: Any,
        down: jax.Array,
        up: jax.Array,
        *,
        scaling: float | jax.Array = 1.0,
        view: View | None = None,
    ) -> LowRank:
        """Builds the weight from its parts.

        Args:
          base: Dense array or represented weight.
          down: `(*stack, in, rank)`.
          up: `(*stack, rank, out)`.
          scaling: One number, or one for each matrix of the stack.
          view: Which axes of `base` form the matrix; the last two if None.

        Returns:
          The weight.

        Raises:
          ValueError: If the shapes do not fit together.
        """
        view = View.of(base.shape) if view is None else view
        stack = tuple(base.shape[a] for a in view.stack_axes(len(base.shape)))
        rank = down.shape[-1]
        expected = ((*stack, view.in_dim, rank), (*stack, rank, view.out_dim))
        if (tuple(down.shape), tuple(up.shape)) != expected:
            raise ValueError(
                f"LowRank.over: down has shape {tuple(down.shape)} and up {tuple(up.shape)}, but a "
                f"base of shape {tuple(base.shape)} needs {expected[0]} and {expected[1]}. "
                "State the axes of the base with view=View.of(base.shape, axes)."
            )
        return cls(base, down, up, jnp.broadcast_to(jnp.float32(scaling), stack), view)

    @property
    def rank(self) -> int:
        """Width of the factors."""
        return self.down.shape[-1]

    @property
    def delta(self) -> Delta:
        """The product of the factors alone, as a weight."""
        # The base's shape, not the view's, is that of the part at hand when a mesh axis splits it.
        view = View.of(self.base.shape, self.view.axes)
        return Delta(self.down, self.up, self.scaling, view)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight: the base's."""
        return self.base.dtype

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading stack axes that the base and the factors share."""
        own = self.delta.stack_shape
        return own[: len(self.base.stack_shape)] if is_weight(self.base) else own

    def materialize(self) -> jax.Array:
        """The dense weight, rounded to the base's dtype once."""
        wide = np.promote_types(self.dtype, np.float32)
        delta = self.delta.materialize()
        return (materialize(self.base).astype(wide) + delta.astype(wide)).astype(self.dtype)

    def astype(self, dtype: DTypeLike) -> Weight | None:
        """Casts the base; the factors keep their own dtype, in which they are trained."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self._with_base(self.base.astype(dtype), self.view)

    def dot(
        self,
        x: jax.Array,
        dimension_numbers: tuple[Any, Any],
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array | None:
        """`x @ base + (x @ down) @ up`, over the inputs or, transposed, over the outputs."""
        options: dict[str, Any] = {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
        }
        y = self.base.dot(x, dimension_numbers, **options) if is_weight(self.base) else None
        if y is None:
            y = jax.lax.dot_general(x, materialize(self.base), dimension_numbers, **options)
        options["preferred_element_type"] = y.dtype
        delta = self.delta.dot(x, dimension_numbers, **options)
        return None if delta is None else y + delta

    def conv(self, x: jax.Array, **params: Any) -> jax.Array | None:
        """The base's convolution, and one with `down` that a 1x1 product with `up` follows."""
        delta = self.delta.conv(x, **params)
        if delta is None:
            return None
        y = self.base.conv(x, **params) if is_weight(self.base) else None
        if y is None:
            y = jax.lax.conv_general_dilated(x, materialize(self.base), **params)
        return y + delta.astype(y.dtype)

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array, **options: Any) -> jax.Array | None:
        """Every group of rows of `x` by its expert's base, plus by its expert's factors."""
        delta = self.delta.ragged_dot(x, group_sizes, **options)
        if delta is None:
            return None
        y = self.base.ragged_dot(x, group_sizes, **options) if is_weight(self.base) else None
        if y is None:
            y = jax.lax.ragged_dot(x, materialize(self.base), group_sizes, **options)
        return y + delta.astype(y.dtype)

    def take(self, indices: jax.Array) -> jax.Array | None:
        """Rows of the base plus rows of the product."""
        delta = self.delta.take(indices)
        if delta is None:
            return None
        base = self.base.take(indices) if is_weight(self.base) else None
        if base is None:
            base = jnp.take(materialize(self.base), indices, axis=0)
        return (base.astype(delta.dtype) + delta).astype(self.dtype)

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """Permutes the axes of the base; the factors stay."""
        view = self.view.transposed(self.ndim, permutation)
        return None if view is None else self._with_base(self.base.transpose(permutation), view)

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """Reshapes the base, where the matrix stays the same."""
        view = self.view.reshaped(self.shape, shape)
        if view is None:
            return self.reshape_stack(shape)
        return self._with_base(self.base.reshape(shape), view)

    def partition(self, spec: Any, mesh: Any) -> LowRank | None:
        """`down` is split like the input axis, `up` like the output axis, the rank never."""
        base = self.base.partition(spec, mesh) if is_weight(self.base) else spec
        parts = matrix_parts(self.view, self.ndim, spec)
        if base is None or parts is None:
            return None
        *stack, first_in, first_out = parts
        return dataclasses.replace(
            self,
            base=base,
            down=PartitionSpec(*stack, first_in, None),
            up=PartitionSpec(*stack, None, first_out),
            scaling=PartitionSpec(*stack),
        )

    def _with_base(self, base: Any, view: View) -> LowRank | None:
        return None if base is None else dataclasses.replace(self, base=base, view=view)


@weight_dataclass
class Delta(MatrixWeight):
    """The product `scaling * (down @ up)` alone, of the shape of the weight it is added to.

    Args:
      down: `(*stack, in, rank)`.
      up: `(*stack, rank, out)`.
      scaling: `stack`.
      view: How the axes of the product, in its logical shape, form the matrix.
    """

    down: jax.Array
    up: jax.Array
    scaling: jax.Array
    view: View = static()

    @property
    def dtype(self) -> Any:
        """At least float32: what is added to the base is rounded with it, not before."""
        # NumPy's promotion, which holds under jax_numpy_dtype_promotion="strict", too.
        return np.result_type(self.down.dtype, self.up.dtype, np.float32)

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.down.shape[:-2])

    def scaled_up(self, dtype: DTypeLike) -> jax.Array:
        """`up` with the scaling in it, so that the scaling is never rounded on its own."""
        scaling = self.scaling[..., None, None].astype(self.dtype)
        return (self.up.astype(self.dtype) * scaling).astype(dtype)

    def matrix(self) -> jax.Array:
        """Dense product, `(*stack, in, out)`."""
        down = self.down.astype(self.dtype)
        return jnp.matmul(down, self.scaled_up(self.dtype), precision="highest")

    def multiply(self, x: jax.Array, **options: Any) -> jax.Array:
        """`(x @ down) @ up`, in the dtype of the activations."""
        h = jnp.matmul(x, self.down.astype(x.dtype), precision=options.get("precision"))
        return jnp.matmul(h, self.scaled_up(x.dtype), **options)

    def multiply_transposed(self, x: jax.Array, **options: Any) -> jax.Array:
        """`(x @ up.T) @ down.T`."""
        up = jnp.swapaxes(self.scaled_up(x.dtype), -1, -2)
        down = jnp.swapaxes(self.down.astype(x.dtype), -1, -2)
        return jnp.matmul(jnp.matmul(x, up, precision=options.get("precision")), down, **options)

    def columns(self, indices: jax.Array) -> jax.Array:
        """Columns of the product as rows, `(n, in)`."""
        picked = jnp.take(self.scaled_up(self.dtype), indices, axis=1).T  # (n, rank)
        return jnp.matmul(picked, self.down.T.astype(self.dtype), precision="highest")

    def take(self, indices: jax.Array) -> jax.Array | None:
        """Rows along axis 0, be it the output axis (a table) or the only input axis."""
        if self.view.axes.inputs != (-self.ndim,) or self._stack:
            return super().take(indices)
        picked = jnp.take(self.down.astype(self.dtype), indices.reshape(-1), axis=0)
        rows = jnp.matmul(picked, self.scaled_up(self.dtype), precision="highest")
        order = tuple(np.argsort(self.view.axes.outputs) + 1)
        rows = rows.reshape(-1, *self.view.out_shape).transpose(0, *order)
        return rows.reshape(*indices.shape, *self.shape[1:])

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array, **options: Any) -> jax.Array | None:
        """Two thin ragged products, for a plain stack of matrices."""
        if not self.view.is_plain or len(self._stack) != 1:
            return None
        thin = options | {"preferred_element_type": None}
        h = jax.lax.ragged_dot(x, self.down.astype(x.dtype), group_sizes, **thin)
        return jax.lax.ragged_dot(h, self.scaled_up(x.dtype), group_sizes, **options)

    def conv(self, x: jax.Array, **params: Any) -> jax.Array | None:
        """A convolution to `rank` channels, then a product at every position."""
        if params.get("feature_group_count", 1) != 1 or params.get("batch_group_count", 1) != 1:
            return None
        numbers = jax.lax.conv_dimension_numbers(x.shape, self.shape, params["dimension_numbers"])
        out_axis = numbers.rhs_spec[0] - self.ndim
        if self._stack or self.view.axes.outputs != (out_axis,):
            return None
        thin = dataclasses.replace(self.view, out_shape=(self.down.shape[-1],))
        kernel = thin.from_matrix(self.down.astype(x.dtype))
        channels = numbers.out_spec[1]
        thin_params: dict[str, Any] = params | {
            "dimension_numbers": numbers,
            "preferred_element_type": None,
        }
        h = jax.lax.conv_general_dilated(x, kernel, **thin_params)
        y = jax.lax.dot_general(
            h,
            self.scaled_up(x.dtype),
            (((channels,), (0,)), ((), ())),
            precision=params.get("precision"),
            preferred_element_type=params.get("preferred_element_type"),
        )
        return jnp.moveaxis(y, -1, channels)
