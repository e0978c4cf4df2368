"""Results are cast as the compiler casts them, and never hold what is not finite."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxweights.stream._store import checked, stored

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def _patterns():
    """float32 numbers of all sizes, and those next to ties of bfloat16."""
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    every = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    return every[np.isfinite(every)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_cast_to_the_nearest_ties_to_even(dtype):
    values = _patterns()
    got = np.asarray(stored(jnp.asarray(values), np.dtype(dtype)))
    with np.errstate(over="ignore", under="ignore"):
        want = values.astype(dtype)
    if dtype == ml_dtypes.bfloat16:  # refused, as the next test says
        assert np.isinf(want).any()
        want = np.where(np.isinf(want), np.asarray(np.nan, dtype), want)
    kind = np.uint32 if np.dtype(dtype).itemsize == 4 else np.uint16
    normal = np.abs(values) >= np.finfo(np.float32).tiny  # XLA takes smaller ones for zero
    np.testing.assert_array_equal(got.view(kind)[normal], want.view(kind)[normal])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_written(dtype, bad):
    fine, broken = np.ones(64, np.float32), np.ones(64, np.float32)
    broken[5] = bad
    good = stored(jnp.asarray(fine), np.dtype(dtype), jnp.asarray(fine))
    np.testing.assert_array_equal(checked("w", (), (), good), fine.astype(dtype))
    for arrays in ((broken, fine), (fine, broken)):
        with pytest.raises(ValueError, match="'w': the merged values overflow"):
            checked("w", (), (), stored(jnp.asarray(arrays[0]), np.dtype(dtype), arrays[1]))


def test_overflow_of_a_narrow_dtype_is_refused():
    largest = np.full(8, np.finfo(np.float32).max, np.float32)
    for dtype in DTYPES[1:]:
        with pytest.raises(ValueError, match="overflow the dtype"):
            checked("w", (), (), stored(jnp.asarray(largest), np.dtype(dtype)))
