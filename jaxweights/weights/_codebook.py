"""Codebook: codes that index a small table of values, times scales."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._packed_codes import codes_per_byte, pack_codes, unpack_codes
from jaxweights.weights._scaled import Scaled, check_blocks
from jaxweights.weights._weight import static, weight_dataclass

# Up to so many levels a tree of selections is used in place of a gather, which XLA does not
# vectorise on CPU.
_SELECTED_LEVELS = 16


@weight_dataclass
class Codebook(Scaled):
    r"""A matrix of 1- to 8-bit codes, read through a table of levels, with scales.

    With `q` the `(*stack, in, out)` integers that `codes_matrix()` unpacks:

        matrix[..., i, o] = table[..., q[..., i, o]] * scale[..., r, c]  (+ offset)

    with rows and columns of scales, and scales that are quantized themselves, as `Scaled` says.
    Invariants:

        codes.shape == (*stack, in / codes_per_byte, out), uint8
        table.shape == (*stack, levels);  0 <= q < levels <= 2**bits

    NF4, FP4, the four- and six-bit floats of microscaling, power quantization and binary weights
    differ in nothing but the table. Eight, four or two narrow codes share a byte along the input
    axis, the lowest row in the lowest bits.

    Args:
      codes: Stored integers.
      table: The levels, float32; those of each matrix of a stack.
      scale: Array or `Scaled`, one scale a block.
      offset: Added after scaling, or None.
      bits: Bits per code, 1 to 8.
      codes_per_byte: 1, 2, 4 or 8.
      full_group: Rows of every group but the last, which has fewer; 0 where all have as many.
      dtype: Dtype that it materialises to.
      view: How the matrix relates to the leaf.

    Example:
      >>> table = jnp.array([-1.0, 0.0, 1.0])
      >>> weight = Codebook.from_codes(jnp.array([[2, 0]]), table, jnp.full((1, 1), 0.5), bits=2)
      >>> weight.materialize()
      Array([[ 0.5, -0.5]], dtype=float32)
    """

    stored: ClassVar[str] = "codes"

    codes: jax.Array
    table: jax.Array
    scale: Any
    offset: jax.Array | None = None
    bits: int = static(default=4)
    codes_per_byte: int = static(default=1)
    full_group: int = static(default=0)
    dtype: Any = static(default=np.dtype(np.float32))
    view: View = static(default=None)

    @classmethod
    def from_codes(
        cls,
        codes: jax.Array,
        table: jax.Array,
        scale: Any,
        offset: jax.Array | None = None,
        *,
        bits: int,
        full_group: int = 0,
        dtype: DTypeLike = jnp.float32,
        view: View | None = None,
    ) -> Codebook:
        """Packs a `(*stack, in, out)` matrix of codes.

        Args:
          codes: Indices into the table, any integer dtype.
          table: As in the class.
          scale: As in the class.
          offset: As in the class.
          bits: Bits per code, 1 to 8.
          full_group: As in the class.
          dtype: Dtype that it materialises to.
          view: How the matrix relates to the leaf; None means that the leaf is the matrix.

        Returns:
          The weight.

        Raises:
          ValueError: If the shapes break an invariant of the class.
        """
        if not 1 <= bits <= 8:
            raise ValueError(f"Codebook: bits={bits} must lie between 1 and 8.")
        levels = table.shape[-1]
        if table.shape[:-1] != codes.shape[:-2] or levels > 2**bits:
            raise ValueError(
                f"Codebook: table has shape {table.shape}, but codes have shape {codes.shape} and "
                f"bits={bits}. Its stack axes must be equal, and it has at most 2**bits levels."
            )
        for name, field in {"scale": scale, "offset": offset}.items():
            if field is not None:
                check_blocks("Codebook", name, field.shape, codes.shape, full_group=full_group)
        per_byte = codes_per_byte(bits, codes.shape[-2])
        return cls(
            codes=pack_codes(codes, per_byte, signed=False),
            table=table.astype(jnp.float32),
            scale=scale,
            offset=offset,
            bits=bits,
            codes_per_byte=per_byte,
            full_group=full_group,
            dtype=np.dtype(dtype),
            view=View.of(codes.shape) if view is None else view,
        )

    @property
    def in_dim(self) -> int:
        """Rows of the matrix."""
        return self.codes.shape[-2] * self.codes_per_byte

    def codes_matrix(self) -> jax.Array:
        """The integers, `(*stack, in, out)`, uint8."""
        return unpack_codes(self.codes, self.codes_per_byte, signed=False)

    def units(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The levels that the codes name, `(*stack, in, out)`."""
        return look_up(self.table, self.codes_matrix()).astype(dtype)

    def units_fit(self, dtype: DTypeLike) -> bool:
        """Levels are float32 numbers of any kind."""
        return jnp.finfo(dtype).bits >= 32


def look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
    """Entries of a `(*stack, levels)` table by `(*stack, in, out)` codes; the last beyond its end.

    Example:
      >>> look_up(jnp.array([5.0, 6.0, 7.0]), jnp.array([[2, 0]], jnp.uint8))
      Array([[7., 5.]], dtype=float32)
    """
    levels = table.shape[-1]
    if levels > _SELECTED_LEVELS:
        flat = codes.reshape(*codes.shape[:-2], math.prod(codes.shape[-2:])).astype(jnp.int32)
        return jnp.take_along_axis(table, flat, axis=-1, mode="clip").reshape(codes.shape)
    values = [table[..., i, None, None] for i in range(levels)]
    bit = 1
    while len(values) > 1:
        upper = (codes & jnp.uint8(bit)) != 0
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = [jnp.where(upper, pair[-1], pair[0]) for pair in pairs]
        bit *= 2
    return jnp.broadcast_to(values[0], codes.shape)
