"""Merging into weights that stay quantized: the grid kept, the outputs right, errors by name."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import merge_adapters
from jaxweights.core import Stats, apply
from jaxweights.quantize import (
    add_deltas,
    fp8,
    fp8_dynamic,
    gptq_matrix,
    int8_dynamic,
    output_error,
    requantize,
    round_to_nearest,
)
from jaxweights.weights import (
    Axes,
    LowRank,
    Masked,
    Outliers,
    Quantized,
    Rescaled,
    Rotated,
)
from tests.quantize._requantize import correlated, draw, quantized


def nearest_levels(weight, value):
    """The nearest level of each entry's own group, by looking at all levels, float64."""
    codes = np.arange(2**weight.bits)
    if weight.zero_point is None:
        codes = codes - 2 ** (weight.bits - 1)
    in_dim, out_dim = value.shape
    rows, cols = weight.scale.shape
    of_row = np.arange(in_dim) // (in_dim // rows)
    if weight.group_index is not None:
        of_row = np.asarray(weight.group_index)
    at = np.ix_(of_row, np.arange(out_dim) // (out_dim // cols))
    scale = np.asarray(weight.scale, np.float64)[at]
    zero = 0 if weight.zero_point is None else np.asarray(weight.zero_point, np.float64)[at]
    levels = (codes[:, None, None] - zero) * scale
    best = np.abs(levels - np.asarray(value, np.float64)).argmin(axis=0)
    return np.take_along_axis(levels, best[None], axis=0)[0]


GRIDS = [
    {},
    {"grid": "affine"},
    {"bits": 3, "grid": "gptq_sym"},
    {"bits": 2, "group_size": None, "grid": "affine"},
    {"group_size": "tensor"},
    {"bits": 5},
]


@pytest.mark.parametrize("settings", GRIDS, ids=str)
def test_every_entry_goes_to_the_nearest_level_of_its_own_group(settings):
    weight = quantized(**settings)
    value = weight.materialize() + draw(2, 32, 16, scale=0.7)
    new = requantize(weight, value).weight
    np.testing.assert_allclose(new.materialize(), nearest_levels(weight, value), atol=1e-5)
    chex.assert_trees_all_equal(new.scale, weight.scale)
    assert (new.codes != weight.codes).any()


def test_scattered_groups_and_groups_along_outputs_are_read_as_they_are_stored():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (8, 6)), jnp.int32)
    scale = jnp.abs(draw(3, 2, 3)) + 0.1
    index = jnp.asarray([0, 1, 0, 1, 1, 0, 1, 0], jnp.int32)
    zero = jnp.full((2, 3), 7, jnp.uint8)
    weight = Quantized.from_codes(codes, scale, zero, index, bits=4)
    value = draw(4, 8, 6)
    new = requantize(weight, value).weight
    np.testing.assert_allclose(new.materialize(), nearest_levels(weight, value), atol=1e-5)
    np.testing.assert_array_equal(new.group_index, index)


@pytest.mark.parametrize("settings", GRIDS[:3], ids=str)
def test_its_own_value_comes_back_bit_for_bit(settings):
    weight = quantized(**settings)
    for gram in (None, correlated()):
        chex.assert_trees_all_equal(requantize(weight, weight.materialize(), gram).weight, weight)


def test_with_a_gram_matrix_it_rounds_as_gptq_does_on_the_same_scales():
    value, gram = draw(1, 32, 16), correlated()
    settings = dict(bits=4, group_size=8, grid="affine")
    expected = gptq_matrix(value, gram, static_groups=True, **settings)
    start = apply(round_to_nearest(**settings), {"kernel": value})["kernel"]
    new = requantize(start, value, gram).weight
    np.testing.assert_array_equal(new.codes_matrix(), expected.codes.codes)
    np.testing.assert_array_equal(new.scale, expected.codes.scale)


def test_outputs_are_closer_with_a_gram_matrix_than_without():
    weight, gram = quantized(bits=3), correlated()
    value = weight.materialize() + draw(2, 32, 16, scale=0.3)
    errors = [
        float(output_error(value, requantize(weight, value, given).weight.materialize(), gram))
        for given in (None, gram)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_rescaling_errs_no_more_than_the_old_scales_and_reaches_values_beyond_them():
    weight = quantized()
    value = 1.5 * weight.materialize()
    kept, moved = requantize(weight, value), requantize(weight, value, rescale=True)
    error = lambda r: float(jnp.sum(jnp.square(r.weight.materialize() - value)))  # noqa: E731
    assert float(kept.clipped) > 0.05
    assert float(moved.clipped) < 0.5 * float(kept.clipped)
    assert error(moved) < 0.5 * error(kept)
    own = requantize(weight, weight.materialize(), rescale=True)
    chex.assert_trees_all_equal(own.weight, weight)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("with_gram", [False, True])
def test_a_stack_is_requantized_as_its_slices_are(with_gram, rescale):
    weight = quantized((3, 32, 16), Axes(), grid="affine")
    value = weight.materialize() + draw(2, 3, 32, 16, scale=0.5)
    grams = jnp.stack([correlated(seed=i) for i in range(3)]) if with_gram else None
    together = requantize(weight, value, grams, rescale=rescale).weight
    for i in range(3):
        one = jax.tree.map(lambda x: x[i], weight)  # noqa: B023
        gram = None if grams is None else grams[i]
        alone = requantize(one, value[i], gram, rescale=rescale).weight
        chex.assert_trees_all_equal(jax.tree.map(lambda x: x[i], together), alone)  # noqa: B023


PRODUCTS = {
    "int8": (round_to_nearest(bits=8), int8_dynamic()),
    "int4 groups": (round_to_nearest(bits=4, group_size=8), int8_dynamic()),
    "fp8": (fp8(), fp8_dynamic()),
    "w4a8": (round_to_nearest(bits=4, group_size=8, grid="affine"), fp8_dynamic()),
}


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("case", PRODUCTS)
def test_what_rounds_its_inputs_gets_the_integers_that_the_weight_alone_gets(case, with_gram):
    first, product = PRODUCTS[case]
    axes = Axes(inputs=(-3,), outputs=(-2, -1))  # (in, heads, head_dim)
    layout = {"kernel": axes}
    alone = apply(first, {"kernel": draw(1, 32, 4, 4)}, layout=layout)
    both = apply(product, alone, layout=layout)["kernel"]
    value = alone["kernel"].materialize() + draw(2, 32, 4, 4, scale=0.3)
    gram = correlated() if with_gram else None
    found, expected = requantize(both, value, gram), requantize(alone["kernel"], value, gram)
    assert jax.tree.structure(found.weight) == jax.tree.structure(both)
    chex.assert_trees_all_equal(found.weight.materialize(), expected.weight.materialize())
    assert not np.array_equal(found.weight.materialize(), both.materialize())
    chex.assert_trees_all_close(found[1:], expected[1:])


def test_integers_of_a_product_in_another_order_are_those_of_their_inputs():
    index = jnp.asarray(np.random.default_rng(0).permutation(np.repeat(np.arange(4), 8)), jnp.int32)
    codes = jnp.asarray(np.random.default_rng(1).integers(-8, 8, (32, 6)), jnp.int32)
    weight = Quantized.from_codes(codes, jnp.abs(draw(3, 4, 6)) + 0.1, None, index, bits=4)
    both = apply(int8_dynamic(), {"kernel": weight})["kernel"]
    value = weight.materialize() + draw(4, 32, 6, scale=0.3)
    found, expected = requantize(both, value), requantize(weight, value)
    assert both.order is not None
    chex.assert_trees_all_equal(found.weight.materialize(), expected.weight.materialize())


@pytest.mark.parametrize("product", [int8_dynamic(), fp8_dynamic()], ids=["int8", "fp8"])
def test_adapters_merge_into_what_rounds_its_inputs(product):
    base = apply(product, {"kernel": draw(1, 32, 16)})["kernel"]
    factors = LowRank.over(base, draw(2, 32, 2), draw(3, 2, 16), scaling=0.1)
    merged, loss = merge_adapters({"kernel": factors}, requantize="nearest")
    assert type(merged["kernel"]) is type(base)
    # What lies beyond the scales, which stay, is clipped; the rest is near.
    assert 0.5 < loss["kernel"].survived < 1
    assert np.median(np.abs(merged["kernel"].materialize() - factors.materialize())) < 0.03


def test_attention_kernels_keep_their_shape():
    axes = Axes(inputs=(-3,), outputs=(-2, -1))
    weight = quantized((32, 4, 4), axes)
    value = weight.materialize() + 0.3
    new = requantize(weight, value, correlated()).weight
    assert new.shape == (32, 4, 4)
    plain = requantize(quantized((32, 16)), value.reshape(32, 16), correlated()).weight
    np.testing.assert_array_equal(new.codes, plain.codes)


@pytest.mark.parametrize("with_gram", [False, True])
def test_masks_stay_and_their_zeros_are_made_up_for(with_gram):
    mask = draw(5, 32, 16) > -0.5
    base = apply(round_to_nearest(bits=3, group_size=8, grid="affine"), {"k": draw(1, 32, 16)})
    weight = Masked(base["k"], mask)
    value, gram = draw(2, 32, 16), correlated()
    new = requantize(weight, value, gram if with_gram else None).weight
    dense = np.asarray(new.materialize())
    assert not dense[~np.asarray(mask)].any()
    if with_gram:
        plain = requantize(weight, value).weight.materialize()
        kept = jnp.where(mask, value, 0)
        assert output_error(kept, dense, gram) < output_error(kept, plain, gram)


def test_outliers_are_kept_and_the_rest_is_rounded():
    outliers = Outliers.over(quantized(), jnp.asarray([30.0, -20.0]), jnp.asarray([3, 100]))
    value = outliers.materialize() + 0.2
    new = requantize(outliers, value).weight
    chex.assert_trees_all_equal((new.values, new.index), (outliers.values, outliers.index))
    assert float(jnp.max(jnp.abs(new.materialize() - value))) < 0.5


@pytest.mark.parametrize("kind", ["rescaled", "rotated"])
@pytest.mark.parametrize("with_gram", [False, True])
def test_inputs_that_are_changed_stay_changed_and_the_base_is_rounded(kind, with_gram):
    dense, gram = draw(1, 32, 16), correlated()
    scale = jnp.abs(draw(2, 32)) + 0.3
    if kind == "rescaled":
        start = Rescaled.of(dense / scale[:, None], scale)
        gram_of_base = gram * scale[:, None] * scale[None]
    else:
        start = Rotated.of(dense)
        turned = start.change(start.change(gram).T)  # R^T G R
        gram_of_base = turned
    base = apply(round_to_nearest(bits=3, group_size=8), {"k": start.base})["k"]
    weight = dataclasses.replace(start, base=base)
    given = gram_of_base if with_gram else None
    new = requantize(weight, dense, given).weight
    expected = requantize(base, start.base, given).weight
    same = np.mean(np.asarray(new.base.codes_matrix() == expected.codes_matrix()))
    assert type(new) is type(weight) and same > 0.97  # ties may fall the other way
    stats = Stats({"k": {"gram": gram_of_base, "count": jnp.asarray(256)}})
    delta = {"k": draw(3, 32, 16) * 0.3}
    after, report = add_deltas({"k": weight}, delta, rounding="gptq", stats=stats)
    lost = after["k"].materialize() - weight.materialize() - delta["k"]
    ratio = output_error(lost, 0 * lost, gram) / output_error(delta["k"], 0 * lost, gram)
    np.testing.assert_allclose(report["k"].output_survived, 1 - jnp.sqrt(ratio), atol=1e-3)
