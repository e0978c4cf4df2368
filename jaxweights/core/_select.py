"""Exact selection of the smallest or largest scores, without sorting.

The bit pattern of a non-negative float, read as an unsigned integer, orders as the float does. So
the k-th smallest score is found by fixing its pattern from the highest bits down, two bits a pass:
each pass counts the entries below three candidates. Passes only compare and count, hence `k` may
be traced, counts add over shards and over leaves, and the number of passes depends on the dtype
alone: 16 for float32, 8 for bfloat16. Where only some of the entries equal to the threshold belong
to the selection, one more pass counts them by rows and finds the last one that does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, UInt

# Three candidates a pass are the digits of a number in base 4.
_CANDIDATES = 3
_DIGIT_BITS = 2
_COUNTER_BITS = 10  # three counters in 32 bits
_FIRST_FAN, _SECOND_FAN = 15, 32  # 15 * 32 < 2**10: no counter overflows

Pattern = Callable[[jax.Array], jax.Array]
Predicates = Callable[[jax.Array], list[jax.Array]]


class Count(NamedTuple):
    """A count below 2^48, as `high * 2^16 + low` with `low < 2^16`, in uint32 scalars or arrays."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, number: int | jax.Array) -> Count:
        """From a Python integer of any size or an integer array."""
        if isinstance(number, int):
            return cls(jnp.uint32(number >> 16), jnp.uint32(number & 0xFFFF))
        number = jnp.asarray(number).astype(jnp.uint32)
        return cls(number >> 16, number & jnp.uint32(0xFFFF))

    def plus(self, other: Count) -> Count:
        """Sum, exact."""
        low = self.low + other.low
        return Count(self.high + other.high + (low >> 16), low & jnp.uint32(0xFFFF))

    def minus(self, other: Count) -> jax.Array:
        """Difference of a count and a smaller one, clipped to 2^32 - 1."""
        borrow = (self.low < other.low).astype(jnp.uint32)
        high = self.high - other.high - borrow
        low = self.low + (borrow << 16) - other.low
        return jnp.where(high > jnp.uint32(0xFFFF), jnp.uint32(0xFFFFFFFF), (high << 16) | low)

    def less(self, other: Count) -> jax.Array:
        """Whether it is the smaller one."""
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))


class Bracket(NamedTuple):
    """A pattern, and how many entries lie below it and not above it; shaped like the columns."""

    value: jax.Array
    below: Count
    through: Count


def magnitude_bits(scores: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """Unsigned integers that order as `abs(scores)` does: the pattern without its sign bit.

    Args:
      scores: Floats of any width and sign.

    Returns:
      uint32, or uint64 for float64; NaN orders above infinity.
    """
    width = 8 * scores.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(scores, jnp.dtype(f"uint{width}"))
    # 16-bit comparisons vectorise worse on CPU than widening first.
    wide = bits.astype(jnp.dtype(f"uint{max(width, 32)}"))
    return wide & jnp.asarray(_largest_pattern(scores.dtype), wide.dtype)


def reversed_bits(scores: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """Unsigned integers that order as `-abs(scores)` does.

    Args:
      scores: Floats of any width and sign.

    Returns:
      As `magnitude_bits`; NaN orders below everything.
    """
    bits = magnitude_bits(scores)
    return jnp.asarray(_largest_pattern(scores.dtype), bits.dtype) - bits


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

    def count(candidates: jax.Array) -> Count:
        return functools.reduce(
            Count.plus, (_count_leaf_below(leaf, candidates) for leaf in leaves)
        )

    total = Count.of(sum(leaf.size for leaf in leaves))
    loop = jax.lax.fori_loop if traced else _host_loop
    return _descend(count, wanted, total, leaves[0].dtype, loop)


@jax.jit
def _count_leaf_below(leaf: jax.Array, candidates: jax.Array) -> Count:
    count = lambda leaf, candidates: _count_below(  # noqa: E731
        leaf, magnitude_bits, candidates, leaf.ndim
    )
    return _auto(count, leaf, keeps_sharding=False)(leaf, candidates)


@jax.jit
def _mark_leaf(leaf: jax.Array, value: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    equal_to = lambda leaf, value: _count(  # noqa: E731
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
    # Leaf by leaf from the host: one program per shape of leaf is compiled, not one per tree.
    for i in range(start, stop):
        state = body(jnp.int32(i), state)
    return state


def _largest_pattern(dtype: Any) -> int:
    return (1 << (8 * jnp.dtype(dtype).itemsize - 1)) - 1


# Compiled here, so that callers outside `jit` do not compile the loops anew at every call.
@functools.partial(jax.jit, static_argnames=("pattern", "axis"))
def _select(scores: jax.Array, wanted: Count, *, pattern: Pattern, axis: int | None) -> jax.Array:
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    members = scores.ndim if axis is None else 1

    def select(scores: jax.Array, wanted: Count) -> jax.Array:
        moved = scores if axis is None else jnp.moveaxis(scores, axis, 0)
        wanted = jax.tree.map(lambda x: jnp.broadcast_to(x, moved.shape[members:]), wanted)
        found = _find(moved, pattern, wanted, members)
        mask = _mark(moved, pattern, found, wanted.minus(found.below), members)
        return mask if axis is None else jnp.moveaxis(mask, 0, axis)

    return _auto(select, scores, keeps_sharding=True)(scores, wanted)


@jax.jit
def _kth(scores: jax.Array, wanted: Count) -> jax.Array:
    def find(scores: jax.Array, wanted: Count) -> jax.Array:
        found = _find(scores, magnitude_bits, wanted, scores.ndim)
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


def _find(scores: jax.Array, pattern: Pattern, wanted: Count, members: int) -> Bracket:
    """The pattern of the wanted rank among the leading `members` axes, in each column."""
    total = jax.tree.map(
        lambda x: jnp.broadcast_to(x, scores.shape[members:]),
        Count.of(math.prod(scores.shape[:members])),
    )
    count = lambda candidates: _count_below(scores, pattern, candidates, members)  # noqa: E731
    return _descend(count, wanted, total, scores.dtype, jax.lax.fori_loop)


def _descend(
    count: Callable[[jax.Array], Count],
    wanted: Count,
    total: Count,
    dtype: Any,
    loop: Callable[..., Any],
) -> Bracket:
    """The largest pattern with fewer than `wanted` entries below it, or 0 where none is wanted.

    Args:
      count: `count(candidates)` with candidates `(3, *columns)` gives how many lie below each.
      wanted: Rank, counted from 1, `(*columns,)`.
      total: Number of entries, `(*columns,)`.
      dtype: Of the scores.
      loop: `jax.lax.fori_loop` or its like.
    """
    columns = total.low.shape
    width = 8 * jnp.dtype(dtype).itemsize
    unsigned = jnp.dtype(f"uint{max(width, 32)}")
    rounds = width // _DIGIT_BITS

    def body(i: jax.Array, state: Bracket) -> Bracket:
        shift = (_DIGIT_BITS * (rounds - 1 - i)).astype(unsigned)
        steps = jnp.arange(1, _CANDIDATES + 1, dtype=unsigned) << shift
        counts = count(state.value[None] + steps.reshape(-1, *(1,) * len(columns)))
        fewer = counts.less(jax.tree.map(lambda x: x[None], wanted))
        digit = fewer.sum(axis=0, dtype=jnp.int32)  # counts grow with the candidate
        bounds = jax.tree.map(
            lambda first, middle, last: jnp.concatenate([first[None], middle, last[None]]),
            state.below,
            counts,
            state.through,
        )
        at = lambda place: jax.tree.map(  # noqa: E731
            lambda x: jnp.take_along_axis(x, place[None], axis=0)[0], bounds
        )
        return Bracket(state.value + (digit.astype(unsigned) << shift), at(digit), at(digit + 1))

    zero = jax.tree.map(jnp.zeros_like, total)
    return loop(0, rounds, body, Bracket(jnp.zeros(columns, unsigned), zero, total))


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
        _over(x, scores.ndim) for x in (row, place, split, ties > 0, found.value)
    )
    early = (line < row) | ((line == row) & (column <= place))
    taken = jnp.where(split, early, some)
    return (bits < value) | ((bits == value) & taken)


def _over(column: jax.Array, ndim: int) -> jax.Array:
    """Puts axes of length 1 in front, for broadcasting one value per column over its members."""
    return column.reshape(*(1,) * (ndim - column.ndim), *column.shape)


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
        equal = _count(row, lambda x: [pattern(x) == _over(value, x.ndim)], 1)
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


def _count_below(scores: jax.Array, pattern: Pattern, candidates: jax.Array, members: int) -> Count:
    """How many entries of each column lie below each of three candidates."""
    # Bound to the candidates, patterns cannot be hoisted out of the loop into a copy of the leaf.
    scores, candidates = jax.lax.optimization_barrier((scores, candidates))

    def below(x: jax.Array) -> list[jax.Array]:
        bits = pattern(x)
        return [bits < _over(candidate, bits.ndim) for candidate in candidates]

    return _count(scores, below, members)


def _count(scores: jax.Array, predicates: Predicates, members: int) -> Count:
    """Counts, over the leading `members` axes, where each predicate holds.

    Args:
      scores: `(*members, *columns)`.
      predicates: Gives up to three bool arrays for any slice of the scores.
      members: Number of axes to count over.

    Returns:
      Counts `(predicates, *columns)`.
    """
    size = math.prod(scores.shape[:members])
    if size >= 2**32:
        raise ValueError(
            f"core.select: one leaf of {size} entries is ranked, but its indices must fit 32 bits. "
            "Declare its leading axes as stacked, so that each matrix is ranked for itself."
        )

    def plainly(scores: jax.Array) -> jax.Array:
        # One pass on accelerators, and a sharded leaf stays where it is: only counts travel.
        axes = tuple(range(members))
        return jnp.stack([b.sum(axis=axes, dtype=jnp.uint32) for b in predicates(scores)])

    def by_slices(scores: jax.Array) -> jax.Array:
        return _count_by_slices(scores.reshape(size, *scores.shape[members:]), predicates)

    if size < 4 * _FIRST_FAN * _SECOND_FAN:
        return Count.of(plainly(scores))
    return Count.of(jax.lax.platform_dependent(scores, cpu=by_slices, default=plainly))


def _count_by_slices(scores: jax.Array, predicates: Predicates) -> jax.Array:
    """Counts along axis 0 by adding slices elementwise.

    XLA's fused reductions on CPU are scalar loops, ten times slower than memory; sums of slices are
    vector loops. Three counters share a 32-bit word on the way.
    """
    length = scores.shape[0] // _FIRST_FAN
    slices = [jax.lax.slice_in_dim(scores, i * length, (i + 1) * length) for i in range(_FIRST_FAN)]
    # The barriers keep XLA from fusing both levels into one huge loop body.
    words = jax.lax.optimization_barrier(
        functools.reduce(jnp.add, [_pack(predicates(part)) for part in slices])
    )
    second = length // _SECOND_FAN
    parts = [jax.lax.slice_in_dim(words, i * second, (i + 1) * second) for i in range(_SECOND_FAN)]
    summed = jax.lax.optimization_barrier(functools.reduce(jnp.add, parts))
    words = jnp.concatenate([summed, words[_SECOND_FAN * second :]])
    counter = jnp.uint32((1 << _COUNTER_BITS) - 1)
    tail = predicates(scores[_FIRST_FAN * length :])
    return jnp.stack(
        [
            ((words >> (_COUNTER_BITS * j)) & counter).sum(axis=0, dtype=jnp.uint32)
            + last.sum(axis=0, dtype=jnp.uint32)
            for j, last in enumerate(tail)
        ]
    )


def _pack(predicates: list[jax.Array]) -> jax.Array:
    """One counter of 0 or 1 for each predicate, in one word."""
    counters = [
        jnp.where(b, jnp.uint32(1 << (_COUNTER_BITS * j)), jnp.uint32(0))
        for j, b in enumerate(predicates)
    ]
    return functools.reduce(jnp.add, counters)
