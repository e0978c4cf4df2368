"""How represented weights print, and what they say to those who take them for arrays."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.weights import Axes, LowRank, Masked


@pytest.fixture(scope="module")
def quantized():
    weight = jax.random.normal(jax.random.key(0), (8, 4))
    return jw.apply(jw.quantize.round_to_nearest(bits=4, group_size=4), {"w": weight})["w"]


def test_a_quantized_weight_prints_as_one_line_without_values(quantized):
    words = "Quantized(8x4 float32, bits=4, group_size=4, codes=uint8[4,4], scale=float32[2,4])"
    assert repr(quantized) == str(quantized) == words


def test_nested_weights_print_inside_each_other(quantized):
    masked = Masked(quantized, jnp.ones((8, 4), bool))
    assert repr(masked) == f"Masked(8x4 float32, base={quantized!r}, mask=bool[8,4])"


def test_axes_are_told_where_they_are_not_the_usual_ones():
    tx = jw.quantize.round_to_nearest(bits=8)
    layout = {"w": Axes((-1,), (-2,))}
    weight = jw.apply(tx, {"w": jnp.ones((4, 8))}, layout=layout)["w"]
    assert "inputs=(-1,), outputs=(-2,)" in repr(weight)


@pytest.mark.parametrize("put", [jnp.shape, lambda x: None, lambda x: "anything"])
def test_a_weight_whose_arrays_a_map_replaced_still_prints(quantized, put):
    assert repr(jax.tree.map(put, quantized)).startswith("Quantized(")


USES = {
    "x @ w": lambda w: jnp.ones((2, 8)) @ w,
    "w @ x": lambda w: w @ jnp.ones((4, 2)),
    "w + 1": lambda w: w + 1,
    "2 * w": lambda w: 2 * w,
    "w[0]": lambda w: w[0],
    "for row in w": list,
    "jnp.dot": lambda w: jnp.dot(jnp.ones((2, 8)), w),
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_who_forgets_lift_is_told_of_it(quantized, use):
    with pytest.raises(TypeError, match=r"8x4.*was used as an array.*jaxweights\.lift\(fn\)"):
        use(quantized)


def test_an_attribute_of_arrays_is_missed_with_the_same_words(quantized):
    with pytest.raises(AttributeError, match=r"no attribute 'T', which arrays have.*lift"):
        _ = quantized.T
    assert getattr(quantized, "T", "none") == "none" and not hasattr(quantized, "no_such")


def test_lifted_functions_may_use_weights_as_arrays(quantized):
    fn = lambda w: (w[0] + 1, w.T, w * 2, jnp.sum(w))  # noqa: E731
    for got, expected in zip(jw.lift(fn)(quantized), fn(quantized.materialize()), strict=True):
        assert jnp.array_equal(got, expected)


def test_weights_are_still_copied_and_pickled(quantized):
    again = pickle.loads(pickle.dumps(quantized))
    assert jnp.array_equal(again.materialize(), quantized.materialize())
    low_rank = LowRank.over(jnp.eye(2), jnp.ones((2, 1)), jnp.ones((1, 2)))
    assert repr(low_rank).startswith("LowRank(2x2 float32, ")
