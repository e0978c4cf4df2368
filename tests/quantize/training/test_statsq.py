"""StatsQ against the authors' code and its invariants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import fake_quant, statsq, statsq_matrix
from tests._fixtures import fixture


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_scales_and_gradients_are_those_of_the_public_code(bits):
    arrays = fixture("quantize/ofq_statsq_lsq.npz")
    weight = jnp.asarray(arrays["statsq/W2"].T)  # stored (out, in)
    name = f"statsq/W2_b{bits}"
    leaf = jw.apply(statsq(bits=bits), {"w": weight})["w"]
    np.testing.assert_allclose(leaf.scale[0], arrays[f"{name}/s"], rtol=1e-6)
    np.testing.assert_allclose(leaf.materialize().T, arrays[f"{name}/dq"], atol=1e-6)
    probe = jnp.linspace(-1, 1, weight.size).reshape(weight.shape[::-1]).T
    loss = lambda w: jnp.sum(fake_quant({"w": w}, statsq(bits=bits))["w"] * probe)  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(weight).T, arrays[f"{name}/grad"], atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_levels_are_the_odd_multiples_and_none_other(bits):
    weight = 3 * jax.random.normal(jax.random.key(0), (20000, 2))
    leaf = statsq_matrix(weight, bits=bits)
    scale = 2 * np.abs(np.asarray(weight, np.float64)).mean(0)
    np.testing.assert_allclose(leaf.scale[0], scale, rtol=1e-6)
    n = 2 ** (bits - 1)
    expected = np.arange(-2 * n + 1, 2 * n, 2) / (2 * n)
    values = np.asarray(leaf.materialize())
    for column in range(2):
        np.testing.assert_allclose(
            np.unique(values[:, column]), expected * scale[column], rtol=1e-5
        )
        # Exactly symmetric, and each entry at the level nearest to it.
        np.testing.assert_array_equal(
            np.unique(values[:, column]), -np.unique(values[:, column])[::-1]
        )
    far = np.abs(np.asarray(weight)[:, :, None] - (expected[:, None] * scale).T[None])
    np.testing.assert_allclose(np.abs(values - weight), far.min(-1), atol=1e-4)
    assert leaf.codes.nbytes == {1: 5000, 2: 10000, 3: 20000, 8: 40000}[bits]


@pytest.mark.parametrize("bits, error", [(2, 0.138), (3, 0.071), (4, 0.049)])
def test_errors_on_normal_weights_are_the_known_ones(bits, error):
    weight = jax.random.normal(jax.random.key(0), (4096, 32))
    miss = statsq_matrix(weight, bits=bits).materialize() - weight
    assert float(jnp.mean(miss**2)) == pytest.approx(error, rel=0.03)


def test_the_scale_carries_no_gradient_and_clipped_entries_keep_theirs():
    weight = jnp.array([[0.1], [-0.1], [8.0], [0.3]])
    assert float(statsq_matrix(weight, bits=2).materialize()[2, 0]) < 4  # clipped
    grads = jax.grad(lambda w: 2 * fake_quant({"w": w}, statsq(bits=2))["w"].sum())(weight)
    assert grads.ravel().tolist() == [2, 2, 2, 2]


def test_zeros_one_entry_and_settings():
    assert np.all(statsq_matrix(jnp.zeros((6, 2)), bits=2).materialize() == 0)
    one = statsq_matrix(jnp.array([[-1.5]]), bits=1)
    assert float(one.materialize()[0, 0]) == -1.5
    with pytest.raises(ValueError, match=r"quantize.statsq: bits=0 must lie between 1 and 8"):
        statsq(bits=0)
    with pytest.raises(TypeError, match=r"quantize.statsq: bits=2.0 must be an integer"):
        statsq(bits=2.0)
    with pytest.raises(ValueError, match=r"'w': .*not finite"):
        jw.apply(statsq(bits=2), {"w": jnp.array([[jnp.nan]])})


def test_outputs_of_zeros_stay_zeros_beside_others():
    weight = jax.random.normal(jax.random.key(0), (16, 4)).at[:, 2].set(0)
    found = jw.apply(statsq(bits=2), {"kernel": weight})["kernel"].materialize()
    assert not found[:, 2].any() and found[:, [0, 1, 3]].all()
