"""Factored: a weight that is the product of two thin factors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._low_rank import Delta
from jaxweights.weights._matrix_weight import MatrixWeight, matrix_parts
from jaxweights.weights._weight import Weight, static, weight_dataclass


@weight_dataclass
class Factored(MatrixWeight):
    r"""A weight :math:`A B` of which only the factors are kept: `rank * (in + out)` numbers.

    A product with activations costs two thin ones. `LowRank` is the sum of such a product and a
    base.

    Invariants: `down.shape == (*stack, in, rank)`, `up.shape == (*stack, rank, out)`, and
    `materialize()` is `down @ up`, computed in float32 (or wider) and rounded once to `dtype`.

    Args:
      down: First factor; activations meet it first.
      up: Second factor.
      stands_for: Dtype of the dense weight.
      view: How the axes of the dense weight form the matrix.

    Example:
      >>> weight = Factored.of(jnp.ones((4, 1)), jnp.ones((1, 3)), jnp.bfloat16)
      >>> weight.shape, weight.materialize().dtype
      ((4, 3), dtype(bfloat16))
    """

    down: jax.Array
    up: jax.Array
    stands_for: np.dtype = static()
    view: View = static()

    @classmethod
    def of(
        cls, down: jax.Array, up: jax.Array, dtype: DTypeLike, *, view: View | None = None
    ) -> Factored:
        """Builds the weight.

        Args:
          down: `(*stack, in, rank)`.
          up: `(*stack, rank, out)`.
          dtype: Of the dense weight.
          view: Which of its axes form the matrix; None for `(*stack, in, out)`.

        Returns:
          The weight.

        Raises:
          ValueError: If the factors do not fit together, or the view.
        """
        shape = (*down.shape[:-1], up.shape[-1])
        view = View.of(shape) if view is None else view
        fits = down.shape[:-2] == up.shape[:-2] and down.shape[-1] == up.shape[-2]
        if not fits or (view.in_dim, view.out_dim) != shape[-2:]:
            raise ValueError(
                f"Factored.of: down has shape {tuple(down.shape)} and up {tuple(up.shape)}, which "
                f"are no factors of {view.in_dim}x{view.out_dim} matrices. Give (*stack, in, rank) "
                "and (*stack, rank, out)."
            )
        return cls(down, up, np.dtype(dtype), view)

    @property
    def rank(self) -> int:
        """Width of the factors."""
        return self.down.shape[-1]

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight."""
        return self.stands_for

    def astype(self, dtype: DTypeLike) -> Weight | None:
        """Casts the factors, too."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        down, up = self.down.astype(dtype), self.up.astype(dtype)
        return dataclasses.replace(self, down=down, up=up, stands_for=np.dtype(dtype))

    def partition(self, spec: Any, mesh: Any) -> Factored | None:
        """`down` is split like the input axis, `up` like the output axis, the rank never."""
        parts = matrix_parts(self.view, self.ndim, spec)
        if parts is None:
            return None
        *stack, rows, columns = parts
        down, up = PartitionSpec(*stack, rows, None), PartitionSpec(*stack, None, columns)
        return dataclasses.replace(self, down=down, up=up)

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.down.shape[:-2])

    @property
    def _product(self) -> Delta:
        return Delta(self.down, self.up, jnp.ones(self._stack, jnp.float32), self.view)

    def matrix(self) -> jax.Array:
        """Dense product, `(*stack, in, out)`, not rounded to `dtype` yet."""
        return self._product.matrix()

    def multiply(self, x: jax.Array, **options: Any) -> jax.Array:
        """`(x @ down) @ up`, in the dtype of the activations."""
        return self._product.multiply(x, **options)

    def multiply_transposed(self, x: jax.Array, **options: Any) -> jax.Array:
        """`(x @ up.T) @ down.T`."""
        return self._product.multiply_transposed(x, **options)

    def columns(self, indices: jax.Array) -> jax.Array:
        """Columns of the product as rows, `(n, in)`."""
        return self._product.columns(indices)

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array, **options: Any) -> jax.Array | None:
        """Two thin ragged products, for a plain stack of matrices."""
        return self._product.ragged_dot(x, group_sizes, **options)

    def conv(self, x: jax.Array, **params: Any) -> jax.Array | None:
        """A convolution to `rank` channels, then a product at every position."""
        return self._product.conv(x, **params)
