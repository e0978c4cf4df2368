"""Quantized caches against a slow NumPy definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.quantize import dequantize_kv, quantize_kv, update_kv


def oracle(x, bits, group, axis):
    """Round every group along an axis between its extremes."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    groups = x.reshape(*x.shape[:-1], -1, group)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    step = np.where(high > low, (high - low) / (2**bits - 1), 1)
    rounded = np.round((groups - low) / step) * step + low
    return np.moveaxis(rounded.reshape(x.shape), -1, axis)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_keys_are_rounded_channel_by_channel_and_values_token_by_token(bits):
    keys = jax.random.split(jax.random.key(0))
    k, v = (jax.random.normal(key, (2, 3, 16, 24)) for key in keys)
    small = quantize_kv(k, v, bits=bits, group_size=8)
    found_k, found_v = jax.jit(dequantize_kv)(small)
    np.testing.assert_allclose(found_k, oracle(k, bits, 8, -2), atol=2e-5)
    np.testing.assert_allclose(found_v, oracle(v, bits, 8, -1), atol=2e-5)
    per_byte = {1: 8, 2: 4, 3: 2, 4: 2, 8: 1}[bits]
    assert small.keys.codes.shape == (2, 3, 16 // per_byte, 24)
    assert small.values.codes.shape == (2, 3, 16, 24 // per_byte)
    assert small.keys.codes.dtype == jnp.uint8


def test_a_large_channel_of_keys_disturbs_no_other():
    k = jax.random.normal(jax.random.key(0), (64, 32)).at[:, 5].mul(100.0)
    small = quantize_kv(k, k, bits=2)
    others = np.delete(np.arange(32), 5)
    miss_k, miss_v = (np.abs(x - k)[:, others].mean() for x in dequantize_kv(small))
    assert miss_k < 0.4
    assert miss_v > 0.6


def test_constant_groups_and_bfloat16_with_narrow_steps():
    k = jnp.full((4, 4), -7.3)
    np.testing.assert_array_equal(dequantize_kv(quantize_kv(k, k, group_size=4))[0], k)
    x = jax.random.normal(jax.random.key(0), (32, 32)).astype(jnp.bfloat16)
    small = quantize_kv(x, x, bits=8)
    assert small.keys.scale.dtype == jnp.bfloat16
    back, _ = dequantize_kv(small, dtype=jnp.bfloat16)
    assert back.dtype == jnp.bfloat16
    # Codes are chosen for the step as it is stored; only what that falls short of is clipped.
    assert np.abs((back - x).astype(jnp.float32)).max() < 0.05


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_cache_filled_group_by_group_is_the_whole(bits):
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))
    quantize = lambda x: quantize_kv(x, -x, bits=bits, group_size=4)  # noqa: E731
    write = jax.jit(update_kv)
    cache = quantize(jnp.zeros_like(x))
    for start in (4, 0, 12, 8):
        cache = write(cache, quantize(x[:, start : start + 4]), start)
    for ours, whole in zip(jax.tree.leaves(cache), jax.tree.leaves(quantize(x)), strict=True):
        np.testing.assert_array_equal(ours, whole)


def test_refusals():
    x = jnp.ones((8, 8))
    with pytest.raises(ValueError, match=r"group_size=3 does not divide the 8 tokens"):
        quantize_kv(x, x, group_size=3)
    with pytest.raises(ValueError, match=r"group_size=4 does not divide the 6 channels of values"):
        quantize_kv(x, x[:, :6], group_size=4)
    with pytest.raises(ValueError, match=r"bits=9 must lie between 1 and 8"):
        quantize_kv(x, x, bits=9, group_size=4)
    with pytest.raises(ValueError, match=r"keys have shape \(8, 8\) and values \(4, 8\)"):
        quantize_kv(x, x[:4], group_size=4)
    with pytest.raises(ValueError, match=r"groups of 4 tokens and 4 codes a byte, .* 8 and 4"):
        update_kv(quantize_kv(x, x, group_size=4), quantize_kv(x, x, group_size=8), 0)
