import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.weights import Masked, Weight, materialize


def random_masked(shape=(3, 4, 5), dtype=jnp.float32):
    key_w, key_m = jax.random.split(jax.random.key(0))
    mask = jax.random.bernoulli(key_m, 0.5, shape)
    return Masked(jax.random.normal(key_w, shape, dtype), mask)


def oracle(weight):
    return np.where(np.asarray(weight.mask), np.asarray(weight.base), 0)


def test_removed_entries_are_zero_even_where_the_base_is_not_finite_or_negative_zero():
    base = jnp.array([[jnp.nan, jnp.inf, -1.0, -0.0, 2.0]])
    dense = Masked(base, jnp.array([[False, False, False, False, True]])).materialize()
    np.testing.assert_array_equal(dense, [[0, 0, 0, 0, 2]])
    assert not np.signbit(dense).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shape_dtype_and_value_are_those_of_the_dense_weight(dtype):
    weight = random_masked(dtype=dtype)
    dense = weight.materialize()
    assert (dense.shape, dense.dtype) == (weight.shape, weight.dtype) == ((3, 4, 5), dtype)
    np.testing.assert_array_equal(dense, oracle(weight))


def test_lazy_rearrangements_equal_those_of_the_dense_weight():
    weight = random_masked()
    dense = weight.materialize()
    indices = jnp.array([[2, 0], [1, 1]])
    pairs = [
        (weight.transpose((2, 0, 1)).materialize(), dense.transpose((2, 0, 1))),
        (weight.reshape((3, 20)).materialize(), dense.reshape(3, 20)),
        (weight.astype(jnp.bfloat16).materialize(), dense.astype(jnp.bfloat16)),
        (weight.take(indices), jnp.take(dense, indices, axis=0)),
    ]
    for lazy, expected in pairs:
        assert lazy.dtype == expected.dtype
        np.testing.assert_array_equal(lazy, expected)


def test_a_represented_base_that_cannot_follow_makes_the_caller_materialize():
    class Stubborn(Weight):
        shape, dtype = (2, 2), jnp.dtype("float32")

        def materialize(self):
            return jnp.ones((2, 2))

    weight = Masked(Stubborn(), jnp.eye(2, dtype=bool))
    np.testing.assert_array_equal(weight.materialize(), np.eye(2))
    assert weight.transpose((1, 0)) is None
    assert weight.reshape((4,)) is None
    assert weight.astype(jnp.bfloat16) is None
    assert weight.take(jnp.array([0])) is None


def test_slices_taken_by_scan_and_vmap_are_masked_weights_of_the_slice():
    weight = random_masked()
    dense = weight.materialize()
    x = jnp.arange(4.0)
    _, scanned = jax.lax.scan(lambda c, w: (c, x @ w.unstacked().materialize()), None, weight)
    mapped = jax.vmap(lambda w: x @ w.materialize())(weight)
    # The products may be associated differently from a batched product: float32 rounding.
    np.testing.assert_allclose(scanned, x @ dense, rtol=1e-6)
    np.testing.assert_allclose(mapped, x @ dense, rtol=1e-6)


def test_masks_nest_and_the_gradient_never_reaches_a_removed_entry():
    inner = random_masked()
    outer = Masked(inner, ~jnp.zeros(inner.shape, bool).at[0].set(True))
    np.testing.assert_array_equal(outer.materialize()[1:], inner.materialize()[1:])
    assert not outer.materialize()[0].any()
    grad = jax.grad(lambda base: (Masked(base, inner.mask).materialize() ** 2).sum())(inner.base)
    np.testing.assert_array_equal(grad, 2 * oracle(inner))


def test_it_works_on_abstract_values_and_under_jit():
    weight = random_masked()
    abstract = jax.eval_shape(lambda w: w, weight)
    assert abstract.shape == weight.shape and abstract.dtype == weight.dtype
    assert jax.eval_shape(materialize, weight).shape == weight.shape
    np.testing.assert_array_equal(jax.jit(materialize)(weight), weight.materialize())
