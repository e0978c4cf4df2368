"""Embedding gradients are shrunk; nothing else is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxweights.quantize import shrink_embedding_gradients, shrink_gradient


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_value_is_unchanged_and_the_gradient_is_alpha_times_as_large(alpha, dtype):
    x = jax.random.normal(jax.random.key(0), (7,)).astype(dtype)
    value, back = jax.vjp(lambda x: shrink_gradient(x, alpha), x)
    np.testing.assert_array_equal(value, x)
    (gradient,) = back(jnp.full_like(x, 2))
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, jnp.full_like(x, 2) * jnp.asarray(alpha, dtype))


def test_only_tables_are_shrunk():
    params = {
        "embedding": jnp.ones((3, 2)),
        "tok": {"table": jnp.ones((3, 2))},
        "dense": {"kernel": jnp.ones((2, 2))},
    }
    grads = jax.tree.map(lambda p: 3 * p, params)
    for pattern, expected in ((None, (1.5, 3, 3)), ("tok/.*", (3, 1.5, 3)), (".*", (1.5,) * 3)):
        tx = shrink_embedding_gradients(0.5, embeddings=pattern)
        new, _ = jax.jit(tx.update)(grads, tx.init(params))
        found = (new["embedding"], new["tok"]["table"], new["dense"]["kernel"])
        assert tuple(float(x[0, 0]) for x in found) == expected


def test_it_runs_first_in_a_chain():
    optimizer = optax.chain(shrink_embedding_gradients(), optax.sgd(1.0))
    params = {"embedding": jnp.zeros((2, 1))}
    updates, _ = optimizer.update({"embedding": jnp.ones((2, 1))}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embedding"], -0.1)


def test_refusals():
    with pytest.raises(ValueError, match=r"alpha=1.5 must lie in \[0, 1\]"):
        shrink_embedding_gradients(1.5)
    with pytest.raises(ValueError, match=r"no leaf is named like an embedding; there are \['w'\]"):
        shrink_embedding_gradients().init({"w": jnp.ones((2, 2))})
    with pytest.raises(
        ValueError, match=r"pattern 'emb' matches no leaf. The nearest: \['embed'\]"
    ):
        shrink_embedding_gradients(embeddings="emb").init({"embed": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression"):
        shrink_embedding_gradients(embeddings="(")
