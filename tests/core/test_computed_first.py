import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core._computed_first import computed_first


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_nothing_is_changed(dtype):
    info = jnp.finfo(dtype)
    values = jnp.array([0.0, -0.0, 1 / 3, info.max, info.tiny, jnp.inf, -jnp.inf, jnp.nan], dtype)
    for run in (computed_first, jax.jit(computed_first)):
        kept = run(values)
        assert kept.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(kept, np.float32), np.asarray(values, np.float32), strict=True
        )
        np.testing.assert_array_equal(jnp.signbit(kept), jnp.signbit(values))


def test_the_derivative_is_that_of_the_identity():
    slope = jax.grad(lambda x: jnp.sum(jnp.square(computed_first(x))))(jnp.array([3.0, -2.0]))
    np.testing.assert_array_equal(slope, [6.0, -4.0])
