"""Random choices for slices of tensors, the same however a tensor is cut."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

_BLOCK = 1 << 20  # entries that one generator serves
_LEVELS = 8  # random bits that are drawn for every entry, at most


def drawn_bits(
    density: float, seed: int, path: str, model: str, start: int, count: int
) -> np.ndarray:
    """Which of the entries `start` to `start + count` of a tensor are kept, each by chance.

    They depend on the density, the seed, the path, the model's name and the entry's index alone.

    Every entry has a uniform number whose binary digits are drawn from the first on, and is kept
    where that is below the density. No digits are drawn behind the density's last: 0.5 asks for one
    bit an entry, 0.75 for two. Eight digits leave one entry in 256 undecided between a number and
    a density that has more; 53 further ones of these entries alone decide, so that the chance is
    the density to within 2^-60.

    Args:
      density: Chance of each entry, in [0, 1].
      seed: Of the run.
      path: Of the tensor.
      model: Name of the model whose entries they are.
      start: First entry.
      count: Number of entries.

    Returns:
      A bit for each entry, set where it is kept, `(bytes,)` uint8. The lowest bit of the first byte
      is that of the last multiple of eight that is not above `start`. See `spread`.
    """
    first = start - start % 8
    nbytes = -(-(start + count - first) // 8)
    edge = math.floor(density * (1 << _LEVELS))
    rest = density * (1 << _LEVELS) - edge
    if edge >> _LEVELS:
        return np.full(nbytes, 0xFF, np.uint8)
    # Whether each number is below the density, and whether it is equal to it, by the digits so far.
    below, equal = np.zeros(nbytes, np.uint8), np.full(nbytes, 0xFF, np.uint8)
    for digit, one in enumerate(_digits(edge, all_of_them=bool(rest))):
        drawn = _bits(seed, path, model, digit, first // 8, nbytes)
        if one:
            below |= equal & ~drawn
            equal &= drawn
        else:
            equal &= ~drawn
    if rest:
        undecided = np.flatnonzero(equal != 0)
        row, column = np.nonzero(np.unpackbits(equal[undecided, None], axis=1, bitorder="little"))
        places = first + 8 * undecided[row] + column
        decided = np.zeros((undecided.size, 8), bool)
        decided[row, column] = _uniform(seed, path, model, places) < rest
        below[undecided] |= np.packbits(decided, axis=1, bitorder="little")[:, 0]
    return below


def spread(bits: np.ndarray, start: int, count: int) -> np.ndarray:
    """The masks of `drawn_bits` as numbers, `(count,)` int8: -1 keeps an entry, 0 drops it.

    All bits of -1 are set, so that a compiled `and` with those of a float drops or keeps it. On a
    CPU that takes half the time of a choice by booleans.
    """
    skip = start % 8
    mask = np.unpackbits(bits, count=skip + count, bitorder="little")[skip:].view(np.int8)
    return np.negative(mask, out=mask)


def true_places(mask: np.ndarray) -> np.ndarray:
    """Where a mask that is mostly False is True, looked for by eight entries at once."""
    whole = mask.size // 8 * 8
    words = mask[:whole].view(np.uint64)
    # Booleans: other dtypes are looked through more slowly.
    hit = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[hit].view(np.bool_))
    places = 8 * hit[found >> 3] + (found & 7)
    return np.concatenate([places, whole + np.flatnonzero(mask[whole:])])


def _digits(edge: int, *, all_of_them: bool) -> Iterator[bool]:
    """Binary digits of a density from the first on, without the zeros at their end."""
    left = edge
    for place in reversed(range(_LEVELS)):
        if not (left or all_of_them):
            return
        yield bool(edge >> place & 1)
        left &= (1 << place) - 1


def _bits(seed: int, path: str, model: str, digit: int, start: int, count: int) -> np.ndarray:
    """A random bit for each entry of a tensor, by eight: the bytes `start` to `start + count`.

    NumPy promises that its bit generators never change, and they are faster than counter-based
    ones on a CPU.
    """
    parts, done, block_bytes = [], 0, _BLOCK // 8
    while done < count:
        block, skip = divmod(start + done, block_bytes)
        n = min(block_bytes - skip, count - done)
        bits = np.random.SFC64(_seeds(seed, path, model, block, digit))
        words = bits.random_raw(-(-(skip + n) // 8)).astype("<u8", copy=False)
        parts.append(words.view(np.uint8)[skip : skip + n])
        done += n
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *parts])


def _uniform(seed: int, path: str, model: str, places: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) for some entries, by their indices.

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014), whose state is the index times the
    golden ratio's odd 64-bit fraction.
    """
    [key] = _seeds(seed, path, model).generate_state(1, np.uint64)
    x = key + places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0**-53


def _seeds(seed: int, path: str, model: str, *more: int) -> np.random.SeedSequence:
    identity = (seed, zlib.crc32(path.encode()), zlib.crc32(model.encode()))
    return np.random.SeedSequence((*identity, *more))
