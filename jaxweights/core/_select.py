"""Exact selection of the smallest or largest scores, without sorting.

The score of the last rank that belongs to the selection is found by counting (`_rank_search`);
what lies below it is marked. Where only some of the entries equal to it belong to the selection,
one more pass counts them by rows and finds the last one that does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxweights.core._counting import Count, count_where
from jaxweights.core._rank_search import (
    Bracket,
    Pattern,
    candidates_of,
    count_below,
    find_rank,
    magnitude_bits,
    narrow,
    over_members,
    reversed_bits,
    rounds_of,
    shift_of,
    whole_range,
)


def kth_smallest(scores: Float[Array, "*shape"], k: int | jax.Array) -> Float[Array, ""]:
    """The k-th smallest of `abs(scores)`, counted from 1, exactly.

    Args:
      scores: Floats, any shape but empty.
      k: Rank in [1, size]; may be traced.

    Returns:
      A scalar of the scores' dtype.

    Example:
      >>> kth_smallest(jnp.array([3.0, -1.0, 2.0]), 2)
      Array(2., dtype=float32)
    """
    return _kth(scores, Count.of(k))


def smallest(
    scores: Float[Array, "*shape"], k: int | jax.Array, *, axis: int | None = None
) -> Bool[Array, "*shape"]:
    """Marks exactly the `k` entries of smallest magnitude; of equal ones, the first in flat order.

    Args:
      scores: Floats, any shape; their sign is ignored. NaN counts as largest.
      k: How many to mark in each group, in [0, group size]; may be traced. With `axis`, one number
        for all groups or one for each.
      axis: None ranks all entries together; an axis ranks along it, every slice for itself.

    Returns:
      Bool, shaped like `scores`.

    Example:
      >>> smallest(jnp.array([2.0, 1.0, 1.0, 1.0]), 2).tolist()
      [False, True, True, False]
    """
    return _select(scores, Count.of(k), pattern=magnitude_bits, axis=axis)


def largest(
    scores: Float[Array, "*shape"], k: int | jax.Array, *, axis: int | None = None
) -> Bool[Array, "*shape"]:
    """Marks exactly the `k` entries of largest magnitude; of equal ones, the first in flat order.

    Args:
      scores: As in `smallest`.
      k: As in `smallest`.
      axis: As in `smallest`.

    Returns:
      Bool, shaped like `scores`.

    Example:
      >>> largest(jnp.array([2.0, 1.0, -3.0, 1.0]), 3).tolist()
      [True, True, True, False]
    """
    return _select(scores, Count.of(k), pattern=reversed_bits, axis=axis)


def smallest_of_leaves(leaves: Sequence[jax.Array], k: int | jax.Array) -> list[jax.Array]:
    """Marks exactly the `k` smallest magnitudes of several arrays ranked together.

    Nothing is concatenated: each pass counts leaf by leaf. Of equal entries the earlier leaf's
    come first, then the lower flat index.

    Args:
      leaves: Floats of one dtype, any shapes, each of fewer than 2^32 entries; together they may
        have more.
      k: How many to mark in all, in [0, total]; a Python integer of any size, or traced.

    Returns:
      One bool array per leaf.

    Raises:
      ValueError: If dtypes differ: patterns of different dtypes do not compare.

    Example:
      >>> [m.tolist() for m in smallest_of_leaves([jnp.array([5.0, 1.0]), jnp.array([2.0])], 2)]
      [[False, True], [True]]
    """
    if not leaves:
        return []
    wanted = Count.of(k)
    found = _find_in_leaves(leaves, wanted)
    # The entries equal to the threshold are handed out leaf by leaf.
    left, masks = wanted.minus(found.below), []
    for leaf in leaves:
        mask, left = _mark_leaf(leaf, found.value, left)
        masks.append(mask)
    return masks


def kth_smallest_of_leaves(leaves: Sequence[jax.Array], k: int | jax.Array) -> Float[Array, ""]:
    """The k-th smallest magnitude of several arrays ranked together, counted from 1, exactly.

    Args:
      leaves: As in `smallest_of_leaves`; at least one.
      k: Rank in [1, total]; a Python integer of any size, or traced.

    Returns:
      A scalar of the leaves' dtype.

    Raises:
      ValueError: If dtypes differ.

    Example:
      >>> kth_smallest_of_leaves([jnp.array([5.0, 1.0]), jnp.array([-2.0])], 2)
      Array(2., dtype=float32)
    """
    return _as_float(_find_in_leaves(leaves, Count.of(k)).value, leaves[0].dtype)


def _find_in_leaves(leaves: Sequence[jax.Array], wanted: Count) -> Bracket:
    dtypes = sorted({jnp.dtype(leaf.dtype).name for leaf in leaves})
    if len(dtypes) > 1:
        raise ValueError(
            f"core.smallest_of_leaves: leaves of dtypes {dtypes} cannot be ranked together. Cast "
            "the scores to one dtype, such as float32, which holds every bfloat16 and float16."
        )
    traced = any(isinstance(x, Tracer) for x in (*leaves, wanted.low))
    none = Count(*(jnp.zeros(3, jnp.uint32) for _ in range(2)))

    def body(i: Any, state: Bracket) -> Bracket:
        shift = shift_of(i, leaves[0].dtype)
        candidates = _candidates(state.value, shift)
        counts = none
        for leaf in leaves:
            counts = _count_leaf_below(leaf, candidates, counts)
        return _narrow(state, counts, wanted, shift)

    # From the host where possible: one program per shape of leaf is compiled, not one per tree.
    loop = jax.lax.fori_loop if traced else _host_loop
    start = whole_range(Count.of(sum(leaf.size for leaf in leaves)), leaves[0].dtype)
    return loop(0, rounds_of(leaves[0].dtype), body, start)


# Between the passes over the leaves the host dispatches two programs, not their fifty operations.
_candidates = jax.jit(candidates_of)
_narrow = jax.jit(narrow)


@jax.jit
def _count_leaf_below(leaf: jax.Array, candidates: jax.Array, others: Count) -> Count:
    count = lambda leaf, candidates: count_below(  # noqa: E731
        leaf, magnitude_bits, candidates, leaf.ndim
    )
    return others.plus(_auto(count, leaf, keeps_sharding=False)(leaf, candidates))


@jax.jit
def _mark_leaf(leaf: jax.Array, value: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    equal_to = lambda leaf, value: count_where(  # noqa: E731
        leaf, lambda x: [magnitude_bits(x) == value], leaf.ndim
    )
    equal = jax.tree.map(lambda x: x[0], _auto(equal_to, leaf, keeps_sharding=False)(leaf, value))
    ties = jnp.minimum(left, equal.minus(Count.of(0)))
    mark = lambda leaf, value, equal, ties: _mark(  # noqa: E731
        leaf, magnitude_bits, Bracket(value, Count.of(0), equal), ties, leaf.ndim
    )
    mask = _auto(mark, leaf, keeps_sharding=True)(leaf, value, equal, ties)
    return mask, left - ties


def _host_loop(start: int, stop: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    for i in range(start, stop):
        state = body(np.int32(i), state)
    return state


# Compiled here, so that callers outside `jit` do not compile the loops anew at every call.
@functools.partial(jax.jit, static_argnames=("pattern", "axis"))
def _select(scores: jax.Array, wanted: Count, *, pattern: Pattern, axis: int | None) -> jax.Array:
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    members = scores.ndim if axis is None else 1

    def select(scores: jax.Array, wanted: Count) -> jax.Array:
        moved = scores if axis is None else jnp.moveaxis(scores, axis, 0)
        wanted = jax.tree.map(lambda x: jnp.broadcast_to(x, moved.shape[members:]), wanted)
        found = find_rank(moved, pattern, wanted, members)
        mask = _mark(moved, pattern, found, wanted.minus(found.below), members)
        return mask if axis is None else jnp.moveaxis(mask, 0, axis)

    return _auto(select, scores, keeps_sharding=True)(scores, wanted)


@jax.jit
def _kth(scores: jax.Array, wanted: Count) -> jax.Array:
    def find(scores: jax.Array, wanted: Count) -> jax.Array:
        found = find_rank(scores, magnitude_bits, wanted, scores.ndim)
        return _as_float(found.value, scores.dtype)

    return _auto(find, scores, keeps_sharding=False)(scores, wanted)


def _as_float(pattern: jax.Array, dtype: Any) -> jax.Array:
    narrow = pattern.astype(jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}"))
    return jax.lax.bitcast_convert_type(narrow, dtype)


def _auto(fn: Callable[..., Any], scores: jax.Array, *, keeps_sharding: bool) -> Callable[..., Any]:
    """Lets the compiler place the intermediate arrays where the mesh's axes are explicit."""
    sharding = getattr(jax.typeof(scores), "sharding", None)
    if sharding is None or not any(sharding.spec):
        return fn
    replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.auto_axes(fn, out_sharding=sharding if keeps_sharding else replicated)


def _mark(
    scores: jax.Array, pattern: Pattern, found: Bracket, ties: jax.Array, members: int
) -> jax.Array:
    """Marks what lies below a pattern, and the first `ties` of the entries that have it."""
    columns = scores.shape[members:]
    equal = found.through.minus(found.below)
    split = (ties > 0) & (ties < equal)
    # Most often all of them belong to the selection, or none.
    row, place = jax.lax.cond(
        jnp.any(split),
        lambda: _last_tie(scores, pattern, found.value, ties, members),
        lambda: (jnp.zeros(columns, jnp.uint32), jnp.zeros(columns, jnp.uint32)),
    )
    _, length = _rows(scores.shape[:members])
    line, column = _row_and_column(scores.shape, members, length)
    bits = pattern(scores)
    row, place, split, some, value = (
        over_members(x, scores.ndim) for x in (row, place, split, ties > 0, found.value)
    )
    early = (line < row) | ((line == row) & (column <= place))
    taken = jnp.where(split, early, some)
    return (bits < value) | ((bits == value) & taken)


def _last_tie(
    scores: jax.Array, pattern: Pattern, value: jax.Array, ties: jax.Array, members: int
) -> tuple[jax.Array, jax.Array]:
    """Row and place in it of the `ties`-th entry with the pattern, in flat order."""
    shape, columns = scores.shape[:members], scores.shape[members:]
    rows, length = _rows(shape)
    flat = scores.reshape(-1, *columns) if members != 1 else scores
    if rows * length != flat.shape[0]:
        flat = jnp.pad(flat, [(0, rows * length - flat.shape[0])] + [(0, 0)] * len(columns))
        # Padding stands last, behind the tie that is looked for.
    table = flat.reshape(rows, length, *columns)

    def equal_in_row(row: jax.Array) -> jax.Array:
        equal = count_where(row, lambda x: [pattern(x) == over_members(value, x.ndim)], 1)
        return equal.minus(Count.of(0))[0]

    through = jnp.cumsum(jax.vmap(equal_in_row)(table), axis=0, dtype=jnp.uint32)
    row = (through < ties[None]).sum(axis=0, dtype=jnp.int32)
    previous = jnp.take_along_axis(through, jnp.maximum(row - 1, 0)[None], axis=0)[0]
    left = ties - jnp.where(row > 0, previous, jnp.uint32(0))
    line = jnp.take_along_axis(table, row[None, None], axis=0)[0]
    in_line = jnp.cumsum(pattern(line) == value[None], axis=0, dtype=jnp.uint32)
    place = (in_line < left[None]).sum(axis=0, dtype=jnp.uint32)
    return row.astype(jnp.uint32), place


def _rows(members: tuple[int, ...]) -> tuple[int, int]:
    """Splits flat order into (rows, length): the leaf's own last axis, or about a square."""
    size = math.prod(members)
    if len(members) > 1 and members[-1] >= 16:
        return size // members[-1], members[-1]
    root = max(math.isqrt(size), 1)
    best = next((c for c in range(root, max(root // 16, 1), -1) if size % c == 0), root)
    return -(-size // best), best


def _row_and_column(
    shape: tuple[int, ...], members: int, length: int
) -> tuple[jax.Array, jax.Array]:
    """Row and column of every entry in the split of `_rows`, uint32, shaped to broadcast."""
    index = jnp.zeros((1,) * len(shape), jnp.uint32)
    along = lambda axis: jnp.arange(shape[axis], dtype=jnp.uint32).reshape(  # noqa: E731
        *(1,) * axis, -1, *(1,) * (len(shape) - axis - 1)
    )
    own_rows = members > 1 and shape[members - 1] == length
    for axis in range(members - own_rows):
        index = index * jnp.uint32(shape[axis]) + along(axis)
    if own_rows:
        return index, along(members - 1)
    return index // jnp.uint32(length), index % jnp.uint32(length)
