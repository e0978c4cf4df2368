"""ternary and binary against slow NumPy definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import binary, ternary


def ternary_oracle(weight, *, axis, fitted):
    w = np.asarray(weight, np.float64)
    mean = np.abs(w).mean(axis=axis, keepdims=True)
    codes = np.clip(np.round(w / (mean + 1e-5)), -1, 1)
    scale = (codes * w).sum(axis=axis, keepdims=True) / np.maximum(
        np.abs(codes).sum(axis=axis, keepdims=True), 1
    )
    return codes * (scale if fitted else mean)


@pytest.mark.parametrize("share, axis", [("tensor", None), ("output", 0)])
@pytest.mark.parametrize("fitted", [False, True])
def test_ternary_is_the_rounded_quotient_by_the_mean_magnitude(share, axis, fitted):
    weight = jax.random.normal(jax.random.key(0), (52, 9)) * jnp.arange(1.0, 10)[None]
    tx = ternary(share=share, scale="least_squares" if fitted else "absmean")
    leaf = jw.apply(tx, {"w": weight})["w"]
    expected = ternary_oracle(weight, axis=axis, fitted=fitted)
    np.testing.assert_allclose(leaf.materialize(), expected, rtol=1e-6)
    assert leaf.codes.nbytes == 52 * 9 // 4
    assert set(np.unique(leaf.codes_matrix())) == {-1, 0, 1}


@pytest.mark.parametrize("tx, error", [
    (ternary(), 0.264), (ternary(scale="least_squares"), 0.213), (binary(), 0.364)
])  # fmt: skip
def test_errors_on_normal_weights_are_the_known_ones(tx, error):
    weight = jax.random.normal(jax.random.key(0), (512, 256))
    miss = jw.materialize(jw.apply(tx, {"w": weight}))["w"] - weight
    assert float(jnp.mean(miss**2)) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("share, axis", [("tensor", None), ("output", 0)])
def test_binary_is_the_sign_about_the_mean_times_the_mean_magnitude(share, axis):
    weight = np.asarray(jax.random.normal(jax.random.key(0), (40, 6)) + 0.3)
    found = jw.materialize(jw.apply(binary(share=share), {"w": jnp.asarray(weight)}))["w"]
    above = weight > weight.mean(axis=axis, keepdims=True)
    expected = np.where(above, 1, -1) * np.abs(weight).mean(axis=axis, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert above.mean() > 0.4
    assert not np.array_equal(above, weight > 0)


@pytest.mark.parametrize("tx", [ternary(), ternary(share="output"), binary()])
def test_zeros_stay_zeros_and_one_entry_is_exact(tx):
    leaf = jw.apply(tx, {"w": jnp.zeros((6, 3))})["w"]
    assert np.all(leaf.materialize() == 0)
    assert np.all(leaf.scale == 1)
    one = jw.materialize(jw.apply(tx, {"w": jnp.array([[-0.7]])}))["w"]
    np.testing.assert_allclose(np.abs(one), 0.7, rtol=1e-6)


def test_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"quantize.ternary: share='row' is unknown. Choose one"):
        ternary(share="row")
    with pytest.raises(ValueError, match=r"quantize.ternary: scale='max' is unknown"):
        ternary(scale="max")
    with pytest.raises(ValueError, match=r"quantize.binary: share='row' is unknown"):
        binary(share="row")
    with pytest.raises(ValueError, match=r"'w': is already a Quantized"):
        jw.apply(binary(), jw.apply(ternary(), {"w": jnp.ones((4, 4))}))
    with pytest.raises(ValueError, match=r"'w': 1 of 1 groups hold values that are not finite"):
        jw.apply(ternary(), {"w": jnp.array([[1.0, jnp.nan]])})
