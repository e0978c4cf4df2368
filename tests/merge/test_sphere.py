"""Tests of lengths, angles and the factors made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.merge._sphere import angle, arcs, measured, norms_of, sine_ratio, vectors_in

HOW = {"axes": (0,), "deltas": False}


def _norms(leaf):
    return measured(norms_of(vectors_in(leaf, 1, (0,))), leaf, [leaf], **HOW)


def between(first, second):
    """The angle between two vectors."""
    pair = [jnp.asarray(x, jnp.float32) for x in (first, second)]
    found = measured(arcs(vectors_in(pair[0], 2, (0,))), pair[0], pair, **HOW)
    return float(angle(found.apart, found.together)[0])


@pytest.mark.parametrize("omega", [1e-4, 0.03, 1.0, np.pi / 2, 3.0, np.pi - 1e-3])
def test_angles_are_accurate_from_tiny_ones_to_nearly_straight_ones(omega):
    got = between([1.0, 0.0], [2 * np.cos(omega), 2 * np.sin(omega)])
    # Two rounded unit vectors: an angle is known to about 1e-7, in absolute terms.
    assert abs(got - omega) < 3e-7
    if omega == 1e-4:  # the arc cosine of a rounded cosine knows nothing of it
        assert np.arccos(np.float32(np.cos(omega))) == 0


def test_the_ratio_of_sines_has_no_step_where_the_series_takes_over():
    t = np.linspace(-0.5, 1.5, 9)
    for omega in (0.0, 1e-6, 0.999e-3, 1.001e-3, 0.1, 1.0, 3.0):
        got = sine_ratio(jnp.asarray(t, jnp.float32), jnp.full(9, omega, jnp.float32))
        want = t if omega == 0 else np.sin(t * omega) / np.sin(omega)
        # Rounding of the sines, which near π are small.
        np.testing.assert_allclose(got, want, rtol=0, atol=4e-7 / max(np.sin(omega), 0.1))


def test_the_ratio_of_sines_has_finite_gradients_at_zero():
    slope = jax.grad(sine_ratio, argnums=(0, 1))(0.3, 0.0)
    np.testing.assert_allclose(slope, (1.0, 0.0), atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-5, 1.0, 1e15])
def test_norms_are_right_where_squares_would_vanish(size):
    x = size * np.random.default_rng(0).normal(size=50)
    leaf = jnp.asarray(x, jnp.float32)
    (got,) = _norms(leaf)
    np.testing.assert_allclose(got, [np.linalg.norm(x)], rtol=1e-6)
    # Under `jit`, where values cannot be looked at, it is the same.
    (traced,) = jax.jit(_norms)(leaf)
    np.testing.assert_allclose(traced, got, rtol=1e-6)


def test_tiny_vectors_do_not_spoil_those_beside_them():
    leaf = jnp.asarray([[1e-25, 3.0, 0.0], [0.0, 4.0, 0.0]], jnp.float32)
    (got,) = _norms(leaf)
    np.testing.assert_allclose(got, [1e-25, 5.0, 0.0], rtol=1e-6)
