import numpy as np
import pytest

from jaxweights.checkpoint.exchange._words import pack_words, unpack_words
from tests.checkpoint.exchange._oracles import stream_along, stream_down


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 96])
def test_codes_follow_each_other_in_the_bits_of_one_long_integer(bits, count):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (count, 3))
    down = pack_words(codes, bits=bits, axis=0)
    assert down.dtype == np.int32
    np.testing.assert_array_equal(down, stream_down(codes, bits))
    np.testing.assert_array_equal(
        pack_words(codes.T, bits=bits, axis=1), stream_along(codes.T, bits)
    )
    for words, axis, want in ((down, 0, codes), (down.T, 1, codes.T)):
        got = unpack_words(np.ascontiguousarray(words), bits=bits, count=count, axis=axis)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, want)


def test_a_code_may_lie_across_two_words():
    words = pack_words(np.array([0] * 10 + [0b101] + [0] * 21), bits=3, axis=0).view(np.uint32)
    assert words.tolist() == [0b01 << 30, 0b1, 0]  # bits 30, 31 and 32
