"""Outliers: the sum, its layouts, stacks and slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.core._plan import leaf_bytes
from jaxweights.lift import lift
from jaxweights.quantize import round_to_nearest
from jaxweights.weights import Axes, LowRank, Outliers, View


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_the_base_plus_the_entries_rounded_once(dtype):
    base = draw(0, 4, 3).astype(dtype)
    values = jnp.asarray([3.0, 0.001, 7.0], jnp.float16)
    weight = Outliers.over(base, values, jnp.asarray([1, 5, 12]))  # the last place is not used
    exact = np.asarray(base, np.float64)
    exact[0, 1] += 3.0
    exact[1, 2] += float(values[1])
    np.testing.assert_array_equal(
        weight.materialize(), jnp.asarray(exact, jnp.float32).astype(dtype)
    )
    assert weight.dtype == dtype and weight.count == 3


def test_the_base_is_read_unrounded():
    base = apply(round_to_nearest(bits=8), {"k": draw(0, 8, 4)})["k"].astype(jnp.bfloat16)
    weight = Outliers.over(base, jnp.asarray([0.5], jnp.float32), jnp.asarray([2]))
    expected = base.astype(jnp.float32).materialize().at[0, 2].add(0.5)
    np.testing.assert_array_equal(weight.materialize(), expected.astype(jnp.bfloat16))


def test_heads_and_transposes_keep_the_places_of_the_matrix():
    view = View.of((4, 2, 3), Axes(inputs=(-3,), outputs=(-2, -1)))
    weight = Outliers.over(jnp.zeros((4, 2, 3)), jnp.ones(1), jnp.asarray([6 * 2 + 4]), view=view)
    assert np.argwhere(np.asarray(weight.materialize())).tolist() == [[2, 1, 1]]
    turned = weight.transpose((1, 0, 2))
    np.testing.assert_array_equal(turned.materialize(), weight.materialize().transpose(1, 0, 2))
    joined = weight.reshape((4, 6))
    np.testing.assert_array_equal(joined.materialize(), weight.materialize().reshape(4, 6))


def test_a_scanned_stack_under_factors_runs_as_its_dense_weights_do():
    base = apply(
        round_to_nearest(bits=4, group_size=4), {"k": draw(0, 3, 8, 8)}, layout={"k": Axes()}
    )["k"]
    index = jnp.tile(jnp.asarray([[3, 40]]), (3, 1)) + jnp.arange(3)[:, None]
    weight = Outliers.over(base, draw(1, 3, 2), index, view=View.of((3, 8, 8)))
    weight = LowRank.over(weight, draw(2, 3, 8, 2), draw(3, 3, 2, 8), view=View.of((3, 8, 8)))

    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["k"])[0]

    x = draw(4, 5, 8)
    dense = model({"k": weight.materialize()}, x)
    np.testing.assert_allclose(jax.jit(lift(model))({"k": weight}, x), dense, atol=1e-5)


def test_bytes_are_those_of_the_base_and_of_the_entries():
    base = apply(round_to_nearest(bits=8), {"k": draw(0, 8, 4)})["k"]
    weight = Outliers.over(base, jnp.ones(5, jnp.bfloat16), jnp.arange(5))
    assert leaf_bytes(weight) == leaf_bytes(base) + 5 * (4 + 2)
    assert weight.describe() == "Outliers(Quantized(bits=8), count=5)"


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"values have shape \(2,\) and index \(3,\)"):
        Outliers.over(jnp.ones((2, 2)), jnp.ones(2), jnp.zeros(3, int))
    with pytest.raises(
        ValueError, match=r"base of shape \(2, 2\) needs both to be \('k',\)|needs both"
    ):
        Outliers.over(jnp.ones((2, 2)), jnp.ones((1, 2)), jnp.zeros((1, 2), int))
