"""Dense streams of narrow integers in 32-bit words, as GPTQ and compressed-tensors store them."""

from __future__ import annotations

import numpy as np

_RUN = 32  # codes after which a stream of any width begins a new word


def pack_words(codes: np.ndarray, *, bits: int, axis: int) -> np.ndarray:
    """Puts unsigned codes one after another into the bits of words, lowest bits first.

    Args:
      codes: Integers from 0 to `2**bits - 1`.
      bits: Bits per code, 1 to 8. A code may lie across two words.
      axis: Axis along which codes follow each other.

    Returns:
      Int32 words; `n` codes along the axis become `ceil(n * bits / 32)`, the last filled with 0.

    Example:
      >>> pack_words(np.array([1, 2, 3]), bits=4, axis=0).tolist()
      [801]
    """
    codes = np.moveaxis(codes, axis, 0)
    count = len(codes)
    words = np.zeros((-(-count // _RUN), bits, *codes.shape[1:]), np.uint32)
    for i in range(min(_RUN, count)):
        lane = codes[i::_RUN].astype(np.uint32)  # the i-th code of every run
        word, shift = divmod(i * bits, 32)
        words[: len(lane), word] |= lane << np.uint32(shift)
        if shift + bits > 32:
            words[: len(lane), word + 1] |= lane >> np.uint32(32 - shift)
    words = words.reshape(-1, *codes.shape[1:])[: word_count(count, bits)]
    return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)


def unpack_words(words: np.ndarray, *, bits: int, count: int, axis: int) -> np.ndarray:
    """The inverse of `pack_words`: `count` codes along the axis, uint8.

    Example:
      >>> unpack_words(np.array([801], np.int32), bits=4, count=3, axis=0).tolist()
      [1, 2, 3]
    """
    words = np.moveaxis(words, axis, 0).view(np.uint32)
    runs = -(-count // _RUN)
    whole = np.zeros((runs * bits, *words.shape[1:]), np.uint32)
    whole[: len(words)] = words
    whole = whole.reshape(runs, bits, *words.shape[1:])
    codes = np.empty((runs, _RUN, *words.shape[1:]), np.uint8)
    mask = np.uint32(2**bits - 1)
    for i in range(_RUN):
        word, shift = divmod(i * bits, 32)
        lane = whole[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            lane |= whole[:, word + 1] << np.uint32(32 - shift)
        codes[:, i] = lane & mask
    codes = codes.reshape(-1, *words.shape[1:])[:count]
    return np.ascontiguousarray(np.moveaxis(codes, 0, axis))


def word_count(codes: int, bits: int) -> int:
    """Words that a stream of so many codes takes."""
    return -(-codes * bits // 32)
