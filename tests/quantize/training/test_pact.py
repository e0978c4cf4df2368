"""pact: clipping with a learned bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.quantize import pact


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_values_and_gradients_follow_the_definition(bits):
    x = jax.random.normal(jax.random.key(0), (40, 3)) * 2
    bound, probe = jnp.array([0.5, 1.0, 3.0]), jax.random.normal(jax.random.key(1), x.shape)
    steps = 2**bits - 1
    inside = np.clip(x, 0, bound)
    expected = np.round(inside / (bound / steps)[None]) * (bound / steps)[None]
    found = pact(x, bound[None], bits=bits)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    loss = lambda x, b: jnp.sum(pact(x, b, bits=bits) * probe)  # noqa: E731
    d_x, d_bound = jax.grad(loss, argnums=(0, 1))(x, bound[None])
    between = (np.asarray(x) > 0) & (np.asarray(x) < np.asarray(bound))
    assert 0 < between.sum() < x.size
    np.testing.assert_array_equal(d_x, np.where(between, probe, 0))
    above = np.asarray(x) >= np.asarray(bound)
    np.testing.assert_allclose(d_bound[0], np.where(above, probe, 0).sum(0), rtol=1e-5)


def test_a_bound_of_zero_and_bfloat16():
    x = jnp.array([-1.0, 0.0, 2.0], jnp.bfloat16)
    assert pact(x, jnp.array(0.0), bits=4).tolist() == [0, 0, 0]
    assert pact(x, jnp.array(1.0), bits=4).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"quantize.pact: bits=0 must lie between 1 and 8"):
        pact(x, jnp.array(1.0), bits=0)
    with pytest.raises(TypeError, match=r"quantize.pact: bits=2.5 must be an integer"):
        pact(x, jnp.array(1.0), bits=2.5)
