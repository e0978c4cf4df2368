"""The quotient of two floats, as accelerators get it right too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.weights._divide import divide, nearest_quotient


def operands(n=20_000):
    """Floats of all sizes, small integers, neighbours of 1 and powers of two."""
    rng = np.random.default_rng(0)
    near_one = 1 + rng.integers(0, 8, n) * 2.0**-23
    values = [rng.normal(size=n), np.exp2(rng.uniform(-100, 20, n)), rng.integers(1, 2**24, n)]
    by = [rng.normal(size=n), np.exp2(rng.uniform(-20, 20, n)), rng.integers(1, 300, n)]
    values += [near_one, np.exp2(rng.integers(-9, 9, n))]
    by += [rng.permutation(near_one), near_one]
    return (np.concatenate(x).astype(np.float32) for x in (values, by))


@pytest.mark.parametrize("off", [-3, -2, -1, 0, 1, 2, 3])
def test_a_quotient_that_is_a_few_units_off_is_rounded(off):
    values, by = operands()
    exact = values / by
    given = (exact.view(np.int32) + np.int32(off)).view(np.float32)
    assert off == 0 or not np.array_equal(given, exact)
    np.testing.assert_array_equal(nearest_quotient(given, values, by), exact)


def test_what_has_no_normal_quotient_is_left_as_it_was():
    tiny, inf, nan = np.finfo(np.float32).smallest_subnormal, np.inf, np.nan
    values = np.array([0, 0, 1, inf, nan, 1, 1, tiny, -inf, 3e38], np.float32)
    by = np.array([1, -1, inf, 2, 1, nan, tiny, 2, 2, 1e-3], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        quotient = values / by
    kept = nearest_quotient(quotient, values, by)
    np.testing.assert_array_equal(np.asarray(kept).view(np.uint32), quotient.view(np.uint32))


def test_derivatives_are_those_of_a_quotient():
    for argument in (0, 1):
        slope = jax.grad(divide, argument)(jnp.float32(3), jnp.float32(4))
        assert slope == (1 / 4, -3 / 16)[argument]
    slopes = jax.grad(lambda by: divide(jnp.arange(3.0), by).sum())(jnp.float32(2))
    assert slopes == -3 / 4


def test_operands_are_broadcast_and_numbers_taken():
    table = jnp.arange(6.0).reshape(2, 3)
    assert np.array_equal(divide(table, jnp.ones((1, 3)) * 3), np.asarray(table) / np.float32(3))
    assert np.array_equal(divide(table, 7), np.asarray(table) / np.float32(7))
