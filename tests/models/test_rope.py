"""Rotations and their rescaling against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.models import RopeScaling
from jaxweights.models._rope import rope_frequencies, rotary_angles, rotate


def test_a_rotation_is_multiplication_by_a_complex_unit():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    frequencies = rope_frequencies(8, 100.0)
    turned = rotate(x, *rotary_angles(positions, frequencies))
    x, angles = np.asarray(x), np.arange(5)[:, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=1e-6)


def test_linear_scaling_counts_positions_more_slowly():
    plain, scaled = rope_frequencies(8, 1e4), rope_frequencies(8, 1e4, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(plain, 4.0 * scaled, rtol=1e-6)


def test_llama3_scaling_keeps_fast_slows_slow_and_joins_them_without_a_step():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    plain, scaled = rope_frequencies(128, 5e5), rope_frequencies(128, 5e5, scaling)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    slow = wavelength > 8192
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8.0, rtol=1e-6)
    between = ~slow & (wavelength >= 8192 / 4)
    assert between.any() and slow.any()
    # The release's own formula, for what lies between.
    smooth = (8192 / wavelength[between] - 1.0) / (4.0 - 1.0)
    expected = (1 - smooth) * plain[between] / 8.0 + smooth * plain[between]
    np.testing.assert_allclose(scaled[between], expected, rtol=1e-5)


def test_given_factors_divide_their_frequencies():
    scaled = rope_frequencies(4, 1e4, RopeScaling("factors", factors=(2.0, 5.0)))
    np.testing.assert_allclose(scaled, [0.5, 0.002], rtol=1e-6)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(kind="yarn", factor=2.0), "kind='yarn' must be one of"),
        (dict(kind="linear"), "factor is missing. kind='linear' needs"),
        (
            dict(kind="linear", factor=2.0, low_freq_factor=1.0),
            "low_freq_factor=1.0 has no meaning",
        ),
        (dict(kind="llama3", factor=8.0), "high_freq_factor is missing"),
        (
            dict(
                kind="llama3",
                factor=8.0,
                low_freq_factor=4.0,
                high_freq_factor=4.0,
                original_max_positions=64,
            ),
            "low_freq_factor=4.0 must lie below high_freq_factor=4.0",
        ),
        (
            dict(kind="factors", factors=(1.0, 0.0)),
            r"factors=\(1.0, 0.0\) must be a tuple of positive floats",
        ),
    ],
)
def test_a_scaling_with_missing_or_meaningless_settings_is_refused(settings, words):
    with pytest.raises(ValueError, match=f"models.RopeScaling: {words}"):
        RopeScaling(**settings)
