"""Rescaled and Rotated: weights whose inputs are changed before they meet the base."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._hadamard import hadamard_order, hadamard_transform
from jaxweights.weights._matrix_weight import matrix_parts, wide_dtype
from jaxweights.weights._weight import Weight, is_weight, materialize, static, weight_dataclass


class InputChange(Weight):
    """A weight that changes its inputs by a linear map R: `x @ weight = (x R) @ base`.

    Transforms of the weight act on `base`, and its statistics are those of `x R`, which the base
    is multiplied with.
    """

    base: Any
    view: View

    @abc.abstractmethod
    def change(self, rows: jax.Array, *, transposed: bool = False) -> jax.Array:
        """`rows @ R`, or `rows @ R.T`, for rows `(*stack, tokens, in)`; the dtype stays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight."""
        return self.base.dtype

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading stack axes, which base and map share."""
        if is_weight(self.base):
            return self.base.stack_shape
        axes = self.view.stack_axes(self.ndim)
        return tuple(self.shape[axis] for i, axis in enumerate(axes) if i == axis)

    def materialize(self) -> jax.Array:
        """The dense weight, computed in float32 or wider and rounded once."""
        matrix = self.view.to_matrix(materialize(self.base)).astype(wide_dtype(self.dtype))
        rows = self.change(jnp.swapaxes(matrix, -1, -2), transposed=True)
        return self.view.from_matrix(jnp.swapaxes(rows, -1, -2)).astype(self.dtype)

    def changed(self, x: jax.Array, dimension_numbers: tuple[Any, Any]) -> jax.Array | None:
        """What a `dot_general` multiplies the base with in place of `x`.

        Returns:
          An array like `x`; None where the contraction is not over all inputs, or a stack axis is
          no batch axis, so that each of its matrices would want other activations.
        """
        (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
        stack, inputs = self._stack_and_inputs()
        if set(w_contract) != set(inputs) or set(w_batch) != set(stack):
            return None
        batch, contract = dict(zip(w_batch, x_batch)), dict(zip(w_contract, x_contract))
        return self._along(x, [batch[a] for a in stack], [contract[a] for a in inputs])

    def dot(self, x: jax.Array, dimension_numbers: tuple[Any, Any], **options: Any) -> Any:
        """Changes the activations, then multiplies; or the other way round where transposed."""
        new = self.changed(x, dimension_numbers)
        if new is not None:
            return self._base_dot(new, dimension_numbers, **options)
        (_, w_contract), (_, w_batch) = dimension_numbers
        stack, inputs = self._stack_and_inputs()
        kept = sorted(set(range(self.ndim)) - set(w_contract) - set(w_batch))
        if kept != sorted(inputs) or set(w_batch) != set(stack):
            return None
        y = self._base_dot(x, dimension_numbers, **options)
        if y is None:
            return None
        first = y.ndim - len(kept)  # results are (batch, free axes of x, free axes of the weight)
        back = [first + kept.index(a) for a in inputs]
        return self._along(y, [w_batch.index(a) for a in stack], back, transposed=True)

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array, **options: Any) -> jax.Array | None:
        """Changes every row as its own matrix of the stack wants it."""
        if not self.view.is_plain or self.ndim != 3:
            return None
        new = self.changed_ragged(x, group_sizes)
        if is_weight(self.base):
            return self.base.ragged_dot(new, group_sizes, **options)
        return jax.lax.ragged_dot(new, self.base, group_sizes, **options)

    def changed_ragged(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """What a `ragged_dot` multiplies the base with in place of `x` `(tokens, in)`."""
        del group_sizes
        return self.change(x)

    def take(self, indices: jax.Array) -> jax.Array | None:
        """Rows of an embedding table, whose features are its inputs."""
        stack, inputs = self._stack_and_inputs()
        if stack or 0 in inputs:
            return None
        rows = (
            self.base.take(indices)
            if is_weight(self.base)
            else jnp.take(self.base, indices, axis=0)
        )
        if rows is None:
            return None
        return self._along(rows, [], [indices.ndim + a - 1 for a in inputs], transposed=True)

    def astype(self, dtype: DTypeLike) -> Weight | None:
        """The same map before the base in another dtype."""
        return self._with(self.base.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """Permutes the axes of the base."""
        view, permutation = self.view.transposed(self.ndim, permutation), tuple(permutation)
        if view is None:
            return None
        base = self.base
        base = base.transpose(permutation) if is_weight(base) else jnp.transpose(base, permutation)
        return self._with(base, view)

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """Reshapes the base, where the matrix stays the same."""
        view = self.view.reshaped(self.shape, shape)
        if view is None:
            return self.reshape_stack(shape)
        return self._with(self.base.reshape(tuple(shape)), view)

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Base and map are split as the inputs and the outputs are."""
        parts = matrix_parts(self.view, self.ndim, spec)
        base = self.base.partition(spec, mesh) if is_weight(self.base) else spec
        return None if parts is None or base is None else self._partitioned(base, parts)

    @abc.abstractmethod
    def _partitioned(self, base: Any, parts: tuple[Any, ...]) -> Any:
        """The partition specs, given those of the base and of the `(*stack, in, out)` matrix."""

    def _with(self, base: Any, view: View | None = None) -> Weight | None:
        if base is None:
            return None
        return dataclasses.replace(self, base=base, view=view or self.view)  # type: ignore[type-var]

    def _stack_and_inputs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ndim = self.ndim
        return self.view.stack_axes(ndim), tuple(a % ndim for a in self.view.axes.inputs)

    def _base_dot(self, x: jax.Array, dimension_numbers: Any, **options: Any) -> Any:
        if is_weight(self.base):
            return self.base.dot(x, dimension_numbers, **options)
        return jax.lax.dot_general(x, self.base, dimension_numbers, **options)

    def _along(
        self, x: jax.Array, front: Sequence[int], back: Sequence[int], *, transposed: bool = False
    ) -> jax.Array:
        """Changes an array whose axes `front` are the stack and `back` the inputs."""
        free = [a for a in range(x.ndim) if a not in front and a not in back]
        order = (*front, *free, *back)
        size = lambda axes: math.prod(x.shape[a] for a in axes)  # noqa: E731
        rows = jnp.transpose(x, order)
        shape = rows.shape
        rows = rows.reshape(*(x.shape[a] for a in front), size(free), size(back))
        rows = self.change(rows, transposed=transposed)
        return jnp.transpose(rows.reshape(shape), tuple(np.argsort(order)))


@weight_dataclass
class Rescaled(InputChange):
    """A weight whose inputs are multiplied by a vector before they meet the base.

        matrix[..., i, o] = scale[..., i, 0] * base_matrix[..., i, o]

    What AWQ and SmoothQuant leave where the vector cannot be folded into a neighbour: the base,
    often quantized, holds the weight times 1 / scale. Invariant: `scale.shape == (*stack, in, 1)`.

    Args:
      base: Dense array or another represented weight.
      scale: Floating.
      view: How the matrix relates to the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> Rescaled.of(jnp.ones((2, 3)), jnp.array([2.0, 0.5])).materialize()
      Array([[2. , 2. , 2. ],
             [0.5, 0.5, 0.5]], dtype=float32)
    """

    base: Any
    scale: jax.Array
    view: View = static()

    @classmethod
    def of(cls, base: Any, scale: jax.Array, view: View | None = None) -> Rescaled:
        """Puts a vector before a weight.

        Args:
          base: Dense array or represented weight.
          scale: `(*stack, in)`, floating.
          view: How the matrix relates to the leaf; None means that the leaf is the matrix.

        Returns:
          The weight.

        Raises:
          ValueError: If the lengths do not fit.
        """
        view = View.of(base.shape) if view is None else view
        stack = tuple(base.shape[a] for a in view.stack_axes(len(base.shape)))
        if tuple(scale.shape) != (*stack, view.in_dim):
            raise ValueError(
                f"Rescaled: scale has shape {tuple(scale.shape)}, but a weight of shape "
                f"{tuple(base.shape)} with {view.axes} needs {(*stack, view.in_dim)}."
            )
        return cls(base, scale[..., None], view)

    def change(self, rows: jax.Array, *, transposed: bool = False) -> jax.Array:
        """`rows * scale`, in float32 or wider, rounded once."""
        del transposed  # a diagonal map is its own transpose
        wide = wide_dtype(rows.dtype)
        scale = jnp.swapaxes(self.scale, -1, -2).astype(wide)
        return (rows.astype(wide) * scale).astype(rows.dtype)

    def changed_ragged(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Every row times the vector of its group."""
        wide = wide_dtype(x.dtype)
        ends = jnp.cumsum(group_sizes)
        group = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side="right")
        scale = jnp.take(self.scale[..., 0], group, axis=0, mode="clip").astype(wide)
        return (x.astype(wide) * scale).astype(x.dtype)

    def _partitioned(self, base: Any, parts: tuple[Any, ...]) -> Rescaled:
        return dataclasses.replace(self, base=base, scale=PartitionSpec(*parts[:-1], None))


@weight_dataclass
class Rotated(InputChange):
    r"""A weight whose inputs go through a Hadamard transform before they meet the base.

    `x @ weight = hadamard_transform(x, order=order) @ base`. The transform spreads a feature with
    outliers over all of its block, which makes the activations that the base sees easy to quantize.

    Args:
      base: Dense array or another represented weight; holds :math:`H / \sqrt{n}` times the weight,
        where :math:`H` is `hadamard_matrix(order)` for each block.
      order: Length of the blocks that are mixed, see `hadamard_order`.
      view: How the matrix relates to the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> weight = jnp.arange(8.0).reshape(4, 2)
      >>> bool(jnp.allclose(Rotated.of(weight).materialize(), weight))
      True
    """

    base: Any
    order: int = static()
    view: View = static()

    @classmethod
    def of(cls, weight: jax.Array, view: View | None = None) -> Rotated:
        """The same dense weight behind the transform of the largest order that there is."""
        view = View.of(weight.shape) if view is None else view
        order = hadamard_order(view.in_dim)
        columns = jnp.swapaxes(view.to_matrix(weight).astype(wide_dtype(weight.dtype)), -1, -2)
        # (x H.T) @ (H @ W): columns of the base are those of W, transformed as rows.
        base = jnp.swapaxes(hadamard_transform(columns, order=order), -1, -2)
        return cls(view.from_matrix(base).astype(weight.dtype), order, view)

    def change(self, rows: jax.Array, *, transposed: bool = False) -> jax.Array:
        """The transform, or its inverse."""
        return hadamard_transform(rows, order=self.order, transposed=transposed)

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Inputs that the transform mixes stay together."""
        parts = matrix_parts(self.view, self.ndim, spec)
        return None if parts is None or parts[-2] is not None else super().partition(spec, mesh)

    def _partitioned(self, base: Any, parts: tuple[Any, ...]) -> Rotated:
        del parts
        return dataclasses.replace(self, base=base)
