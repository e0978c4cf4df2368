"""MatrixWeight: what representations of an `(in, out)` matrix share."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._weight import Weight


class MatrixWeight(Weight):
    """A weight held as factors of its canonical `(*stack, in, out)` matrix.

    Subclasses have a static field `view` and say how the matrix acts; axes, dimension numbers,
    transposition and reshaping are settled here.
    """

    view: View
    # Whether fields with fewer rows than inputs, such as one for a group, split as the inputs do.
    rows_follow_inputs: ClassVar[bool] = False

    @abc.abstractmethod
    def matrix(self) -> jax.Array:
        """Dense matrix, `(*stack, in, out)`."""

    def multiply(self, x: jax.Array, **options: Any) -> jax.Array | None:
        """`x @ matrix` for `x` of shape `(*stack, tokens, in)`."""
        return jnp.matmul(x, self.matrix().astype(x.dtype), **options)

    def multiply_transposed(self, x: jax.Array, **options: Any) -> jax.Array | None:
        """`x @ matrix.T` for `x` of shape `(*stack, tokens, out)`."""
        return jnp.matmul(x, jnp.swapaxes(self.matrix().astype(x.dtype), -1, -2), **options)

    def columns(self, indices: jax.Array) -> jax.Array | None:
        """Columns of an unstacked matrix as rows, `(n, in)`."""
        del indices
        return None

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return self.view.from_matrix(self.matrix()).astype(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.view.shape(self._stack)

    @property
    @abc.abstractmethod
    def _stack(self) -> tuple[int, ...]:
        """Stack sizes, read off a field."""

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading stack axes of the dense weight."""
        axes = self.view.stack_axes(self.ndim)
        leading = [i for i, axis in enumerate(axes) if i == axis]
        return self._stack[: len(leading)]

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """Permutes the axes by changing the view only."""
        view = self.view.transposed(self.ndim, permutation)
        return None if view is None else dataclasses.replace(self, view=view)  # type: ignore

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """Reshapes by changing the view only, where the matrix stays the same."""
        view = self.view.reshaped(self.shape, shape)
        if view is None:
            return self.reshape_stack(shape)
        return dataclasses.replace(self, view=view)  # type: ignore

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Splits every `(*stack, rows, columns)` field as the inputs and the outputs are split."""
        parts = matrix_parts(self.view, self.ndim, spec)
        if parts is None:
            return None
        *stack, rows, columns = parts
        specs = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.metadata.get("static") or value is None:
                continue
            if value.ndim < len(stack) + 2 and (rows or columns):
                return None  # whether it follows the inputs or the outputs, only its class knows
            fitted = split_evenly(value.shape[len(stack) :], (rows, columns), mesh)
            if fitted is None:
                return None
            follows = self.rows_follow_inputs or value.shape[-2] in (1, self.view.in_dim)
            if rows is not None and not follows:
                return None
            specs[field.name] = PartitionSpec(*stack, *fitted)
        return dataclasses.replace(self, **specs)  # type: ignore[type-var]

    def dot(
        self,
        x: jax.Array,
        dimension_numbers: tuple[Any, Any],
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array | None:
        """Contracts activations with all inputs or all outputs; stack axes must be batch axes."""
        return dot_through_matrix(
            self,
            x,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    def take(self, indices: jax.Array) -> jax.Array | None:
        """Looks up rows of an embedding table."""
        if self.view.axes.outputs != (-self.ndim,) or self._stack:
            return None
        rows = self.columns(indices.reshape(-1))
        if rows is None:
            return None
        # Inputs may be stored in another order than the leaf has them.
        order = tuple(np.argsort(self.view.axes.inputs) + 1)
        rows = rows.reshape(-1, *self.view.in_shape).transpose(0, *order)
        return rows.reshape(*indices.shape, *self.shape[1:]).astype(self.dtype)


def matrix_parts(view: View, ndim: int, spec: Any) -> tuple[Any, ...] | None:
    """Mesh axes that split each axis of the `(*stack, in, out)` matrix, for a spec of the leaf.

    Returns:
      The parts, or None where a split leaf is no split matrix: of axes that are flattened
      together only the first gives contiguous rows.
    """
    entries = (*spec, *[None] * (ndim - len(spec)))
    pick = lambda axes: [entries[a] for a in axes]  # noqa: E731
    first_in, *other_in = pick(view.axes.inputs)
    first_out, *other_out = pick(view.axes.outputs)
    if any(part is not None for part in (*other_in, *other_out)):
        return None
    return (*pick(view.stack_axes(ndim)), first_in, first_out)


def split_evenly(lengths: Sequence[int], parts: Sequence[Any], mesh: Any) -> tuple[Any, ...] | None:
    """Mesh axes that split the rows and columns of a field; None where one does not come out even.

    Args:
      lengths: Rows and columns of the field.
      parts: Mesh axes that split the inputs and the outputs.
      mesh: The mesh.
    """
    # A single row or column serves all parts.
    fitted = tuple(None if n == 1 else part for n, part in zip(lengths, parts, strict=False))
    even = all(n % _devices(part, mesh) == 0 for n, part in zip(lengths, fitted, strict=False))
    return fitted if even else None


def _devices(part: Any, mesh: Any) -> int:
    names = part if isinstance(part, tuple) else (part,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


class Rows(NamedTuple):
    """Activations, rearranged for the product with a `(*stack, in, out)` matrix."""

    x: jax.Array  # (*stack, tokens, contracted), 1 for a stack axis that they do not have
    transposed: bool  # whether the outputs are contracted, not the inputs
    free_shape: tuple[int, ...]  # free axes of the activations; their product is `tokens`
    free_axes: tuple[int, ...]


def activations_as_rows(
    view: View, ndim: int, x: jax.Array, dimension_numbers: tuple[Any, Any]
) -> Rows | None:
    """Rearranges the activations of a `dot_general` with a weight on the right.

    Args:
      view: View of the weight.
      ndim: Rank of the weight.
      x: Activations.
      dimension_numbers: Of `dot_general(x, weight, ...)`.

    Returns:
      The rows, or None where the contraction is neither over all inputs nor over all outputs, or
      a batch axis is no stack axis.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    stack = view.stack_axes(ndim)
    if not set(w_batch) <= set(stack):
        return None
    inputs = tuple(a % ndim for a in view.axes.inputs)
    outputs = tuple(a % ndim for a in view.axes.outputs)
    if set(w_contract) not in (set(inputs), set(outputs)):
        return None
    contracted = inputs if set(w_contract) == set(inputs) else outputs
    batch_of = dict(zip(w_batch, x_batch, strict=True))
    contract_of = dict(zip(w_contract, x_contract, strict=True))
    front = [batch_of[a] for a in stack if a in batch_of]
    back = [contract_of[a] for a in contracted]
    free = tuple(a for a in range(x.ndim) if a not in front and a not in back)
    free_shape = tuple(x.shape[a] for a in free)
    stack_sizes = (x.shape[batch_of[a]] if a in batch_of else 1 for a in stack)
    rows = jnp.transpose(x, (*front, *free, *back)).reshape(
        *stack_sizes, math.prod(free_shape), math.prod(x.shape[a] for a in back)
    )
    return Rows(rows, contracted is outputs, free_shape, free)


def dot_through_matrix(
    weight: MatrixWeight,
    x: jax.Array,
    dimension_numbers: tuple[Any, Any],
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array | None:
    """Reduces `dot_general(x, weight, ...)` to `(*stack, tokens, in) @ (*stack, in, out)`.

    Returns:
      The product with axes (batch, free axes of x, free axes of the weight), or None where the
      contraction is neither over all inputs nor over all outputs. Stack axes that are no batch
      axes are free axes of the weight: every matrix of them sees the same activations.
    """
    view, ndim = weight.view, weight.ndim
    rows = activations_as_rows(view, ndim, x, dimension_numbers)
    if rows is None:
        return None
    product = weight.multiply_transposed if rows.transposed else weight.multiply
    result_dtype = preferred_element_type or jnp.result_type(x.dtype, weight.dtype)
    y = product(rows.x, precision=precision, preferred_element_type=result_dtype)
    if y is None:
        return None
    kept = view.axes.inputs if rows.transposed else view.axes.outputs
    kept_shape = view.in_shape if rows.transposed else view.out_shape
    stack = view.stack_axes(ndim)
    y = y.reshape(*y.shape[:-2], *rows.free_shape, *kept_shape)
    first_free = len(stack)
    first_kept = first_free + len(rows.free_shape)
    # Batch axes come in dot_general's order, free weight axes in the leaf's order.
    batch = dimension_numbers[1][1]
    weight_axes = {a: stack.index(a) for a in stack if a not in batch}
    weight_axes |= {a % ndim: first_kept + i for i, a in enumerate(kept)}
    order = (
        *(stack.index(a) for a in batch),
        *range(first_free, first_kept),
        *(weight_axes[a] for a in sorted(weight_axes)),
    )
    return jnp.transpose(y, order).astype(result_dtype)


def take_columns(
    indices: jax.Array, out_dim: int, columns: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Columns of an unstacked matrix as rows, `(n, in)`; NaN for an index out of range.

    Args:
      indices: `(n,)` integers, counted from the end where negative.
      out_dim: Columns of the matrix.
      columns: Gives the rows for indices that are all in range.
    """
    wrapped = jnp.where(indices < 0, indices + out_dim, indices)
    inside = (wrapped >= 0) & (wrapped < out_dim)
    rows = columns(jnp.clip(wrapped, 0, out_dim - 1))
    return jnp.where(inside[:, None], rows, jnp.asarray(jnp.nan, rows.dtype))


def wide_dtype(dtype: Any) -> Any:
    """float32, or what is wider still: in which products are summed and activations changed."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
