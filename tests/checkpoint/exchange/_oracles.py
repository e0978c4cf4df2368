"""The packings, written down a second time: whole integers in Python, nibble by nibble."""

import numpy as np

from tests._fixtures import fixture


def case_of(file, case):
    """Arrays of one case of a fixture, by what they are."""
    prefix = f"{case}/"
    arrays = fixture(file)
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def stream(codes, bits):
    """Int32 words of one run of codes: a single long integer, cut into words."""
    total = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return np.frombuffer(total.to_bytes(4 * count, "little"), "<i4")


def stream_down(codes, bits):
    """Columns as streams."""
    return np.stack([stream(column, bits) for column in codes.T], axis=1)


def stream_along(codes, bits):
    """Rows as streams."""
    return np.stack([stream(row, bits) for row in codes])


def awq_words(codes):
    """Eight columns a word; nibble i holds column 0, 2, 4, 6, 1, 3, 5, 7 of them."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for row in range(rows):
        for word in range(columns // 8):
            for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[row, word] |= np.uint32(int(codes[row, 8 * word + column]) << (4 * nibble))
    return words.view(np.int32)


def random_matrix(*, bits, in_dim=64, out_dim=32, groups=2, seed=0, low_zero=1, scale=np.float16):
    """Unsigned codes `(in, out)`, scales and zero points `(groups, out)`, and the dense matrix."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (in_dim, out_dim))
    scales = rng.uniform(0.01, 0.1, (groups, out_dim)).astype(scale)
    zero = rng.integers(low_zero, 2**bits, (groups, out_dim))
    return codes, scales, zero


def dense(codes, scales, zero, index=None):
    """`(in, out)` float32."""
    if index is None:
        index = np.arange(len(codes)) // (len(codes) // len(scales))
    return (codes - zero[index]).astype(np.float32) * scales[index].astype(np.float32)
