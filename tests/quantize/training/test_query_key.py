"""Products of query and key kernels give the attention of both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import query_key_logits, query_key_product, statsq


@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_what_it_was_before(biased):
    keys = jax.random.split(jax.random.key(0), 6)
    query, key = (jax.random.normal(k, (12, 3, 4)) for k in keys[:2])
    query_bias, key_bias = (jax.random.normal(k, (3, 4)) * float(biased) for k in keys[2:4])
    x, y = jax.random.normal(keys[4], (2, 5, 12)), jax.random.normal(keys[5], (2, 7, 12))
    q = jnp.einsum("bqd,dhk->bhqk", x, query) + query_bias[None, :, None]
    k = jnp.einsum("bqd,dhk->bhqk", y, key) + key_bias[None, :, None]
    expected = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k) / 2)
    one = query_key_product(query, key, rotary=False, query_bias=query_bias if biased else None)
    logits = query_key_logits(x, y, one.product, head_dim=4, offset=one.offset)
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=2e-4)
    assert np.asarray(expected).max() > 0.5  # logits matter
    if biased:
        without = query_key_logits(x, y, one.product, head_dim=4)
        assert np.abs(jax.nn.softmax(without) - expected).max() > 0.05


def test_every_row_has_a_scale_of_its_own():
    keys = jax.random.split(jax.random.key(0))
    query, key = (jax.random.normal(k, (12, 3, 4)) for k in keys)
    product = query_key_product(query, key, rotary=False).product
    layout = {"qk": jw.Axes(inputs=(-1,), outputs=(-2,))}
    leaf = jw.apply(statsq(bits=2), {"qk": product}, layout=layout)["qk"]
    expected = 2 * np.abs(np.asarray(product)).mean(-1)  # (heads, rows)
    np.testing.assert_allclose(leaf.scale[:, 0], expected, rtol=1e-5)
    x = jax.random.normal(keys[0], (5, 12))
    run = jw.lift(lambda p, x: query_key_logits(x, x, p, head_dim=4))
    dense = query_key_logits(x, x, leaf.materialize(), head_dim=4)
    np.testing.assert_allclose(run(leaf, x), dense, rtol=1e-4, atol=1e-4)


def test_rotation_and_shared_keys_are_refused_with_the_reason():
    query, key = jnp.ones((12, 4, 3)), jnp.ones((12, 2, 3))
    with pytest.raises(
        ValueError, match=r"rotary=True. Between the two kernels .* rotates queries"
    ):
        query_key_product(query, query, rotary=True)
    with pytest.raises(ValueError, match=r"query has 4 heads, but key has 2. Keys shared by"):
        query_key_product(query, key, rotary=False)
    with pytest.raises(ValueError, match=r"Both must be \(dim, heads, head_dim\); split the heads"):
        query_key_product(jnp.ones((12, 12)), jnp.ones((12, 12)), rotary=False)
