"""Quantized: integers and how to read them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._matrix_weight import matrix_parts
from jaxweights.weights._packed_codes import codes_per_byte, pack_codes, unpack_codes
from jaxweights.weights._scaled import Scaled, check_blocks, combine
from jaxweights.weights._weight import static, weight_dataclass


@weight_dataclass
class Quantized(Scaled):
    r"""A matrix of integers of 2 to 8 bits with scales and, on affine grids, a shift of zero.

    With `q` the `(*stack, in, out)` integers that `codes_matrix()` unpacks:

        matrix[..., i, o] = (q[..., i, o] - zero_point[..., r, c]) * scale[..., r, c]
        matrix[..., i, o] = q[..., i, o] * scale[..., r, c] + offset[..., r, c]  with offsets
        r = group_index[..., i], or i // group without one;    c = o // (out / cols)
        group = full_group, or in / rows where that is 0

    computed in float32 and rounded once to `dtype`. Invariants:

        scale.shape == zero_point.shape == offset.shape == (*stack, rows, cols)
        out % cols == 0; in % rows == 0 without full_group and group_index
        rows == ceil(in / full_group) with full_group: the last group is shorter
        codes.shape == (*stack, in / codes_per_byte, out)
        -2**(bits-1) <= q < 2**(bits-1)  without zero points and offsets, else  0 <= q < 2**bits

    An offset is a zero point that need not be an integer, as HQQ and GGUF's Q4_1 have it; a weight
    has one or the other, never both.

    So `(1, 1)` is one scale per tensor, `(1, out)` one per output channel, `(in/g, out)` one per
    `g` input rows. Two or four narrow codes share a byte along the input axis, the lowest row in
    the lowest bits; narrow signed codes are two's complement within their share of the byte.

    Args:
      codes: Stored integers, uint8 where packed or unsigned, else int8.
      scale: Size of one step, floating; may be negative.
      zero_point: The code of 0.0, or None for 0.
      group_index: Row of `scale` that each input row reads, `(*stack, in)` int32; None where groups
        are consecutive rows.
      offset: The value of code 0, floating, added after scaling; None for none.
      bits: Bits per code, 2 to 8.
      codes_per_byte: 1, 2 or 4.
      full_group: Rows of every group but the last (in the order of `group_index`), which has
        fewer; 0 where all have as many.
      dtype: Dtype that it materialises to.
      view: How the matrix relates to the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> q = jnp.array([[-8, 7], [3, -1]], jnp.int8)
      >>> weight = Quantized.from_codes(q, jnp.full((1, 2), 0.5), bits=4)
      >>> weight.materialize()
      Array([[-4. ,  3.5],
             [ 1.5, -0.5]], dtype=float32)
      >>> weight.codes.shape  # two rows share a byte
      (1, 2)
    """

    stored: ClassVar[str] = "codes"

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    group_index: jax.Array | None = None
    offset: jax.Array | None = None
    bits: int = static(default=8)
    codes_per_byte: int = static(default=1)
    full_group: int = static(default=0)
    dtype: Any = static(default=np.dtype(np.float32))
    view: View = static(default=None)

    @classmethod
    def from_codes(
        cls,
        codes: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None = None,
        group_index: jax.Array | None = None,
        *,
        bits: int,
        offset: jax.Array | None = None,
        full_group: int = 0,
        dtype: DTypeLike = jnp.float32,
        view: View | None = None,
    ) -> Quantized:
        """Packs a `(*stack, in, out)` matrix of codes.

        Args:
          codes: Integers in the range of the grid, any integer dtype.
          scale: As in the class.
          zero_point: As in the class.
          group_index: As in the class.
          bits: Bits per code, 2 to 8.
          offset: As in the class.
          full_group: As in the class.
          dtype: Dtype that it materialises to.
          view: How the matrix relates to the leaf; None means that the leaf is the matrix.

        Returns:
          The weight.

        Raises:
          ValueError: If the shapes break an invariant of the class, or there are both zero points
            and offsets.
        """
        if not 2 <= bits <= 8:
            raise ValueError(f"Quantized: bits={bits} must lie between 2 and 8.")
        check_blocks(
            "Quantized",
            "scale",
            scale.shape,
            codes.shape,
            full_group=full_group,
            any_rows=group_index is not None,
        )
        for name, field in {"zero_point": zero_point, "offset": offset}.items():
            if field is not None and field.shape != scale.shape:
                raise ValueError(
                    f"Quantized: {name} has shape {field.shape}, but scale has {scale.shape}. "
                    "They must be equal."
                )
        if zero_point is not None and offset is not None:
            raise ValueError(
                "Quantized: zero_point and offset are both given. A zero point is the offset "
                "-zero_point * scale; give one of the two."
            )
        per_byte = codes_per_byte(bits, codes.shape[-2])
        return cls(
            codes=pack_codes(codes, per_byte, signed=zero_point is None and offset is None),
            scale=scale,
            zero_point=zero_point,
            group_index=group_index,
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

    @property
    def signed(self) -> bool:
        """Whether codes may be negative: where neither zero points nor offsets shift them."""
        return self.zero_point is None and self.offset is None

    def codes_matrix(self) -> jax.Array:
        """The integers, `(*stack, in, out)`, int8 where signed, else uint8."""
        return unpack_codes(self.codes, self.codes_per_byte, signed=self.signed)

    def with_codes(self, codes: jax.Array, scale: jax.Array) -> Quantized:
        """Other `(*stack, in, out)` integers and steps on the same grid."""
        packed = pack_codes(codes, self.codes_per_byte, signed=self.signed)
        return dataclasses.replace(self, codes=packed, scale=scale)

    def units(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Integers minus their zero points, `(*stack, in, out)`, in a dtype that holds them."""
        codes = self.codes_matrix().astype(dtype)
        if self.zero_point is None:
            return codes
        return combine(codes, self.by_row(self.zero_point).astype(dtype), jnp.subtract)

    def units_fit(self, dtype: DTypeLike) -> bool:
        """Differences of codes are at most 255 in size: float16 and bfloat16 hold them exactly."""
        del dtype
        return True

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Groups and packed rows are split with the inputs, where groups are in order."""
        if self.group_index is not None:
            parts = matrix_parts(self.fitted().view, self.ndim, spec)
            if parts is None or parts[-2] is not None:
                return None
        return super().partition(spec, mesh)

    def by_row(self, blocks: jax.Array) -> jax.Array:
        """Values of blocks, or of every input where groups are not of one size and in order."""
        if self.group_index is not None:
            return jnp.take_along_axis(blocks, self.group_index[..., None], axis=-2)
        return super().by_row(blocks)
