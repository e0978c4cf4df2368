"""Scaled: what matrices of narrow numbers and their scales share."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.weights._axes import View, tiles
from jaxweights.weights._matrix_weight import (
    MatrixWeight,
    matrix_parts,
    split_evenly,
    take_columns,
    wide_dtype,
)
from jaxweights.weights._weight import Weight, is_weight


class Scaled(MatrixWeight):
    r"""A matrix of narrow numbers, each block of which is multiplied by a scale.

    With `u` the `(*stack, in, out)` numbers that `units()` reads out of the stored field:

        matrix[..., i, o] = u[..., i, o] * scale[..., i // (in / rows), o // (out / cols)]
                            + offset[..., i // (in / rows'), o // (out / cols')]

    computed in float32 and rounded once to `dtype`. Invariants:

        scale.shape == (*stack, rows, cols);  in % rows == 0 and out % cols == 0
        offset is None, or likewise with divisors of its own

    With a `full_group`, rows == ceil(in / full_group) and it takes the place of in / rows and of
    in / rows': the last group is shorter. A `Quantized` may also say which row an input reads. So
    `(1, 1)` is one scale per matrix, `(1, out)` one per output, `(in/g, out)` one per `g` input
    rows, `(in/128, out/128)` one per square block. Scales may themselves be a `Scaled` matrix
    `(rows, cols)`: that is double quantization.

    No metadata depends on the stack or on how the arrays are sharded: slicing every field along
    a stack axis, or sharding them along inputs or outputs, gives a valid weight again. Where blocks
    span shards, quantizers keep codes sharded but scales whole, and materializing gathers the dense
    weight on every device: choose blocks that fit into a shard.
    """

    stored: ClassVar[str]  # the field with an element or a share of one for every weight

    scale: Any  # jax.Array or Scaled
    offset: Any  # jax.Array or None
    full_group: int = 0  # rows of every group but the last, which has fewer; 0 where all are equal

    @abc.abstractmethod
    def units(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The numbers before scaling, `(*stack, in, out)`."""

    @property
    @abc.abstractmethod
    def in_dim(self) -> int:
        """Rows of the matrix."""

    @abc.abstractmethod
    def units_fit(self, dtype: DTypeLike) -> bool:
        """Whether `units(dtype)` rounds none of them."""

    @property
    def out_dim(self) -> int:
        """Columns of the matrix."""
        return getattr(self, self.stored).shape[-1]

    @property
    def group_size(self) -> int | None:
        """Input rows that share a scale, but for those of a last group that is shorter.

        None where all of an output's rows do.
        """
        if self.full_group:
            return self.full_group
        rows = self.scale.shape[-2]
        return None if rows <= 1 else self.in_dim // rows

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per entry, scales and tables included."""
        return 8 * self.nbytes / self.size

    def scale_matrix(self) -> jax.Array:
        """Scales in float32, `(*stack, rows, cols)`."""
        scale = self.scale.matrix() if is_weight(self.scale) else self.scale
        return scale.astype(jnp.float32)

    def matrix(self) -> jax.Array:
        """Dense `(*stack, in, out)` matrix, in `dtype`."""
        return self._values().astype(self.dtype)

    def astype(self, dtype: DTypeLike) -> Self:
        """The same numbers and scales, materialising to another dtype."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))  # type: ignore[type-var]

    def multiply(
        self,
        x: jax.Array,
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """`x @ matrix`; where scales belong to outputs, numbers are multiplied, then scaled.

        Args:
          x: Activations, `(*stack, tokens, in)`.
          precision: As in `jax.numpy.matmul`.
          preferred_element_type: Dtype of the result; that of `x` by default.

        Returns:
          The product, `(*stack, tokens, out)`, accumulated in float32 or wider.
        """
        wide = wide_dtype(x.dtype)
        scales_outputs = self._scales_outputs(x.dtype)
        weight = self.units(x.dtype) if scales_outputs else self._values().astype(x.dtype)
        y = jnp.matmul(x, weight, precision=precision, preferred_element_type=wide)
        if scales_outputs:
            y = y * self._per_output(wide)
        return y.astype(preferred_element_type or x.dtype)

    def multiply_transposed(
        self,
        x: jax.Array,
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """`x @ matrix.T` for `x` of shape `(*stack, tokens, out)`, as `multiply`."""
        wide, result = wide_dtype(x.dtype), preferred_element_type or x.dtype
        if self._scales_outputs(x.dtype):
            weight = self.units(x.dtype)
            x = (x.astype(wide) * self._per_output(wide)).astype(x.dtype)
        else:
            weight = self._values().astype(x.dtype)
        y = jnp.matmul(
            x, jnp.swapaxes(weight, -1, -2), precision=precision, preferred_element_type=wide
        )
        return y.astype(result)

    def columns(self, indices: jax.Array) -> jax.Array:
        """Columns of an unstacked matrix as rows, `(n, in)`; NaN for an index out of range."""

        def columns(column: jax.Array) -> jax.Array:
            picked = {}
            for name, field in self._arrays().items():
                if field.ndim == 2:  # not a table or an order of rows: all columns share those
                    array = field.matrix() if is_weight(field) else field
                    block = column // (self.out_dim // array.shape[-1])
                    picked[name] = jnp.take(array, block, axis=-1)
            return dataclasses.replace(self, **picked).matrix().T  # type: ignore[type-var]

        return take_columns(indices, self.out_dim, columns)

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(getattr(self, self.stored).shape[:-2])

    def _values(self) -> jax.Array:
        """The matrix in float32."""
        values = combine(self.units(), self.by_row(self.scale_matrix()), self._apply_scale)
        if self.offset is None:
            return values
        return combine(values, self.by_row(self.offset).astype(jnp.float32), jnp.add)

    def by_row(self, blocks: jax.Array) -> jax.Array:
        """Values of blocks, or of every input where groups are not of one size and in order."""
        if not self.full_group:
            return blocks
        return jnp.repeat(blocks, self.full_group, axis=-2)[..., : self.in_dim, :]

    def _arrays(self) -> dict[str, Any]:
        """Fields that are there and hold arrays, by name."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {f.name: getattr(self, f.name) for f in fields if not f.metadata.get("static")}
        return {name: value for name, value in values.items() if value is not None}

    def _apply_scale(self, units: jax.Array, scale: jax.Array) -> jax.Array:
        return units * scale

    def _scales_outputs(self, dtype: Any) -> bool:
        return self.scale.shape[-2] == 1 and self.offset is None and self.units_fit(dtype)

    def _per_output(self, dtype: DTypeLike) -> jax.Array:
        """Scales as `(*stack, 1, out)` or `(*stack, 1, 1)`, for matrices with one row of them."""
        scale = self.scale_matrix().astype(dtype)
        cols = scale.shape[-1]
        return (
            scale if cols in (1, self.out_dim) else jnp.repeat(scale, self.out_dim // cols, axis=-1)
        )

    def fitted(self) -> Any:
        """The same arrays, with a view of their lengths: a shard is narrower than its view says."""
        view: View = self.view
        if (view.in_dim, view.out_dim) == (self.in_dim, self.out_dim):
            return self
        fit = lambda shape, total: (total // math.prod(shape[1:]), *shape[1:])  # noqa: E731
        view = dataclasses.replace(
            view,
            in_shape=fit(view.in_shape, self.in_dim),
            out_shape=fit(view.out_shape, self.out_dim),
        )
        return dataclasses.replace(self, view=view)  # type: ignore[type-var]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.fitted().view.shape(self._stack)

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return self.fitted().view.from_matrix(self.matrix())

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Stored rows and scales are split as inputs and outputs are; tables are not.

        None where a block spans shards: products are then those of the dense weight.
        """
        parts = matrix_parts(self.fitted().view, self.ndim, spec)
        if parts is None or (self.full_group and parts[-2] is not None):
            return None
        *stack, rows, columns = parts
        specs: dict[str, Any] = {}
        for name, value in self._arrays().items():
            if value.ndim < len(stack) + 2:
                specs[name] = PartitionSpec(*stack)
                continue
            fitted = split_evenly(value.shape[len(stack) :], (rows, columns), mesh)
            if fitted is None:
                return None
            whole = PartitionSpec(*stack, *fitted)
            specs[name] = value.partition(whole, mesh) if is_weight(value) else whole
            if specs[name] is None:
                return None
        return dataclasses.replace(self, **specs)  # type: ignore[type-var]

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """Permutes the axes by changing the view only."""
        return MatrixWeight.transpose(self.fitted(), permutation)

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """Reshapes by changing the view only, where the matrix stays the same."""
        return MatrixWeight.reshape(self.fitted(), shape)

    def dot(self, x: jax.Array, dimension_numbers: tuple[Any, Any], **options: Any) -> Any:
        """Contracts activations with all inputs or all outputs; stack axes must be batch axes."""
        return MatrixWeight.dot(self.fitted(), x, dimension_numbers, **options)

    def take(self, indices: jax.Array) -> jax.Array | None:
        """Looks up rows of an embedding table."""
        return MatrixWeight.take(self.fitted(), indices)


def combine(matrix: jax.Array, blocks: jax.Array, operation: Any) -> jax.Array:
    """`operation` of every entry of a `(*stack, in, out)` matrix and the value of its block.

    Args:
      matrix: The matrix.
      blocks: One value a block, `(*stack, rows, cols)`.
      operation: Of two arrays that broadcast.

    Returns:
      The results, `(*stack, in, out)`.
    """
    *stack, in_dim, out_dim = matrix.shape
    rows, cols = blocks.shape[-2:]
    if cols in (1, out_dim):
        # Split at the inputs only: JAX 0.10 cannot split both of sharded types.
        grouped = matrix.reshape(*stack, rows, in_dim // max(rows, 1), out_dim)
        return operation(grouped, blocks[..., :, None, :]).reshape(matrix.shape)
    grouped = matrix.reshape(*stack, rows, in_dim // max(rows, 1), cols, out_dim // max(cols, 1))
    return operation(grouped, blocks[..., :, None, :, None]).reshape(matrix.shape)


def check_blocks(
    owner: str,
    name: str,
    shape: Sequence[int],
    stored: Sequence[int],
    *,
    full_group: int = 0,
    any_rows: bool = False,
) -> None:
    """Refuses scales or offsets whose blocks do not tile the stored matrix.

    Args:
      owner: What errors call the weight.
      name: What they call the field.
      shape: Of the field.
      stored: Shape of the matrix.
      full_group: As in `Scaled`.
      any_rows: Whether something else than the shapes says which row of the field an input reads.

    Raises:
      ValueError: If they do not.
    """
    *stack, in_dim, out_dim = stored
    *own_stack, rows, cols = shape
    fit = rows <= in_dim if any_rows or full_group else tiles(rows, in_dim)
    if own_stack != stack or not (fit and tiles(cols, out_dim)):
        raise ValueError(
            f"{owner}: {name} has shape {tuple(shape)}, but the matrix has shape {tuple(stored)}. "
            "Its stack axes must be equal and each of its last two lengths must divide theirs."
        )
    if full_group and (in_dim % full_group == 0 or rows != -(-in_dim // full_group)):
        raise ValueError(
            f"{owner}: full_group={full_group} makes no {rows} groups of {in_dim} inputs of "
            "which the last is shorter. Pass 0 where all groups have as many inputs."
        )
