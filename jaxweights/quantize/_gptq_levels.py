"""What GPTQ rounds to: any levels that have an encoder and a decoder."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.quantize._extremes import largest_magnitude
from jaxweights.quantize._grid import (
    Codes,
    Grid,
    GridKind,
    GroupAxis,
    GroupSize,
    Pad,
    Search,
    decode,
    encode,
    find_scale,
    make_grid,
    matrix_scales,
    split_groups,
)
from jaxweights.quantize._levels import nearest_code
from jaxweights.quantize._nf4 import FP4_LEVELS, NF4_LEVELS
from jaxweights.quantize._settings import is_word
from jaxweights.quantize._stored_scale import stored_scale
from jaxweights.weights._codebook import Codebook, look_up
from jaxweights.weights._divide import divide
from jaxweights.weights._quantized import Quantized

Table = Literal["nf4", "fp4"]

_TABLES: dict[str, np.ndarray] = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}


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

    @property
    def grid(self) -> Grid:
        """Which entries share a scale."""
        ...

    def find(self, groups: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scales and zero points, `(rows, 1, out)`, of `(rows, group, out)` float32 values."""
        ...

    def scales(self, weight: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scales and zero points, `(rows, cols)`, of a float32 `(in, out)` matrix."""
        ...

    def represent(self, codes: Codes, group_index: jax.Array | None) -> Quantized | Codebook:
        """The weight made of the codes of one matrix."""
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

    def scales(self, weight: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """As `matrix_scales`."""
        return matrix_scales(weight, self.grid)

    def represent(self, codes: Codes, group_index: jax.Array | None) -> Quantized:
        """Integers with scales."""
        q, scale, zero = codes
        full_group = self.grid.full_group(q.shape[-2])
        return Quantized.from_codes(
            q, scale, zero, group_index, bits=self.grid.bits, full_group=full_group
        )

    def encode(
        self, values: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> jax.Array:
        """As `encode`."""
        return encode(values, scale, zero_point, self.grid).astype(self.code_dtype)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """As `decode`."""
        return decode(codes, scale, zero_point)


@dataclasses.dataclass(frozen=True)
class TableLevels:
    """The levels of a table whose largest is 1, times the largest magnitude of each group.

    Args:
      name: Of the table.
      grid: Which entries share a scale, and its dtype; its kind is not read.
    """

    name: Table
    grid: Grid

    @property
    def code_dtype(self) -> Any:
        """Indices into the table."""
        return jnp.uint8

    @property
    def has_zero_point(self) -> bool:
        """The table says what stands for zero."""
        return False

    @property
    def scale_dtype(self) -> Any:
        """Dtype of the scales."""
        return self.grid.scale_dtype

    @property
    def table(self) -> np.ndarray:
        """The levels, float32."""
        return _TABLES[self.name]

    def find(self, groups: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The largest magnitudes."""
        if self.grid.group_size == "tensor":
            groups = groups.reshape(1, -1, 1)
        return stored_scale(jnp.abs(largest_magnitude(groups)), self.scale_dtype), None

    def scales(self, weight: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The largest magnitudes of all groups."""
        return self.find(split_groups(weight, self.grid))[0][:, 0], None

    def represent(self, codes: Codes, group_index: jax.Array | None) -> Codebook:
        """Indices with a table and scales."""
        del group_index  # settings that scatter groups are refused
        q, scale, _ = codes
        full_group = self.grid.full_group(q.shape[-2])
        table = jnp.asarray(self.table)
        return Codebook.from_codes(q, table, scale, bits=4, full_group=full_group)

    def encode(
        self, values: jax.Array, scale: jax.Array, zero_point: jax.Array | None
    ) -> jax.Array:
        """Codes of the nearest levels."""
        del zero_point
        return nearest_code(divide(values, scale), self.table).astype(jnp.uint8)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """The levels that codes name, times scales."""
        del zero_point
        levels = look_up(jnp.asarray(self.table), codes.reshape(1, -1)).reshape(codes.shape)
        return levels * scale.astype(jnp.float32)


def make_levels(
    asker: str,
    *,
    bits: int,
    group_size: GroupSize,
    group_axis: GroupAxis,
    grid: GridKind | Table,
    scale_dtype: DTypeLike,
    search: Search,
    pad: Pad | None = None,
) -> GridLevels | TableLevels:
    """Checks the settings of an integer grid or of a table.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range, or means nothing for a table.
    """
    table = is_word(grid, get_args(Table))
    kind: Any = "narrow" if table else grid
    settings = make_grid(
        asker,
        bits=bits,
        group_size=group_size,
        group_axis=group_axis,
        grid=kind,
        scale_dtype=scale_dtype,
        search=search,
        pad=pad,
    )
    if not table:
        return GridLevels(settings)
    for name, value, only in (
        ("bits", bits, 4),
        ("search", search, "absmax"),
        ("group_axis", group_axis, "input"),
    ):
        if value != only:
            raise ValueError(
                f"{asker}: grid={grid!r} has 16 levels that groups of rows fill up to their "
                f"largest magnitude, so {name}={value!r} means nothing to it. Pass {name}={only!r}."
            )
    return TableLevels(grid, settings)  # type: ignore[arg-type]
