"""Exact ranks of magnitudes over tensors that are seen slice by slice.

A sample of the entries brackets the magnitude of each wanted rank. One pass then counts what lies
above the bracket and keeps what lies inside, a few entries in a hundred, among which the exact
threshold is found. Where the bracket missed (which a sample does about once in 400 times), it is
widened and the pass repeated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._rank_search import magnitude_bits
from jaxweights.stream._draws import true_places
from jaxweights.stream._jobs import Job

# Primes, so that a sample does not keep step with rows.
_STRIDES = (61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381)
_SAMPLE = 1 << 17  # its entries bracket a rank to one in a hundred
_SAMPLED_FROM = 1 << 15  # below, all entries are kept
_TOP = 0xFFFFFFFF
_BFLOAT16 = np.dtype(jnp.bfloat16)
_SIGMAS = 3.0

Place = tuple[str, int]  # a tensor and the first entry of a slice of it


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
    above: int = 0
    inside: dict[Place, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    threshold: int = _TOP
    last: dict[Place, int] = dataclasses.field(default_factory=dict)

    def bracket(self, sample: np.ndarray, n: int) -> None:
        """Sets the bracket from sorted patterns of a sample of the `n` entries."""
        m = sample.size
        share = self.k / n
        place = m * (1 - share)
        margin = _SIGMAS * math.sqrt(m * share * (1 - share)) + 8
        low, high = math.floor(place - margin), math.ceil(place + margin)
        self.low = int(sample[low]) if low >= 0 else 0
        self.high = int(sample[high]) if high < m else _TOP

    def settle(self) -> bool:
        """Finds the threshold among what lies inside; False, with a wider bracket, if it is not."""
        inside = np.concatenate([values for values, _ in self.inside.values()])
        left = self.k - self.above
        if not 0 < left <= inside.size:
            if left <= 0:
                self.low, self.high = self.high, _TOP
            else:
                self.low, self.high = 0, self.low
            self.above, self.inside = 0, {}
            return False
        place = inside.size - left
        self.threshold = int(np.partition(inside, place)[place])
        wanted = left - int(np.count_nonzero(inside > self.threshold))
        # In the order of a tree, which sorts names.
        for where in sorted(self.inside):
            values, places = self.inside[where]
            ties = places[values == self.threshold]
            taken = min(wanted, ties.size)
            self.last[where] = int(ties[taken - 1]) if taken else -1
            wanted -= taken
        self.inside = {}
        return True


Values = Callable[[Any, int], Any]


class RankSurvey:
    """Finds exact thresholds of several models' values; a `Survey`.

    Args:
      values: `values(arrays, model)` gives the ranked float32 values of a model from a job's
        operands, elementwise; traceable, and the same bits from NumPy's arrays. It reads what
        `reads` says, and depends on the model by that alone.
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
        host = [np.asarray(array).reshape(-1) for array in arrays]
        if self._sampling:
            drawn = {i: _wide(host[i][: count : self._stride]) for i in self._operands}
            return [_patterns(self._values(drawn, model)) for model in self._models]
        seen = []
        for target in self._open:
            bracket = np.array([target.low, target.high], np.uint32)
            reads = self.reads(target.model)
            own = tuple(arrays[i] for i in reads)
            above, inside = _split(self._values, own, bracket)
            found = true_places(np.asarray(inside)[:count])
            chosen = {i: _wide(_taken(host[i], found)) for i in reads}
            patterns = _patterns(self._values(chosen, target.model))
            number = int(np.count_nonzero(np.asarray(above)[:count]))
            seen.append((number, (patterns, found.astype(np.int32))))
        return seen

    def add(self, job: Job, start: int, seen: Any) -> None:
        """Collects the samples, or the counts."""
        if not self._open:
            return
        if self._sampling:
            self._samples.append(seen)
            return
        for target, (above, inside) in zip(self._open, seen, strict=True):
            target.above += above
            target.inside[job.name, start] = inside

    def decide(self) -> bool:
        """Sets brackets from the sample, or thresholds from the counts."""
        if self._sampling and self._open:
            self._sampling = False
            for model, parts in zip(self._models, zip(*self._samples, strict=True), strict=True):
                sample = np.sort(np.concatenate(parts))
                for target in self._open:
                    if target.model == model:
                        target.bracket(sample, self._entries)
            self._samples = []
            return True
        self._open = [target for target in self._open if not target.settle()]
        return bool(self._open)

    def bound(self, target: Target, job: Job, start: int) -> tuple[int, int]:
        """Tells the target's entries in a slice from the others.

        Returns:
          A pattern, and the place in the slice of the last entry with it that is the target's; -1
          where none is. All entries with larger patterns are.
        """
        if target.k >= self._entries:
            return 0, np.iinfo(np.int32).max
        if target.k <= 0:
            return _TOP, -1
        return target.threshold, target.last[job.name, start]


def among(values: jax.Array, bound: jax.Array) -> jax.Array:
    """Which entries of a slice are a target's, by its `bound` as `(2,)` uint32 with -1 wrapped."""
    bits = magnitude_bits(values.astype(jnp.float32))
    place = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    last = jax.lax.bitcast_convert_type(bound[1], jnp.int32)
    return (bits > bound[0]) | ((bits == bound[0]) & (place <= last))


def _stride(entries: int) -> int:
    """One entry of how many is sampled; larger tensors get narrower brackets, up to a point."""
    wanted = max(_SAMPLE, entries >> 10)
    return next((prime for prime in _STRIDES if entries <= prime * wanted), _STRIDES[-1])


def _patterns(values: Any) -> np.ndarray:
    """Bits of the magnitudes of float32 values, which order as the magnitudes do."""
    return np.asarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)


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


@functools.partial(jax.jit, static_argnums=0)
def _split(
    values: Values, arrays: tuple[Any, ...], bracket: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which patterns of a model lie above a bracket, and which inside.

    One program for each target: several would share the widened values, and write them to memory.
    """
    bits = magnitude_bits(values(tuple(array.reshape(-1) for array in arrays), 0))
    above = bits > bracket[1]
    return above, (bits >= bracket[0]) & ~above
