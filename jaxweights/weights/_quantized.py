"""Quantized: integers and how to read them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.weights._axes import View, tiles
from jaxweights.weights._weight import (
    MatrixWeight,
    Weight,
    matrix_parts,
    static,
    weight_dataclass,
)


@weight_dataclass
class Quantized(MatrixWeight):
    r"""A matrix of integers of 2 to 8 bits with scales and, on affine grids, a shift of zero.

    With `q` the `(*stack, in, out)` integers that `codes_matrix()` unpacks:

        matrix[..., i, o] = (q[..., i, o] - zero_point[..., r, c]) * scale[..., r, c]
        matrix[..., i, o] = q[..., i, o] * scale[..., r, c] + offset[..., r, c]  with offsets
        r = group_index[..., i], or i // (in / rows) without one;    c = o // (out / cols)

    computed in float32 and rounded once to `dtype`. Invariants:

        scale.shape == zero_point.shape == offset.shape == (*stack, rows, cols)
        in % rows == 0 and out % cols == 0
        codes.shape == (*stack, in / codes_per_byte, out)
        -2**(bits-1) <= q < 2**(bits-1)  without zero points and offsets, else  0 <= q < 2**bits

    An offset is a zero point that need not be an integer, as HQQ and GGUF's Q4_1 have it; a weight
    has one or the other, never both.

    So `(1, 1)` is one scale per tensor, `(1, out)` one per output channel, `(in/g, out)` one per
    `g` input rows. Two or four narrow codes share a byte along the input axis, the lowest row in
    the lowest bits; narrow signed codes are two's complement within their share of the byte.

    No metadata depends on the stack or on how the arrays are sharded: slicing every field along
    a stack axis, or sharding them along inputs or outputs, gives a valid weight again. Where groups
    span shards, quantizers keep codes sharded but scales whole, and materializing gathers the dense
    weight on every device: choose groups that fit into a shard.

    Args:
      codes: Stored integers, uint8 where packed or unsigned, else int8.
      scale: Size of one step, floating; may be negative.
      zero_point: The code of 0.0, or None for 0.
      group_index: Row of `scale` that each input row reads, `(*stack, in)` int32; None where groups
        are consecutive rows.
      offset: The value of code 0, floating, added after scaling; None for none.
      bits: Bits per code, 2 to 8.
      codes_per_byte: 1, 2 or 4.
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

    rows_follow_inputs: ClassVar[bool] = True

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    group_index: jax.Array | None = None
    offset: jax.Array | None = None
    bits: int = static(default=8)
    codes_per_byte: int = static(default=1)
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
          dtype: Dtype that it materialises to.
          view: How the matrix relates to the leaf; None means that the leaf is the matrix.

        Returns:
          The weight.

        Raises:
          ValueError: If the shapes break an invariant of the class, or there are both zero points
            and offsets.
        """
        *stack, in_dim, out_dim = codes.shape
        if not 2 <= bits <= 8:
            raise ValueError(f"Quantized: bits={bits} must lie between 2 and 8.")
        *scale_stack, rows, cols = scale.shape
        if scale_stack != stack or not (tiles(rows, in_dim) and tiles(cols, out_dim)):
            raise ValueError(
                f"Quantized: scale has shape {scale.shape}, but codes have shape {codes.shape}. "
                "Its stack axes must be equal and each of its last two lengths must divide theirs."
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
        per_byte = codes_per_byte(bits, in_dim)
        return cls(
            codes=pack_codes(codes, per_byte, signed=zero_point is None and offset is None),
            scale=scale,
            zero_point=zero_point,
            group_index=group_index,
            offset=offset,
            bits=bits,
            codes_per_byte=per_byte,
            dtype=np.dtype(dtype),
            view=View.of(codes.shape) if view is None else view,
        )

    @property
    def in_dim(self) -> int:
        """Rows of the matrix."""
        return self.codes.shape[-2] * self.codes_per_byte

    @property
    def out_dim(self) -> int:
        """Columns of the matrix."""
        return self.codes.shape[-1]

    @property
    def group_size(self) -> int | None:
        """Input rows that share a scale; None where all of an output's rows do."""
        rows = self.scale.shape[-2]
        return None if rows == 1 else self.in_dim // rows

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        fields = (self.codes, self.scale, self.zero_point, self.group_index, self.offset)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in fields if x is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per entry, scales, zero points and offsets included."""
        return 8 * self.nbytes / self.size

    @property
    def signed(self) -> bool:
        """Whether codes may be negative: where neither zero points nor offsets shift them."""
        return self.zero_point is None and self.offset is None

    def codes_matrix(self) -> jax.Array:
        """The integers, `(*stack, in, out)`, int8 where signed, else uint8."""
        return unpack_codes(self.codes, self.codes_per_byte, signed=self.signed)

    def matrix(self) -> jax.Array:
        """Dense `(*stack, in, out)` matrix, in `dtype`."""
        return self._values().astype(self.dtype)

    def astype(self, dtype: DTypeLike) -> Quantized:
        """The same integers, materialising to another dtype."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def multiply(
        self,
        x: jax.Array,
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """`x @ matrix`; where scales belong to outputs, integers are multiplied, then scaled.

        Args:
          x: Activations, `(*stack, tokens, in)`.
          precision: As in `jax.numpy.matmul`.
          preferred_element_type: Dtype of the result; that of `x` by default.

        Returns:
          The product, `(*stack, tokens, out)`, accumulated in float32 or wider.
        """
        wide = _accumulator(x.dtype)
        result = preferred_element_type or x.dtype
        if not self._scales_outputs:
            weight = self._values().astype(x.dtype)
            y = jnp.matmul(x, weight, precision=precision, preferred_element_type=wide)
            return y.astype(result)
        # Differences of codes are at most 255 in size: float16 and bfloat16 hold them exactly.
        integers = self.centred(x.dtype)
        y = jnp.matmul(x, integers, precision=precision, preferred_element_type=wide)
        return (y * self._per_output(wide)).astype(result)

    def multiply_transposed(
        self,
        x: jax.Array,
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array:
        """`x @ matrix.T` for `x` of shape `(*stack, tokens, out)`, as `multiply`."""
        wide = _accumulator(x.dtype)
        result = preferred_element_type or x.dtype
        if not self._scales_outputs:
            weight = self._values().astype(x.dtype)
        else:
            x, weight = (
                (x.astype(wide) * self._per_output(wide)).astype(x.dtype),
                self.centred(x.dtype),
            )
        y = jnp.matmul(
            x, jnp.swapaxes(weight, -1, -2), precision=precision, preferred_element_type=wide
        )
        return y.astype(result)

    def columns(self, indices: jax.Array) -> jax.Array:
        """Columns of an unstacked matrix as rows, `(n, in)`; NaN for an index out of range."""
        out_dim, cols = self.out_dim, self.scale.shape[-1]
        wrapped = jnp.where(indices < 0, indices + out_dim, indices)
        inside = (wrapped >= 0) & (wrapped < out_dim)
        column = jnp.clip(wrapped, 0, out_dim - 1)
        of_scale = column // (out_dim // cols)
        pick = lambda field, at: None if field is None else jnp.take(field, at, axis=-1)  # noqa: E731
        part = dataclasses.replace(
            self,
            codes=pick(self.codes, column),
            scale=pick(self.scale, of_scale),
            zero_point=pick(self.zero_point, of_scale),
            offset=pick(self.offset, of_scale),
        )
        return jnp.where(inside[:, None], part.matrix().T, jnp.asarray(jnp.nan, self.dtype))

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    def centred(self, dtype: DTypeLike) -> jax.Array:
        """Integers minus their zero points, `(*stack, in, out)`, in a dtype that holds them."""
        codes = self.codes_matrix()
        if self.zero_point is None:
            return codes.astype(dtype)
        zero = self._spread(self.zero_point)
        return (self._grouped(codes, zero).astype(dtype) - zero.astype(dtype)).reshape(codes.shape)

    def _values(self) -> jax.Array:
        """The dense matrix in float32."""
        centred = self.centred(jnp.float32)
        scale = self._spread(self.scale).astype(jnp.float32)
        values = self._grouped(centred, scale) * scale
        if self.offset is not None:
            values = values + self._spread(self.offset).astype(jnp.float32)
        return values.reshape(centred.shape)

    @property
    def _scales_outputs(self) -> bool:
        """Whether the matrix is integers times one factor an output."""
        return self.scale.shape[-2] == 1 and self.offset is None

    def _spread(self, field: jax.Array) -> jax.Array:
        """A field of scale's shape as `(*stack, rows, 1, cols, 1)`, ready to meet `_grouped`."""
        if self.group_index is not None:
            field = jnp.take_along_axis(field, self.group_index[..., None], axis=-2)
        return field[..., :, None, :, None]

    def _grouped(self, matrix: jax.Array, spread: jax.Array) -> jax.Array:
        """A `(*stack, in, out)` matrix as `(*stack, rows, in/rows, cols, out/cols)`."""
        *stack, in_dim, out_dim = matrix.shape
        rows, cols = spread.shape[-4], spread.shape[-2]
        return matrix.reshape(*stack, rows, in_dim // max(rows, 1), cols, out_dim // max(cols, 1))

    def _per_output(self, dtype: DTypeLike) -> jax.Array:
        """Scales as `(*stack, 1, out)` or `(*stack, 1, 1)`, for matrices with one row of them."""
        scale = self.scale.astype(dtype)
        cols = scale.shape[-1]
        return (
            scale if cols in (1, self.out_dim) else jnp.repeat(scale, self.out_dim // cols, axis=-1)
        )

    # A shard of the arrays is a narrower matrix than `view` says: the lengths come from the arrays.

    def _fitted(self) -> Quantized:
        view = self.view
        if (view.in_dim, view.out_dim) == (self.in_dim, self.out_dim):
            return self
        fit = lambda shape, total: (total // math.prod(shape[1:]), *shape[1:])  # noqa: E731
        view = dataclasses.replace(
            view,
            in_shape=fit(view.in_shape, self.in_dim),
            out_shape=fit(view.out_shape, self.out_dim),
        )
        return dataclasses.replace(self, view=view)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self._fitted().view.shape(self._stack)

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return self._fitted().view.from_matrix(self.matrix())

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Groups and packed rows are split with the inputs; groups in another order are not."""
        fitted = self._fitted()
        if self.group_index is None:
            return MatrixWeight.partition(fitted, spec, mesh)
        parts = matrix_parts(fitted.view, self.ndim, spec)
        if parts is None or parts[-2] is not None:
            return None
        specs = MatrixWeight.partition(dataclasses.replace(fitted, group_index=None), spec, mesh)
        return specs and dataclasses.replace(specs, group_index=PartitionSpec(*parts[:-2]))

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """Permutes the axes by changing the view only."""
        return MatrixWeight.transpose(self._fitted(), permutation)

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """Reshapes by changing the view only, where the matrix stays the same."""
        return MatrixWeight.reshape(self._fitted(), shape)

    def dot(self, x: jax.Array, dimension_numbers: tuple[Any, Any], **options: Any) -> Any:
        """Contracts activations with all inputs or all outputs; stack axes must be batch axes."""
        return MatrixWeight.dot(self._fitted(), x, dimension_numbers, **options)

    def take(self, indices: jax.Array) -> jax.Array | None:
        """Looks up rows of an embedding table."""
        return MatrixWeight.take(self._fitted(), indices)


def _accumulator(dtype: Any) -> Any:
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def codes_per_byte(bits: int, in_dim: int) -> int:
    """How many codes of consecutive rows share a byte: 8, 4, 2 or 1."""
    if bits == 1 and in_dim % 8 == 0:
        return 8
    if bits <= 2 and in_dim % 4 == 0:
        return 4
    return 2 if bits <= 4 and in_dim % 2 == 0 else 1


def pack_codes(codes: jax.Array, per_byte: int, *, signed: bool) -> jax.Array:
    """Puts `per_byte` consecutive rows of `(*stack, in, out)` codes into each byte.

    Args:
      codes: Integers that fit into `8 / per_byte` bits.
      per_byte: 1, 2, 4 or 8; divides `in`.
      signed: Whether codes may be negative.

    Returns:
      `(*stack, in / per_byte, out)`, uint8, or int8 where a signed code fills the byte.

    Example:
      >>> pack_codes(jnp.array([[1], [-1]]), 2, signed=True)
      Array([[241]], dtype=uint8)
    """
    if per_byte == 1:
        return codes.astype(jnp.int8 if signed else jnp.uint8)
    *stack, in_dim, out_dim = codes.shape
    share = 8 // per_byte
    rows = codes.reshape(*stack, in_dim // per_byte, per_byte, out_dim)
    # In int32: shifting int8 left is not safe on every backend, and narrowing once is cheaper.
    packed = jnp.zeros([], jnp.int32)
    for i in range(per_byte):
        field = rows[..., i, :].astype(jnp.int32) & jnp.int32(2**share - 1)
        packed = field if i == 0 else packed | (field << jnp.int32(share * i))
    return packed.astype(jnp.uint8)


def unpack_codes(packed: jax.Array, per_byte: int, *, signed: bool) -> jax.Array:
    """The inverse of `pack_codes`: `(*stack, in, out)`, int8 where signed, else uint8.

    Example:
      >>> unpack_codes(jnp.array([[241]], jnp.uint8), 2, signed=True).tolist()
      [[1], [-1]]
    """
    if per_byte == 1:
        return packed
    *stack, rows, out_dim = packed.shape
    share = 8 // per_byte
    shifts = np.arange(0, 8, share, dtype=np.uint8).reshape((1,) * (len(stack) + 1) + (-1, 1))
    fields = (packed[..., :, None, :] >> shifts) & jnp.uint8(2**share - 1)
    codes = fields.reshape(*stack, rows * per_byte, out_dim)
    if not signed:
        return codes
    # Two's complement of `share` bits: flipping the sign bit and subtracting it extends it.
    sign = 2 ** (share - 1)
    return (codes ^ jnp.uint8(sign)).astype(jnp.int8) - jnp.int8(sign)
