"""Random choices for slices of tensors, the same however a tensor is cut."""

from __future__ import annotations

import math
import zlib

import numpy as np

_BLOCK = 1 << 20  # entries that one generator serves
_LEVELS = 1 << 8  # of the bits that are drawn for every entry


def drawn_mask(
    density: float, seed: int, path: str, model: str, start: int, count: int
) -> np.ndarray:
    """Which of the entries `start` to `start + count` of a tensor are kept, each by chance.

    They depend on the density, the seed, the path, the model's name and the entry's index alone.
    Eight bits decide about most entries. Those that hit the edge, one in 256, are decided by 53
    more, so that the chance is the density to within 2^-60.

    Args:
      density: Chance of each entry, in [0, 1].
      seed: Of the run.
      path: Of the tensor.
      model: Name of the model whose entries they are.
      start: First entry.
      count: Number of entries.

    Returns:
      `(count,)` bool.
    """
    edge = math.floor(density * _LEVELS)
    rest = density * _LEVELS - edge
    if edge >= _LEVELS:
        return np.ones(count, bool)
    bits = draw(seed, path, model, start, count)
    mask = bits < np.uint8(edge)
    if rest:
        places = true_places(bits == np.uint8(edge))
        mask[places] = _uniform(seed, path, model, start + places) < rest
    return mask


def true_places(mask: np.ndarray) -> np.ndarray:
    """Where a mask that is mostly False is True, looked for by eight entries at once."""
    whole = mask.size // 8 * 8
    words = mask[:whole].view(np.uint64)
    # Booleans: other dtypes are looked through more slowly.
    hit = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[hit].view(np.bool_))
    places = 8 * hit[found >> 3] + (found & 7)
    return np.concatenate([places, whole + np.flatnonzero(mask[whole:])])


def draw(seed: int, path: str, model: str, start: int, count: int) -> np.ndarray:
    """Eight random bits for the entries `start` to `start + count` of a tensor, `(count,)` uint8.

    NumPy promises that its bit generators never change, and they are faster than counter-based
    ones on a CPU.
    """
    parts, done = [], 0
    while done < count:
        block, skip = divmod(start + done, _BLOCK)
        n = min(_BLOCK - skip, count - done)
        bits = np.random.SFC64(_seeds(seed, path, model, block))
        parts.append(bits.random_raw(-(-(skip + n) // 8)).view(np.uint8)[skip : skip + n])
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
