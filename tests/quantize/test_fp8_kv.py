"""Caches of 8-bit floats against a slow NumPy definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxweights.quantize import dequantize_kv, fp8_kv, update_fp8_kv

KEY = jax.random.key(0)
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def draw(*shape, seed=0):
    """Heads of very different sizes."""
    sizes = 10.0 ** np.arange(-2, shape[-3] - 2) if len(shape) > 2 else np.ones(())
    x = np.random.default_rng(seed).normal(size=shape) * np.reshape(sizes, (*sizes.shape, 1, 1))
    return x.astype(np.float32)


def oracle(x, element, axes):
    """Nearest 8-bit floats, halves to even, by a search through all of them."""
    table = np.arange(256, dtype=np.uint8).view(DTYPES[element]).astype(np.float64)
    order = np.argsort(np.where(np.isfinite(table), np.abs(table), np.inf), kind="stable")
    levels = np.unique(np.abs(table[np.isfinite(table)]))
    assert len(order) == 256 and levels[-1] == LARGEST[element]
    scale = np.abs(x).max(axes, keepdims=True) / np.float32(LARGEST[element])
    units = (x / scale).astype(np.float64)
    upper = np.clip(np.searchsorted(levels, np.abs(units)), 1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    up = np.abs(units) - low > high - np.abs(units)
    tie = np.abs(units) - low == high - np.abs(units)
    odd = (upper - 1) % 2 == 1  # levels are in the order of their codes, whose last bit decides
    return np.sign(units) * np.where(up | (tie & odd), high, low), scale


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scope, axes", [("head", (-2, -1)), ("token", (-1,))])
def test_codes_and_scales_are_those_of_a_search_in_numpy(element, scope, axes):
    k, v = draw(2, 3, 6, 8), draw(2, 3, 6, 4, seed=1)
    cache = jax.jit(lambda k, v: fp8_kv(k, v, element=element, scope=scope))(k, v)
    for x, codes, scale in ((k, cache.keys, cache.key_scale), (v, cache.values, cache.value_scale)):
        levels, expected = oracle(x, element, axes)
        assert codes.dtype == DTYPES[element]
        np.testing.assert_array_equal(scale, expected)
        np.testing.assert_array_equal(np.asarray(codes).astype(np.float64), levels)
    back = dequantize_kv(cache)
    steps = {"e4m3": 16, "e5m2": 8}[element]
    for x, found in zip((k, v), back, strict=True):
        top = np.abs(x).max((-2, -1), keepdims=True)
        assert np.all(np.abs(found - x) <= np.abs(x) / steps + top * 1e-4)
    assert cache.nbytes == 2 * 3 * 6 * 12 + 2 * cache.key_scale.size * 4


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_ties_go_to_even_codes_from_every_dtype(element):
    table = np.arange(256, dtype=np.uint8).view(DTYPES[element]).astype(np.float32)
    levels = np.unique(table[np.isfinite(table) & (table >= 0)])
    middles = (levels[1:] + levels[:-1]) / 2
    x = np.concatenate([middles, -middles, levels[-1:]])[None]
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        given = x.astype(dtype)
        cache = fp8_kv(jnp.asarray(given), jnp.asarray(given), element=element)
        assert float(cache.key_scale[0, 0]) == 1.0
        expected = given.astype(np.float32).astype(DTYPES[element])
        np.testing.assert_array_equal(np.asarray(cache.keys).view(np.uint8), expected.view("u1"))
    found = np.asarray(fp8_kv(jnp.asarray(x), jnp.asarray(x), element=element).keys)[0]
    assert not np.any(found.view(np.uint8)[: len(middles)] & 1)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_what_is_too_large_saturates_and_nan_stays(element):
    top = LARGEST[element]
    x = jnp.array([[1.0, 2.0, jnp.inf, -jnp.inf, jnp.nan]])
    cache = fp8_kv(x, x, element=element)
    assert float(cache.key_scale[0, 0]) == np.float32(2) / np.float32(top)
    expected = [top / 2, top, top, -top, np.nan]
    np.testing.assert_array_equal(cache.keys[0].astype(jnp.float32), expected)
    # A calibrated scale that is too small saturates, as well: a conversion alone makes NaN of 465.
    given = jnp.ones((1, 1))
    wide = jnp.array([[top * 1.2, -top * 100, 3e38, 1.0]])
    cache = fp8_kv(wide, wide, element=element, key_scale=given, value_scale=given)
    np.testing.assert_array_equal(cache.keys[0].astype(jnp.float32), [top, -top, top, 1.0])
    later = update_fp8_kv(cache, -wide, wide, 0)
    np.testing.assert_array_equal(later.keys[0].astype(jnp.float32), [-top, top, -top, -1.0])


def test_zeros_and_denormals_have_scale_one():
    for x in (jnp.zeros((2, 3, 4)), jnp.full((2, 3, 4), 1e-40)):
        for scope in ("head", "token"):
            cache = fp8_kv(x, x, scope=scope)
            assert np.all(np.asarray(cache.key_scale) == 1)
            assert not np.any(dequantize_kv(cache)[0])
    empty = fp8_kv(jnp.zeros((2, 0, 4)), jnp.zeros((2, 0, 4)))
    assert empty.keys.shape == (2, 0, 4) and np.all(np.asarray(empty.key_scale) == 1)


@pytest.mark.parametrize("scope", ["head", "token"])
def test_a_cache_filled_token_by_token_is_the_whole(scope):
    x = draw(2, 3, 8, 4)
    scales = {}
    if scope == "head":
        seen = fp8_kv(x, -x)
        scales = {"key_scale": seen.key_scale.max(0), "value_scale": seen.value_scale.max(0)}
    whole = fp8_kv(x, -x, scope=scope, **scales)
    cache = fp8_kv(0 * x, 0 * x, scope=scope, **scales)
    write = jax.jit(update_fp8_kv)
    for start in (4, 0, 6, 2):
        cache = write(cache, x[:, :, start : start + 2], -x[:, :, start : start + 2], start)
    for ours, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_a_small_head_keeps_its_precision_beside_a_large_one():
    x = draw(3, 16, 8)
    per_head, _ = dequantize_kv(fp8_kv(x, x))
    scale = jnp.full((1, 1, 1), np.abs(x).max() / 448)
    shared, _ = dequantize_kv(fp8_kv(x, x, key_scale=scale, value_scale=scale))
    miss = lambda y: np.linalg.norm(y - x, axis=(1, 2)) / np.linalg.norm(x, axis=(1, 2))  # noqa: E731
    assert np.all(miss(per_head) < 0.04)
    assert miss(shared)[0] > 1.05 * miss(per_head)[0]


def test_scales_of_heads_may_follow_the_products():
    k, q = draw(3, 16, 8), draw(3, 5, 8, seed=2)
    cache = fp8_kv(k, k)
    scores = jnp.einsum("hqd,hkd->hqk", q, dequantize_kv(cache)[0], precision="highest")
    narrow = cache.keys.astype(jnp.float32)
    later = jnp.einsum("hqd,hkd->hqk", q, narrow, precision="highest") * cache.key_scale
    np.testing.assert_allclose(later, scores, rtol=1e-5, atol=1e-5)


def test_a_donated_cache_is_changed_in_place():
    x = jnp.zeros((2, 64, 8))
    cache = fp8_kv(x, x, key_scale=jnp.ones((2, 1, 1)), value_scale=jnp.ones((2, 1, 1)))
    new = jnp.ones((2, 1, 8))
    compiled = jax.jit(update_fp8_kv, donate_argnums=0).lower(cache, new, new, 3).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.keys.nbytes + cache.values.nbytes
    assert memory.temp_size_in_bytes < cache.keys.nbytes
    where = cache.keys.unsafe_buffer_pointer()
    later = compiled(cache, new, new, 3)
    assert later.keys.unsafe_buffer_pointer() == where and cache.keys.is_deleted()
    assert np.asarray(later.keys[:, 3]).astype(np.float32).tolist() == np.ones((2, 8)).tolist()


def test_caches_go_through_scan_and_vmap():
    x = jnp.asarray(draw(4, 3, 8, 4))
    one = jax.vmap(lambda x: fp8_kv(x, x))(x)
    for ours, expected in zip(jax.tree.leaves(one), jax.tree.leaves(fp8_kv(x, x)), strict=True):
        np.testing.assert_array_equal(ours, expected)

    def step(cache, t):
        token = jax.lax.dynamic_slice_in_dim(x, t, 1, axis=-2)
        return update_fp8_kv(cache, token, token, t), None

    cache, _ = jax.lax.scan(step, fp8_kv(0 * x, 0 * x, scope="token"), jnp.arange(8))
    np.testing.assert_array_equal(cache.keys, fp8_kv(x, x, scope="token").keys)
    back, _ = dequantize_kv(cache, dtype=jnp.bfloat16)
    assert back.dtype == jnp.bfloat16 and back.shape == x.shape


def test_refusals():
    x = jnp.ones((3, 8, 4))
    with pytest.raises(ValueError, match=r"fp8_kv: element='e2m1' is unknown"):
        fp8_kv(x, x, element="e2m1")
    with pytest.raises(ValueError, match=r"fp8_kv: keys have shape \(3, 8, 4\) and values \(3, 4"):
        fp8_kv(x, x[:, :4])
    words = r"fp8_kv: key_scale has shape \(3,\), which is no scale for heads .* such as \(3, 1, 1"
    with pytest.raises(ValueError, match=words):
        fp8_kv(x, x, key_scale=jnp.ones(3))
    with pytest.raises(ValueError, match=r"value_scale has shape \(2, 1, 1\), which is no scale"):
        fp8_kv(x, x, value_scale=jnp.ones((2, 1, 1)))
    with pytest.raises(ValueError, match=r"key_scale is given, but scope='token' finds"):
        fp8_kv(x, x, scope="token", key_scale=jnp.ones((3, 1, 1)))
    cache = fp8_kv(x, x)
    with pytest.raises(ValueError, match=r"start=7: 2 tokens do not fit into the 8 .* 0 and 6"):
        update_fp8_kv(cache, x[:, :2], x[:, :2], 7)
    words = r"update_fp8_kv: values have shape \(3, 1, 4\) and those of the cache \(3, 8, 4\)"
    with pytest.raises(ValueError, match=words):
        update_fp8_kv(cache, x[:, :2], x[:, :1], 0)
