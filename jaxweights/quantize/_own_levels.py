"""The levels that a stored weight has, for values that are to be put onto them again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core._stored import stored_as
from jaxweights.quantize._extremes import in_order
from jaxweights.quantize._levels import pick, rank_bits
from jaxweights.weights._codebook import look_up
from jaxweights.weights._divide import divide

_PICKED_LEVELS = 16  # up to so many, selections are faster than looking values up


@dataclasses.dataclass(frozen=True)
class TableOf:
    """The levels of a `Codebook`, as its own array has them.

    Args:
      table: `(levels,)` float32, in any order, maybe traced.
    """

    table: jax.Array

    @property
    def code_dtype(self) -> Any:
        """Indices into the table."""
        return jnp.uint8

    def encode(
        self, values: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> jax.Array:
        """Codes of the nearest levels; of two that are as near, that of the lower."""
        del zero_point
        order = jnp.argsort(in_order(self.table))  # -0.0 stands before 0.0
        levels = self.table[order]
        middles = (levels[1:] + levels[:-1]) / 2
        units = divide(values, scale)
        if len(middles) < _PICKED_LEVELS:
            bits = rank_bits(units, list(middles))
            return pick(list(order.astype(jnp.uint8)), bits)
        rank = jnp.searchsorted(middles, units)  # how many lie below
        return order.astype(jnp.uint8)[rank]

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """The levels that codes name, times scales."""
        del zero_point
        levels = look_up(self.table, codes.reshape(1, -1)).reshape(codes.shape)
        return levels * scale.astype(jnp.float32)

    def beyond(self, values: jax.Array, scale: jax.Array) -> jax.Array:
        """Which values lie beyond the last levels by more than half of the gap before them."""
        levels = jnp.sort(self.table)
        low = levels[0] - (levels[1] - levels[0]) / 2 if len(levels) > 1 else levels[0]
        high = levels[-1] + (levels[-1] - levels[-2]) / 2 if len(levels) > 1 else levels[0]
        units = divide(values, scale)
        return (units < low) | (units > high)


@dataclasses.dataclass(frozen=True)
class FloatsOf:
    """The numbers of a narrow floating dtype.

    Args:
      dtype: Of the stored values.
    """

    dtype: Any

    @property
    def code_dtype(self) -> Any:
        """The values are their own codes."""
        return self.dtype

    def encode(
        self, values: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> jax.Array:
        """The nearest numbers, the largest for what lies beyond."""
        del zero_point
        largest = float(jnp.finfo(self.dtype).max)
        return stored_as(jnp.clip(divide(values, scale), -largest, largest), self.dtype)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """Numbers times scales."""
        del zero_point
        return codes.astype(jnp.float32) * scale.astype(jnp.float32)

    def beyond(self, values: jax.Array, scale: jax.Array) -> jax.Array:
        """Which values lie beyond the largest number by more than half of its last place."""
        info = jnp.finfo(self.dtype)
        largest = float(info.max)
        half = math.ldexp(1.0, math.frexp(largest)[1] - info.nmant - 2)
        return jnp.abs(divide(values, scale)) > largest + half
