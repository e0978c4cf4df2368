"""Random choices for slices of tensors, the same however a tensor is cut."""

from __future__ import annotations

import math
import sys
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.stream._memory import aligned

_BLOCK = 1 << 20  # entries that one generator serves
_LEVELS = 1 << 8  # of the bits that are drawn at once
_FIRST, _NEXT = 0, 1  # what generators serve


def drawn_bits(
    density: float, seed: int, path: str, model: str, start: int, count: int
) -> np.ndarray:
    """Which of the entries `start` to `start + count` of a tensor are kept, each by chance.

    They depend on the density, the seed, the path, the model's name and the entry's index alone.

    Every entry has a uniform number, and is kept where that is below the density. The first binary
    digit of the number decides about all entries where the density is a half, and about every
    second elsewhere. Where it does not, the next eight decide; one in 256 of these is decided by 53
    more, so that the chance is the density to within 2^-60.

    Args:
      density: Chance of each entry, in [0, 1].
      seed: Of the run.
      path: Of the tensor.
      model: Name of the model whose entries they are.
      start: First entry.
      count: Number of entries.

    Returns:
      A bit for each entry, set where it is kept, `(bytes,)` uint8. The lowest bit of the first byte
      is that of the last multiple of eight that is not above `start`. See `words_of`.
    """
    first = start - start % 8
    nbytes = -(-(start + count - first) // 8)
    if density >= 1:
        return np.full(nbytes, 0xFF, np.uint8)
    low = ~_bytes(seed, path, model, _FIRST, first // 8, nbytes)  # whether it is below a half
    above_half = density >= 0.5
    share = 2 * density - above_half  # of the half in which the density lies
    if not share:
        return low if above_half else np.zeros_like(low)
    within = np.packbits(_below(share, seed, path, model, first, 8 * nbytes), bitorder="little")
    return low | within if above_half else low & within


def words_of(bits: np.ndarray, start: int, count: int) -> np.ndarray:
    """The masks of `drawn_bits` as words, `(words,)` uint32, where XLA reads them in place.

    The lowest bit of the first word is that of the entry `start`; `kept` takes them apart.
    """
    words = aligned(4 * -(-count // 32)).view(np.uint32)
    if start % 8:
        flags = np.unpackbits(bits, bitorder="little")[start % 8 :]
        bits = np.packbits(flags, bitorder="little")
    nbytes = -(-count // 8)
    words.view(np.uint8)[:nbytes] = bits[:nbytes]
    return words if sys.byteorder == "little" else words.byteswap()


def kept(values: jax.Array, words: Any) -> jax.Array:
    """Values, flat, where the bits of `words_of` are set, else zero.

    Each bit is shifted to the top of its word and from there over all others, so that an `and` with
    a float drops or keeps it. On a CPU that takes half the time of a choice by booleans, and words
    are taken apart faster than bytes are read.
    """
    integers = jnp.int64 if values.dtype.itemsize == 8 else jnp.int32
    place = jax.lax.broadcasted_iota(jnp.uint32, (words.size, 32), 1)
    top = jnp.broadcast_to(words[:, None], place.shape) << (jnp.uint32(31) - place)
    mask = jax.lax.bitcast_convert_type(top, jnp.int32) >> 31
    mask = mask.reshape(-1)[: values.size].astype(integers)
    bits = jax.lax.bitcast_convert_type(values, integers) & mask
    return jax.lax.bitcast_convert_type(bits, values.dtype)


def true_places(mask: np.ndarray) -> np.ndarray:
    """Where a mask that is mostly False is True, looked for by eight entries at once."""
    whole = mask.size // 8 * 8
    words = mask[:whole].view(np.uint64)
    # Booleans: other dtypes are looked through more slowly.
    hit = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[hit].view(np.bool_))
    places = 8 * hit[found >> 3] + (found & 7)
    return np.concatenate([places, whole + np.flatnonzero(mask[whole:])])


def _below(share: float, seed: int, path: str, model: str, start: int, count: int) -> np.ndarray:
    """Whether what follows the first digit of each number is below a share, `(count,)` bool."""
    edge = math.floor(share * _LEVELS)
    rest = share * _LEVELS - edge
    drawn = _bytes(seed, path, model, _NEXT, start, count)
    mask = drawn < np.uint8(edge)
    if rest:
        places = true_places(drawn == np.uint8(edge))
        mask[places] = _uniform(seed, path, model, start + places) < rest
    return mask


def _bytes(seed: int, path: str, model: str, kind: int, start: int, count: int) -> np.ndarray:
    """Random bytes `start` to `start + count` of a tensor, `(count,)` uint8.

    NumPy promises that its bit generators never change, and they are faster than counter-based
    ones on a CPU. The first digits of eight entries are one byte, the next eight of each another.
    """
    block_bytes = _BLOCK // 8 if kind == _FIRST else _BLOCK
    parts, done = [], 0
    while done < count:
        block, skip = divmod(start + done, block_bytes)
        n = min(block_bytes - skip, count - done)
        bits = np.random.SFC64(_seeds(seed, path, model, block, kind))
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
