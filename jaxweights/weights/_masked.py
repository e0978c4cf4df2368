"""Masked: a weight some of whose entries are held at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.weights._weight import Weight, is_weight, materialize, weight_dataclass


@weight_dataclass
class Masked(Weight):
    """A weight whose entries outside a mask are exactly zero, whatever the base holds there.

    `dense = where(mask, base, 0)`: never a product, so that a removed NaN is zero and no -0.0
    appears. Gradients with respect to `base` are zero outside the mask, so fine-tuning keeps it.
    Unstructured zeros save no time in XLA, which has no kernel that skips them; `pack_sparse`
    makes them save bytes.

    Args:
      base: Dense array or another represented weight, such as a quantized one.
      mask: Bool, of the shape of the dense weight; True where a weight is kept.

    Example:
      >>> Masked(jnp.array([[1.0, 2.0]]), jnp.array([[True, False]])).materialize()
      Array([[1., 0.]], dtype=float32)
    """

    base: Any
    mask: jax.Array

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
        """Every axis of a dense base may be sliced away, else those of the base."""
        return self.base.stack_shape if is_weight(self.base) else self.shape

    def materialize(self) -> jax.Array:
        """The dense weight, zero where the mask is False."""
        dense = materialize(self.base)
        return jnp.where(self.mask, dense, jnp.zeros((), dense.dtype))

    def astype(self, dtype: DTypeLike) -> Masked | None:
        """The weight in another dtype, same mask."""
        return self._both(self.base.astype(dtype), self.mask)

    def transpose(self, permutation: Sequence[int]) -> Masked | None:
        """Permutes the axes of base and mask."""
        permutation = tuple(permutation)
        return self._both(_transpose(self.base, permutation), jnp.transpose(self.mask, permutation))

    def reshape(self, shape: Sequence[int]) -> Masked | None:
        """Reshapes base and mask."""
        shape = tuple(shape)
        return self._both(self.base.reshape(shape), self.mask.reshape(shape))

    def take(self, indices: jax.Array) -> jax.Array | None:
        """Looks up entries of axis 0 in base and mask."""
        taken = (
            self.base.take(indices)
            if is_weight(self.base)
            else jnp.take(self.base, indices, axis=0)
        )
        if taken is None:
            return None
        return jnp.where(jnp.take(self.mask, indices, axis=0), taken, jnp.zeros((), taken.dtype))

    def partition(self, spec: Any, mesh: Any) -> Masked | None:
        """Base and mask are split alike."""
        base = self.base.partition(spec, mesh) if is_weight(self.base) else spec
        return self._both(base, spec)

    def _both(self, base: Any, mask: jax.Array) -> Masked | None:
        return None if base is None else Masked(base, mask)


def _transpose(base: Any, permutation: tuple[int, ...]) -> Any:
    return base.transpose(permutation) if is_weight(base) else jnp.transpose(base, permutation)
