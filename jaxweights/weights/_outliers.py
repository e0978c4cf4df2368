"""Outliers: a base weight plus a few entries of it that are stored apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._weight import Weight, is_weight, materialize, static, weight_dataclass


@weight_dataclass
class Outliers(Weight):
    """A weight `base + S` where S holds the same few entries of every matrix of a stack apart.

    With `(*stack, in, out)` the canonical matrix and `k` the number of entries:

        S[..., i, o] = sum of values[..., j] over the j with index[..., j] == i * out + o

    summed with the base in float32 (or wider) and rounded once to its dtype. Invariants:

        values.shape == index.shape == (*stack, k)
        0 <= index <= in * out, ascending; in * out marks a place that is not used

    It takes 32 bits and those of a value for each entry, and saves what the base would need to hold
    the entries as well: the ranges of a quantized base shrink without them. XLA has no product that
    skips zeros, so a product materialises the weight.

    Args:
      base: The weight without the outliers, dense or represented, of the logical shape.
      values: What is added.
      index: Where, int32.
      view: How the base's axes form the matrix.

    Example:
      >>> Outliers.over(jnp.zeros((2, 2)), jnp.array([5.0]), jnp.array([1])).materialize()
      Array([[0., 5.],
             [0., 0.]], dtype=float32)
    """

    base: Any
    values: jax.Array
    index: jax.Array
    view: View = static()

    @classmethod
    def over(
        cls, base: Any, values: jax.Array, index: jax.Array, *, view: View | None = None
    ) -> Outliers:
        """Builds the weight from its parts.

        Args:
          base: Dense array or represented weight.
          values: `(*stack, k)`, floating.
          index: `(*stack, k)`, integers.
          view: Which axes of `base` form the matrix; the last two if None.

        Returns:
          The weight.

        Raises:
          ValueError: If the shapes do not fit together.
        """
        view = View.of(base.shape) if view is None else view
        stack = tuple(base.shape[a] for a in view.stack_axes(len(base.shape)))
        if values.shape != index.shape or tuple(values.shape[:-1]) != stack:
            raise ValueError(
                f"Outliers.over: values have shape {tuple(values.shape)} and index "
                f"{tuple(index.shape)}, but a base of shape {tuple(base.shape)} needs both to be "
                f"{(*stack, 'k')}. State the axes of the base with view=View.of(base.shape, axes)."
            )
        return cls(base, values, index.astype(jnp.int32), view)

    @property
    def count(self) -> int:
        """Entries of each matrix that are stored apart."""
        return self.values.shape[-1]

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
        """Leading stack axes that the base and the entries share."""
        axes = self.view.stack_axes(self.ndim)
        leading = sum(i == axis for i, axis in enumerate(axes))
        own = tuple(self.values.shape[:leading])
        return own[: len(self.base.stack_shape)] if is_weight(self.base) else own

    def sparse_part(self) -> jax.Array:
        """S alone, dense, of the shape of the weight, float32 or wider."""
        wide = np.promote_types(self.values.dtype, np.float32)
        size = self.view.in_dim * self.view.out_dim
        *stack, count = self.values.shape

        def spread(values: jax.Array, index: jax.Array) -> jax.Array:
            return jnp.zeros(size, wide).at[index].add(values.astype(wide), mode="drop")

        values, index = (x.reshape(math.prod(stack), count) for x in (self.values, self.index))
        dense = jax.vmap(spread)(values, index)
        return self.view.from_matrix(dense.reshape(*stack, self.view.in_dim, self.view.out_dim))

    def materialize(self) -> jax.Array:
        """The dense weight, rounded to the base's dtype once."""
        sparse = self.sparse_part()
        wide = np.promote_types(self.dtype, sparse.dtype)
        cast = self.base.astype(wide)
        base = materialize(self.base).astype(wide) if cast is None else materialize(cast)
        return (base + sparse.astype(wide)).astype(self.dtype)

    def astype(self, dtype: DTypeLike) -> Weight | None:
        """Casts the base; the entries keep their own dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self._with_base(self.base.astype(dtype), self.view)

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """Permutes the axes of the base; the entries stay."""
        permutation = tuple(permutation)
        view = self.view.transposed(self.ndim, permutation)
        base = (
            self.base.transpose(permutation)
            if is_weight(self.base)
            else jnp.transpose(self.base, permutation)
        )
        return None if view is None else self._with_base(base, view)

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """Reshapes the base, where its matrix stays the same."""
        view = self.view.reshaped(self.shape, shape)
        if view is None:
            return self.reshape_stack(shape)
        return self._with_base(self.base.reshape(tuple(shape)), view)

    def describe(self) -> str:
        """What plans call it."""
        base = type(self.base).__name__ if is_weight(self.base) else "dense"
        own = getattr(self.base, "bits", None)
        inner = f"{base}(bits={own})" if own is not None else base
        return f"Outliers({inner}, count={self.count})"

    def _with_base(self, base: Any, view: View) -> Outliers | None:
        return None if base is None else dataclasses.replace(self, base=base, view=view)
