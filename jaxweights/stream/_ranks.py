"""Exact ranks of magnitudes over tensors that are seen slice by slice.

A sample of the entries brackets the magnitude of each wanted rank. One pass then counts what lies
above the bracket and keeps what lies inside, a few entries in a hundred, among which the exact
threshold is found. Where the bracket missed (which a sample does about once in 400 times), it is
widened and the pass repeated.

Differences of narrow floats have so few values that a bracket often holds one or two of them, each
many times. These are its ends; they are counted, and what lies between is all that is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._rank_search import magnitude_bits
from jaxweights.stream._draws import true_places
from jaxweights.stream._jobs import Job
from jaxweights.stream._program import slice_program
from jaxweights.stream._sums import RUN, partial_sums

# Primes, so that a sample does not keep step with rows.
_STRIDES = (61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381)
_SAMPLE = 1 << 17  # its entries bracket a rank to one in a hundred
_SAMPLED_FROM = 1 << 15  # below, all entries are kept
_TOP = 0xFFFFFFFF
_BFLOAT16 = np.dtype(jnp.bfloat16)
_SIGMAS = 3.0
_NONE, _ALL = -1, np.iinfo(np.int32).max  # places before the first entry, and behind the last
_NO_ENTRIES = np.zeros(0, np.uint32)
_FIELDS = (0, 8, 16, 24)  # where the bytes of an integer begin

Place = tuple[str, int]  # a tensor and the first entry of a slice of it


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one pass finds in a slice.

    Args:
      above: Number of entries above the bracket.
      at_high: `(runs,)`, how many are equal to its upper end, where ends are counted.
      at_low: `(runs,)`, to its lower end, where that is another.
      inside: Patterns of the others in the bracket.
      places: Where they are in the slice.
    """

    above: int
    at_high: np.ndarray
    at_low: np.ndarray
    inside: np.ndarray
    places: np.ndarray


class Nth(NamedTuple):
    """The entry with a threshold's pattern that is so many-th of one run of a slice."""

    run: int
    number: int  # from 1


@dataclasses.dataclass
class Target:
    """The `k` largest magnitudes of one model's values, ties to the first in flat order.

    Args:
      model: Which of the models.
      k: How many.
    """

    model: int
    k: int
    low: int = 0  # the bracket, both ends included
    high: int = _TOP
    counts_ends: bool = False
    seen: dict[Place, Seen] = dataclasses.field(default_factory=dict)
    threshold: int = _TOP
    last: dict[Place, int | Nth] = dataclasses.field(default_factory=dict)

    def bracket(self, sample: np.ndarray, n: int) -> None:
        """Sets the bracket from the patterns of a sample of the `n` entries."""
        m = sample.size
        share = self.k / n
        place = m * (1 - share)
        margin = _SIGMAS * math.sqrt(m * share * (1 - share)) + 8
        low, high = math.floor(place - margin), math.ceil(place + margin)
        ends = [i for i in (low, high) if 0 <= i < m]
        ordered = np.partition(sample, ends) if ends else sample
        self.low = int(ordered[low]) if low >= 0 else 0
        self.high = int(ordered[high]) if high < m else _TOP
        inside = ordered[max(low, 0) : high + 1]
        self.counts_ends = bool(np.all((inside == self.low) | (inside == self.high)))

    def settle(self) -> bool:
        """Finds the threshold among what lies inside; False, with a wider bracket, if it is not."""
        inside = np.concatenate([seen.inside for seen in self.seen.values()])
        at_high, at_low = self.at_ends()
        left = self.k - self.above
        if not 0 < left <= at_high + inside.size + at_low:
            if left <= 0:
                self.low, self.high = self.high, _TOP
            else:
                self.low, self.high = 0, self.low
            self.counts_ends, self.seen = False, {}
            return False
        if left <= at_high:
            self.threshold, wanted = self.high, left
        elif left <= at_high + inside.size:
            # Sorted: where most entries are equal, as differences of narrow floats are, NumPy parts
            # them in quadratic time.
            self.threshold = int(np.sort(inside)[inside.size - (left - at_high)])
            wanted = left - at_high - int(np.count_nonzero(inside > self.threshold))
        else:
            self.threshold, wanted = self.low, left - at_high - inside.size
        # In the order of a tree, which sorts names.
        for where in sorted(self.seen):
            self.last[where], taken = self._last_of(self.seen[where], wanted)
            wanted -= taken
        self.seen = {}
        return True

    @property
    def above(self) -> int:
        """Number of entries above the bracket."""
        return sum(seen.above for seen in self.seen.values())

    def at_ends(self) -> tuple[int, int]:
        """Numbers of entries at the ends of the bracket, where ends are counted."""
        slices = self.seen.values()
        return sum(int(s.at_high.sum()) for s in slices), sum(int(s.at_low.sum()) for s in slices)

    def _last_of(self, seen: Seen, wanted: int) -> tuple[int | Nth, int]:
        """The last one that is taken of a slice's ties, and how many are."""
        if self.counts_ends and self.threshold in (self.low, self.high):
            through = np.cumsum(seen.at_high if self.threshold == self.high else seen.at_low)
            taken = min(wanted, int(through[-1]))
            if not taken:
                return _NONE, 0
            if taken == through[-1]:
                return _ALL, taken
            run = int(np.searchsorted(through, taken))
            return Nth(run, taken - (int(through[run - 1]) if run else 0)), taken
        ties = seen.places[seen.inside == self.threshold]
        taken = min(wanted, ties.size)
        return (int(ties[taken - 1]) if taken else _NONE), taken


Values = Callable[[Any, int], Any]


class RankSurvey:
    """Finds exact thresholds of several models' values; a `Survey`.

    Args:
      values: `values(arrays, model)` gives the ranked float32 values of a model from a job's
        operands, elementwise; traceable, and the same bits from NumPy's arrays. It reads what
        `reads` says, and depends on the model by that alone. Of zeros, with which slices are
        padded, it makes zeros.
      targets: What is wanted.
      entries: Number of entries that are ranked together.
    """

    def __init__(self, values: Values, targets: Sequence[Target], entries: int):
        """Starts with a sample, where there is enough to sample from."""
        self._values = values
        self._open = [target for target in targets if 0 < target.k < entries]
        self._models = sorted({target.model for target in self._open})
        self._entries = entries
        self._operands = sorted({i for model in self._models for i in self.reads(model)})
        self._stride = _stride(entries)
        self._samples: list[list[np.ndarray]] = []
        self._sampling = entries >= _SAMPLED_FROM

    def reads(self, model: int) -> tuple[int, ...]:
        """Which arrays a model's values depend on: the first operand, and the model's own."""
        return (0, model + 1)

    @property
    def samples(self) -> bool:
        """Whether the next pass samples."""
        return self._sampling and bool(self._open)

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> Any:
        """A sample of the patterns, or counts and what lies in the brackets."""
        del job
        if not self._open:
            return None
        if self._sampling:
            drawn = {i: _wide(_flat(arrays[i])[: count : self._stride]) for i in self._operands}
            return [_patterns(self._values(drawn, model)) for model in self._models]
        return [self._seen(target, arrays, count) for target in self._open]

    def _seen(self, target: Target, arrays: Sequence[Any], count: int) -> Seen:
        """What a target's bracket parts."""
        own = self._own(target, arrays)
        if not target.counts_ends:
            above, inside = _split(self._values, own, _edges(target.low, target.high))
            none = np.zeros(1, np.int64)
            number = int(np.count_nonzero(np.asarray(above)[:count]))
            return Seen(number, none, none, *self._kept(own, np.asarray(inside)[:count]))
        low, high = target.low, target.high
        packed = np.asarray(_counts(self._values, own, _edges(low, high)))
        # Few enough for 32 bits, in which NumPy need not cast each of them.
        counts = [
            (packed >> np.uint32(shift) & np.uint32(0xFF))
            .sum(axis=1, dtype=np.uint32)
            .astype(np.int64)
            for shift in _FIELDS
        ]
        above_low, from_low, above_high, from_high = counts
        runs = packed.shape[0]
        length = arrays[0].size // runs
        padding = np.clip(length * np.arange(1, runs + 1) - count, 0, length)
        at_high = from_high - above_high - padding * (high == 0)
        at_low = from_low - above_low - padding * (low == 0)
        kept = _NO_ENTRIES, _NO_ENTRIES
        if low == high:
            at_low = np.zeros_like(at_high)
        elif (above_low > from_high).any():  # of values that the sample did not hold
            _, inside = _split(self._values, own, _edges(low + 1, high - 1))
            kept = self._kept(own, np.asarray(inside)[:count])
        return Seen(int(above_high.sum()), at_high, at_low, *kept)

    def _own(self, target: Target, arrays: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(arrays[i] for i in self.reads(target.model))

    def _kept(self, own: tuple[Any, ...], inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Patterns and places of some entries."""
        places = true_places(inside)
        return self._patterns_of(own, lambda array: _taken(array, places)), places.astype(np.int32)

    def _patterns_of(
        self, own: tuple[Any, ...], part: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Patterns of a part of the entries."""
        return _patterns(self._values([_wide(part(_flat(array))) for array in own], 0))

    def add(self, job: Job, start: int, seen: Any) -> None:
        """Collects the samples, or the counts."""
        if not self._open:
            return
        if self._sampling:
            self._samples.append(seen)
            return
        for target, found in zip(self._open, seen, strict=True):
            target.seen[job.name, start] = found

    def decide(self) -> bool:
        """Sets brackets from the sample, or thresholds from the counts."""
        if self._sampling and self._open:
            self._sampling = False
            for model, parts in zip(self._models, zip(*self._samples, strict=True), strict=True):
                sample = np.concatenate(parts)
                for target in self._open:
                    if target.model == model:
                        target.bracket(sample, self._entries)
            self._samples = []
            return True
        self._open = [target for target in self._open if not target.settle()]
        return bool(self._open)

    def bound(self, target: Target, job: Job, start: int, arrays: Sequence[Any]) -> tuple[int, int]:
        """Tells the target's entries in a slice, of which the arrays are given, from the others.

        Returns:
          A pattern, and the place in the slice of the last entry with it that is the target's; -1
          where none is. All entries with larger patterns are.
        """
        if target.k >= self._entries:
            return 0, _ALL
        if target.k <= 0:
            return _TOP, _NONE
        return target.threshold, self.last(target, (job.name, start), arrays)

    def last(self, target: Target, where: Place, arrays: Sequence[Any]) -> int:
        """The place in a slice of the last entry with the threshold's pattern; -1 for none."""
        last = target.last.get(where, _NONE)
        if not isinstance(last, Nth):
            return last
        first = last.run * RUN
        own = self._own(target, arrays)
        patterns = self._patterns_of(own, lambda array: array[first : first + RUN])
        ties = np.flatnonzero(patterns == np.uint32(target.threshold))
        return first + int(ties[last.number - 1])


def among(values: jax.Array, bound: jax.Array) -> jax.Array:
    """Which entries of a slice are a target's, by its `bound` as `(2,)` uint32 with -1 wrapped."""
    bits = magnitude_bits(values.astype(jnp.float32))
    place = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    last = jax.lax.bitcast_convert_type(bound[1], jnp.int32)
    # One comparison, with a pattern that is one more behind the last tie. No magnitude's reaches
    # the half of all numbers, so that a bound above all is not lost by adding one to it.
    least = jnp.minimum(bound[0], jnp.uint32(1 << 31)) + (place > last).astype(jnp.uint32)
    return bits >= least


def _stride(entries: int) -> int:
    """One entry of how many is sampled; larger tensors get narrower brackets, up to a point."""
    wanted = max(_SAMPLE, entries >> 10)
    return next((prime for prime in _STRIDES if entries <= prime * wanted), _STRIDES[-1])


def _patterns(values: Any) -> np.ndarray:
    """Bits of the magnitudes of float32 values, which order as the magnitudes do."""
    return np.asarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)


def _edges(low: int, high: int) -> np.ndarray:
    return np.array([low, high], np.uint32)


def _flat(array: Any) -> np.ndarray:
    return np.asarray(array).reshape(-1)


def _wide(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, faster than by its own cast; other dtypes as they are."""
    if array.dtype != _BFLOAT16:
        return array
    return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _taken(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Entries at some places; of bfloat16 as integers, which NumPy takes faster."""
    if array.dtype != _BFLOAT16:
        return array[places]
    return array.view(np.uint16)[places].view(_BFLOAT16)


@functools.partial(slice_program, static_argnums=0)
def _split(
    values: Values, arrays: tuple[Any, ...], bracket: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which patterns of a model lie above a bracket, and which inside.

    One program for each target: several would share the widened values, and write them to memory.
    """
    bits = magnitude_bits(values(tuple(array.reshape(-1) for array in arrays), 0))
    above = bits > bracket[1]
    return above, (bits >= bracket[0]) & ~above


@functools.partial(slice_program, static_argnums=0)
def _counts(values: Values, arrays: tuple[Any, ...], bracket: jax.Array) -> jax.Array:
    """How many patterns lie above, and at or above, the ends of a bracket: `(runs, sums)` uint32.

    Each sum is of so few entries that four of them are counted in the bytes of one integer.
    """
    bits = magnitude_bits(values(tuple(array.reshape(-1) for array in arrays), 0))
    above = [bits > bracket[0], bits >= bracket[0], bits > bracket[1], bits >= bracket[1]]
    fields = [x.astype(jnp.uint32) << shift for x, shift in zip(above, _FIELDS, strict=True)]
    return partial_sums(functools.reduce(jnp.bitwise_or, fields))
