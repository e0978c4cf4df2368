import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.sparsify._counts import count_zeros, count_zeros_traced


@pytest.mark.parametrize(
    "sparsity, size, zeros",
    [(0.29, 100, 29), (0.7, 10, 7), (0.5, 7, 3), (0.0, 9, 0), (0.1, 3, 0), (0.57, 100, 57)],
)
def test_counts_are_the_floor_of_the_decimal_product(sparsity, size, zeros):
    assert count_zeros(sparsity, size) == zeros
    assert int(count_zeros_traced(jnp.float32(sparsity), size)) == zeros


@pytest.mark.parametrize("size", [1, 5, 4096, 999_983, 2**24 + 3, 45_000_000, 2**31 + 7, 2**32 - 1])
def test_traced_counts_are_exact_where_float32_is_not(size):
    count = jax.jit(count_zeros_traced, static_argnums=1)
    # Within float32's rounding of the next integer, but at most 1e-2, a product counts as it.
    slack = Fraction(min(1e-6 + size * 2.0**-25, 1e-2))
    for sparsity in (0.0, 0.5, 0.7, 1 / 3, 1e-5, 0.001, 0.9999):
        exact = Fraction(float(np.float32(sparsity))) * size
        assert int(count(jnp.float32(sparsity), size)) == min(math.floor(exact + slack), size - 1)


def test_a_traced_sparsity_of_one_still_keeps_a_weight():
    assert int(count_zeros_traced(jnp.float32(1.0), 10)) == 9
