"""PackedNM and BitmaskSparse: pruned weights that store only what was kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.weights._axes import Axes, View
from jaxweights.weights._masked import Masked
from jaxweights.weights._matrix_weight import MatrixWeight
from jaxweights.weights._weight import Weight, is_weight, static, weight_dataclass

PackedForm = Literal["n_of_m", "bitmask"]


class _Packed(MatrixWeight):
    """What both storage forms share: `values` decides the dtype and the stack."""

    values: jax.Array

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        fields = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in fields)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per entry of the dense weight, positions included."""
        return 8 * self.nbytes / max(self.size, 1)

    def astype(self, dtype: DTypeLike) -> Weight:
        """Casts the kept values."""
        return dataclasses.replace(self, values=self.values.astype(dtype))  # type: ignore


@weight_dataclass
class PackedNM(_Packed):
    """A matrix that keeps `keep` of every `of` consecutive inputs of a column.

    With `p` the positions that `position_rows()` unpacks, `r = i // of` and `s < keep`:

        matrix[..., i, o] = values[..., r * keep + s, o]  where p[..., r * keep + s, o] == i % of
        matrix[..., i, o] = 0                             where there is no such s

    Invariants:

        values.shape == (*stack, in / of * keep, out);  in % of == 0
        positions.shape == (*stack, ceil(in / of * keep / per_byte), out), uint8
        positions within a run ascend; a slot that a run does not need holds 0.0

    Positions take the fewest of 1, 2, 4 or 8 bits that hold `of - 1`; the lowest row has the lowest
    bits. So 2 of 4 in bfloat16 takes 9 bits a weight instead of 16. XLA multiplies dense matrices
    only: this form saves bytes, and the weight is unpacked to be used.

    Args:
      values: Kept values, in the dtype of the dense weight.
      positions: Where in its run each of them stands.
      keep: Weights kept in each run.
      of: Length of a run.
      view: How the matrix relates to the leaf.
    """

    values: jax.Array
    positions: jax.Array
    keep: int = static(2)
    of: int = static(4)
    view: View = static(None)

    @property
    def dtype(self) -> Any:  # type: ignore
        """Dtype of the dense weight."""
        return self.values.dtype

    def position_rows(self) -> jax.Array:
        """Positions, `(*stack, in / of * keep, out)`, uint8."""
        return _unpack(self.positions, _position_bits(self.of), self.values.shape[-2])

    def matrix(self) -> jax.Array:
        """Dense matrix, `(*stack, in, out)`."""
        *stack, rows, out_dim = self.values.shape
        by_run = (*stack, rows // self.keep, self.keep, out_dim)
        values = self.values.reshape(by_run)
        positions = self.position_rows().reshape(by_run)
        lanes = [jnp.zeros_like(values[..., 0, :]) for _ in range(self.of)]
        for slot in range(self.keep):
            value, position = values[..., slot, :], positions[..., slot, :]
            lanes = [
                jnp.where(position == jnp.uint8(j), value, lane) for j, lane in enumerate(lanes)
            ]
        runs = jnp.stack(lanes, axis=-2)  # (*stack, runs, of, out)
        return runs.reshape(*stack, -1, out_dim)

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.values.shape[:-2])


@weight_dataclass
class BitmaskSparse(_Packed):
    """A matrix as one bit per entry and the kept values, in row-major order.

    With `m` the mask that `mask_matrix()` unpacks and `rank` the number of kept entries before an
    entry of the same matrix:

        matrix[..., i, o] = values[..., rank[..., i, o]] if m[..., i, o] else 0

    Invariants:

        bits.shape == (*stack, ceil(in / 8), out), uint8, the lowest row in the lowest bit
        values.shape == (*stack, capacity);  m.sum(axis=(-2, -1)) <= capacity

    The capacity is static: that of the fullest matrix of the stack. At half zeros in bfloat16 it
    takes 9 bits a weight instead of 16. Like `PackedNM`, it saves bytes, not time.

    Args:
      values: Kept values, in the dtype of the dense weight.
      bits: The mask.
      view: How the matrix relates to the leaf.
    """

    values: jax.Array
    bits: jax.Array
    view: View = static(None)

    @property
    def dtype(self) -> Any:  # type: ignore
        """Dtype of the dense weight."""
        return self.values.dtype

    def mask_matrix(self) -> jax.Array:
        """The mask, `(*stack, in, out)`, bool."""
        return _unpack(self.bits, 1, self.view.in_dim).astype(bool)

    def matrix(self) -> jax.Array:
        """Dense matrix, `(*stack, in, out)`."""
        mask = self.mask_matrix()
        if not self.values.shape[-1]:
            return jnp.zeros(mask.shape, self.dtype)
        within = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)  # first along rows, then over them
        before = jnp.cumsum(within[..., -1:], axis=-2) - within[..., -1:]
        rank = jnp.maximum(within + before - 1, 0).reshape(*self._stack, -1)
        spread = jnp.take_along_axis(self.values, rank, axis=-1).reshape(mask.shape)
        return jnp.where(mask, spread, jnp.zeros((), self.dtype))

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.values.shape[:-1])


def pack_sparse(
    weight: Masked,
    *,
    form: PackedForm,
    keep: int | None = None,
    of: int | None = None,
    axes: Axes = Axes(),
    capacity: int | None = None,
) -> PackedNM | BitmaskSparse:
    """Stores a masked weight without its zeros; `materialize` gives it back bit for bit.

    Args:
      weight: Masked dense weight.
      form: "n_of_m" for runs along the input axis, "bitmask" for any mask.
      keep: For "n_of_m", the values stored for each run; runs may keep fewer.
      of: For "n_of_m", the length of a run.
      axes: Axes of the leaf, `(*stack, in, out)` unless stated.
      capacity: For "bitmask", the values stored for each matrix. None counts them, which needs a
        concrete mask.

    Returns:
      The packed weight.

    Raises:
      TypeError: If the weight is not masked, or its base is not dense.
      ValueError: If settings contradict, or the mask keeps more than `keep` or `capacity` hold.

    Example:
      >>> mask = jnp.array([[True], [False], [False], [True]])
      >>> packed = pack_sparse(Masked(jnp.full((4, 1), 3.0), mask), form="n_of_m", keep=2, of=4)
      >>> packed.values[:, 0].tolist(), packed.materialize()[:, 0].tolist()
      ([3.0, 3.0], [3.0, 0.0, 0.0, 3.0])
    """
    if not isinstance(weight, Masked) or is_weight(weight.base):
        kind = type(weight.base if isinstance(weight, Masked) else weight).__name__
        raise TypeError(
            f"pack_sparse: got a {kind}. Pass a Masked weight over a dense array; codes of a "
            "quantized base are smaller than dense values already."
        )
    if form not in get_args(PackedForm):
        raise ValueError(f"pack_sparse: form={form!r} must be 'n_of_m' or 'bitmask'.")
    view = View.of(weight.shape, axes)
    mask, dense = view.to_matrix(weight.mask), view.to_matrix(weight.materialize())
    if form == "bitmask":
        if keep is not None or of is not None:
            raise ValueError("pack_sparse: keep and of belong to form='n_of_m'.")
        return _pack_bitmask(dense, mask, view, capacity)
    if keep is None or of is None or not 1 <= keep <= of <= 256:
        raise ValueError(
            f"pack_sparse: keep={keep}, of={of}: form='n_of_m' needs 1 <= keep <= of <= 256. keep "
            "counts the weights that stay in every run."
        )
    if capacity is not None:
        raise ValueError("pack_sparse: capacity belongs to form='bitmask'.")
    if view.in_dim % of:
        raise ValueError(
            f"pack_sparse: input axis {view.in_dim} is not divisible by of={of}. Pack it with "
            "form='bitmask'."
        )
    return _pack_runs(dense, mask, view, keep, of)


def _pack_runs(dense: jax.Array, mask: jax.Array, view: View, keep: int, of: int) -> PackedNM:
    *stack, in_dim, out_dim = dense.shape
    by_run = (*stack, in_dim // of, of, out_dim)
    values, kept = dense.reshape(by_run), mask.reshape(by_run)
    counts = kept.sum(axis=-2, dtype=jnp.int32)
    fullest = _concrete(counts)
    if fullest is not None and fullest > keep:
        raise ValueError(
            f"pack_sparse: a run of {of} inputs keeps {fullest} weights, more than keep={keep}. "
            f"Prune with keep={keep}, of={of} first, or pack with form='bitmask'."
        )
    # A run that keeps fewer fills up with its first removed entries, which are zero.
    spare = jnp.cumsum(~kept, axis=-2, dtype=jnp.int32) <= (keep - counts)[..., None, :]
    stored = kept | (~kept & spare)
    slot_of = jnp.cumsum(stored, axis=-2, dtype=jnp.int32) - 1
    slots = []
    for slot in range(keep):
        here = stored & (slot_of == slot)  # exactly one entry of each run
        position = jnp.argmax(here, axis=-2, keepdims=True)
        slots.append((jnp.take_along_axis(values, position, axis=-2), position))
    rows = (*stack, in_dim // of * keep, out_dim)
    together = lambda parts: jnp.concatenate(parts, axis=-2).reshape(rows)  # noqa: E731
    positions = together([position.astype(jnp.uint8) for _, position in slots])
    return PackedNM(
        values=together([value for value, _ in slots]),
        positions=_pack(positions, _position_bits(of)),
        keep=keep,
        of=of,
        view=view,
    )


def _pack_bitmask(
    dense: jax.Array, mask: jax.Array, view: View, capacity: int | None
) -> BitmaskSparse:
    stack = dense.shape[:-2]
    flat, kept = dense.reshape(*stack, -1), mask.reshape(*stack, -1)
    fullest = _concrete(kept.sum(axis=-1, dtype=jnp.int32))
    if capacity is None:
        if fullest is None:
            raise ValueError(
                "pack_sparse: the mask is traced, so its kept weights cannot be counted. Pass "
                "capacity, the most that any matrix keeps."
            )
        capacity = fullest
    elif fullest is not None and fullest > capacity:
        raise ValueError(
            f"pack_sparse: a matrix keeps {fullest} weights, more than capacity={capacity}. Pass "
            "at least as many."
        )

    def compact(values: jax.Array, keep: jax.Array) -> jax.Array:
        where = jnp.flatnonzero(keep, size=capacity, fill_value=values.size)
        return values.at[where].get(mode="fill", fill_value=0)

    for _ in stack:
        compact = jax.vmap(compact)
    return BitmaskSparse(
        values=compact(flat, kept), bits=_pack(mask.astype(jnp.uint8), 1), view=view
    )


def _concrete(counts: jax.Array) -> int | None:
    """The largest count, or None where it is traced or abstract."""
    if isinstance(counts, Tracer):
        return None
    return int(np.max(np.asarray(counts), initial=0))


def _position_bits(of: int) -> int:
    """Fewest of 1, 2, 4 or 8 bits that hold a position in a run."""
    return next(bits for bits in (1, 2, 4, 8) if of <= 1 << bits)


def _pack(rows: jax.Array, bits: int) -> jax.Array:
    """Joins uint8 numbers of few bits along the last axis but one, the first in the lowest bits."""
    per_byte = 8 // bits
    *stack, length, out_dim = rows.shape
    padding = [(0, 0)] * len(stack) + [(0, -length % per_byte), (0, 0)]
    split = jnp.pad(rows, padding).reshape(*stack, -1, per_byte, out_dim)
    shifts = (bits * jnp.arange(per_byte, dtype=jnp.uint8))[:, None]
    shifts = jnp.broadcast_to(shifts, split.shape)
    return jnp.sum(split << shifts, axis=-2, dtype=jnp.uint8)


def _unpack(packed: jax.Array, bits: int, length: int) -> jax.Array:
    """Takes `_pack` apart into the first `length` rows."""
    per_byte = 8 // bits
    *stack, rows, out_dim = packed.shape
    shifts = (bits * jnp.arange(per_byte, dtype=jnp.uint8))[:, None]
    shape = (*stack, rows, per_byte, out_dim)
    shifted = jnp.broadcast_to(packed[..., None, :], shape) >> jnp.broadcast_to(shifts, shape)
    numbers = (shifted & jnp.uint8((1 << bits) - 1)).reshape(*stack, rows * per_byte, out_dim)
    return numbers[..., :length, :]
