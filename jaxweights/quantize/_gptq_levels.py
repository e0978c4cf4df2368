"""What GPTQ rounds to: any levels that have an encoder and a decoder."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxweights.quantize._grid import Grid, decode, encode, find_scale


class Levels(Protocol):
    """Scales of groups, codes of values and values of codes; the same in every row."""

    @property
    def code_dtype(self) -> Any:
        """Dtype of the codes."""
        ...

    @property
    def has_zero_point(self) -> bool:
        """Whether there are zero points besides scales."""
        ...

    @property
    def scale_dtype(self) -> Any:
        """Dtype of the scales."""
        ...

    def find(self, groups: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scales and zero points, `(rows, 1, out)`, of `(rows, group, out)` float32 values."""
        ...

    def encode(
        self, values: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> jax.Array:
        """Codes of float32 values."""
        ...

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """Float32 values of codes."""
        ...


@dataclasses.dataclass(frozen=True)
class GridLevels:
    """The levels of an integer grid."""

    grid: Grid

    @property
    def code_dtype(self) -> Any:
        """uint8 where there are zero points, else int8."""
        return jnp.uint8 if self.grid.unsigned else jnp.int8

    @property
    def has_zero_point(self) -> bool:
        """Whether codes are unsigned."""
        return self.grid.unsigned

    @property
    def scale_dtype(self) -> Any:
        """Dtype of the scales."""
        return self.grid.scale_dtype

    def find(self, groups: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """As `find_scale`."""
        return find_scale(groups, self.grid)

    def encode(
        self, values: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> jax.Array:
        """As `encode`."""
        return encode(values, scale, zero_point, self.grid).astype(self.code_dtype)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """As `decode`."""
        return decode(codes, scale, zero_point)
