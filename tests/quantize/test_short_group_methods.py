"""Every method with integer groups takes pad="zero"; what cannot have it says so when built."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights import quantize
from jaxweights.core import Layout, Stats
from jaxweights.quantize import Grid
from jaxweights.quantize._awq_search import _relative_size, rounded, search_limits
from jaxweights.weights import Axes, Masked, Quantized

GROUP, INPUTS, OUTPUTS = 12, 32, 6  # two groups and two thirds of one
ROWS = 36  # with zeros that fill up the last
SHORT = {"group_size": GROUP, "pad": "zero"}


def data(seed=0):
    """A weight, correlated inputs and their Gram matrix."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(256, 4)) @ rng.normal(size=(4, INPUTS)) + 0.4 * rng.normal(
        size=(256, INPUTS)
    )
    weight = jnp.asarray(rng.normal(size=(INPUTS, OUTPUTS)), jnp.float32)
    return weight, jnp.asarray(x, jnp.float32), jnp.asarray(x.T @ x, jnp.float32)


WEIGHT, X, GRAM = data()


def by_hand(array, axes=(0,)):
    """Zeros behind the inputs, up to a whole number of groups."""
    fill = [(0, ROWS - INPUTS if axis in axes else 0) for axis in range(array.ndim)]
    return jnp.pad(array, fill)


def stats_of(gram, mean=None):
    entry = {"gram": gram, "count": jnp.asarray(256, jnp.int32)}
    if mean is not None:
        entry["abs_sum"] = mean * 256
    return Stats({"kernel": entry}, layout=Layout.of({"kernel": Axes()}))


def one(tx, leaf, **context):
    return jw.apply(tx, {"kernel": leaf}, **context)["kernel"]


def error(weight):
    return float(quantize.output_error(WEIGHT, weight.materialize(), GRAM, relative=True))


LEARNED = {
    "adaround": functools.partial(quantize.adaround, bits=3, steps=40, learning_rate=0.1, **SHORT),
    "auto_round": functools.partial(quantize.auto_round, bits=3, steps=30, **SHORT),
    "learned_clip": functools.partial(quantize.learned_clip, bits=3, steps=30, **SHORT),
}


@pytest.mark.parametrize("kind", ["signed_max", "affine"])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_codes_are_those_of_the_matrix_padded_by_hand_and_cut(name, kind):
    tx = LEARNED[name](grid=kind)
    weight = one(tx, WEIGHT, stats=stats_of(GRAM))
    assert (weight.full_group, weight.scale.shape) == (GROUP, (3, OUTPUTS))
    whole = one(tx, by_hand(WEIGHT), stats=stats_of(by_hand(GRAM, (0, 1))))
    # A padded Gram matrix has a smaller mean: sums round apart, and a few roundings turn over.
    same = weight.codes_matrix() == whole.codes_matrix()[:INPUTS]
    assert same.mean() > 0.95
    plain = one(quantize.round_to_nearest(bits=3, grid=kind, **SHORT), WEIGHT)
    assert error(weight) < error(plain)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_codes_of_pruned_weights_stand_for_zero(name):
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, WEIGHT.shape)
    pruned = Masked(jnp.where(mask, WEIGHT, 0), mask)
    weight = one(LEARNED[name](grid="affine"), pruned, stats=stats_of(GRAM))
    assert np.all(weight.base.materialize()[~mask] == 0)


def test_the_searches_of_awq_know_nothing_of_padding():
    grid, whole = Grid("affine", 3, GROUP, pad="zero"), by_hand(WEIGHT)
    np.testing.assert_array_equal(rounded(WEIGHT, grid), rounded(whole, grid)[:INPUTS])
    ours, theirs = _relative_size([WEIGHT], grid), _relative_size([whole], grid)
    np.testing.assert_array_equal(ours, theirs[:INPUTS])
    for moments in (GRAM, jnp.diagonal(GRAM)):
        wide = by_hand(moments, range(moments.ndim))
        limits = search_limits(WEIGHT, moments, grid)
        np.testing.assert_allclose(limits, search_limits(whole, wide, grid), rtol=1e-6)
        largest = jnp.max(jnp.abs(by_hand(WEIGHT)).reshape(3, GROUP, OUTPUTS), axis=1)
        assert np.any(limits[2] < largest[2])


@pytest.mark.parametrize("duo", [False, "both"])
def test_awq_finds_scales_for_a_shorter_group(duo):
    mean = jnp.abs(X).mean(0)
    settings = {"bits": 3, "duo": duo, **SHORT}
    found = quantize.awq_matrix(WEIGHT, GRAM, mean, **settings)
    assert found.codes.scale.shape == (3, OUTPUTS)
    weight = one(quantize.awq(**settings), WEIGHT, stats=stats_of(GRAM, mean))
    np.testing.assert_array_equal(weight.base.codes_matrix(), found.codes.codes)
    plain = one(quantize.round_to_nearest(bits=3, grid="affine", **SHORT), WEIGHT)
    assert error(weight) < error(plain)
    # The loss that it minimised is that of what it made, but for the clipping.
    unclipped = one(quantize.awq(clip=False, **settings), WEIGHT, stats=stats_of(GRAM, mean))
    lost = quantize.output_error(WEIGHT, unclipped.materialize(), GRAM)
    np.testing.assert_allclose(lost, found.losses.min(), rtol=1e-3)


def test_hqq_fits_the_shorter_group_to_its_own_rows():
    weight = one(quantize.hqq(bits=3, **SHORT), WEIGHT)
    full = one(quantize.hqq(bits=3, group_size=GROUP), WEIGHT[:24])
    last = one(quantize.hqq(bits=3, group_size=None), WEIGHT[24:])
    assert (weight.full_group, weight.offset.shape) == (GROUP, (3, OUTPUTS))
    for name in ("scale", "offset"):
        parts = [getattr(part, name) for part in (full, last)]
        np.testing.assert_allclose(getattr(weight, name), jnp.concatenate(parts), rtol=1e-5)
    parts = [part.codes_matrix() for part in (full, last)]
    np.testing.assert_array_equal(weight.codes_matrix(), jnp.concatenate(parts))
    whole = one(quantize.hqq(bits=3, group_size=64, pad="zero"), WEIGHT)
    assert (whole.full_group, whole.scale.shape) == (0, (1, OUTPUTS))


def test_stochastic_rounding_goes_to_a_neighbouring_level():
    tx = quantize.stochastic_rounding(bits=4, **SHORT)
    weight = one(tx, WEIGHT, key=jax.random.key(0))
    whole = one(tx, by_hand(WEIGHT), key=jax.random.key(0))
    np.testing.assert_array_equal(weight.materialize(), whole.materialize()[:INPUTS])
    step = np.repeat(weight.scale, GROUP, axis=0)[:INPUTS]
    assert np.all(np.abs(weight.materialize() - WEIGHT) <= step)


def test_products_of_integers_are_made_at_once_or_of_what_is_rounded():
    settings = {"bits": 4, "grid": "narrow", **SHORT}
    product = one(quantize.int8_dynamic(**settings), WEIGHT)
    rounded = one(quantize.round_to_nearest(**settings), WEIGHT)
    np.testing.assert_array_equal(product.materialize(), rounded.materialize())
    again = one(quantize.int8_dynamic(**settings), rounded)
    np.testing.assert_array_equal(again.codes, product.codes)


@pytest.mark.parametrize("method", ["round_to_nearest", "gptq"])
def test_adadim_compares_a_shorter_group_of_rows_with_groups_of_columns(method):
    chosen = {}
    settings = {"bits": 3, "group_size": 5, "pad": "zero"}  # of 32 inputs, and 10 outputs
    weight = jnp.concatenate([WEIGHT, WEIGHT[:, :4] * 1.5], axis=1)
    alike = weight[:1] + 0.01 * weight  # rows are alike, so groups of them are easy to round
    tx = quantize.adadim(method=method, report=chosen.__setitem__, **settings)
    ours = {}
    for name, leaf in (("input", alike), ("output", jnp.tile(alike[:10].T, (4, 1))[:32])):
        ours[name] = one(tx, leaf, stats=stats_of(GRAM))
        assert chosen["kernel"].axis == name
        changed = quantize.output_error(leaf, ours[name].materialize(), GRAM)
        np.testing.assert_allclose(chosen["kernel"].errors[name], changed, rtol=1e-4)
    assert (ours["input"].full_group, ours["input"].scale.shape) == (5, (7, 10))
    assert (ours["output"].full_group, ours["output"].scale.shape) == (0, (32, 2))
    rows_alone = one(tx, alike[:, :9], stats=stats_of(GRAM))  # of 9 columns no groups of 5
    assert rows_alone.scale.shape == (7, 9) and chosen["kernel"].errors.keys() == {"input"}
    if method == "round_to_nearest":
        plain = one(quantize.round_to_nearest(grid="affine", **settings), alike)
        np.testing.assert_array_equal(ours["input"].codes, plain.codes)


def test_lsq_learns_a_step_for_the_shorter_group():
    tx = quantize.lsq(bits=3, **SHORT)
    weight = one(tx, WEIGHT)
    full = one(quantize.lsq(bits=3, group_size=GROUP), WEIGHT[:24])
    last = one(quantize.lsq(bits=3, group_size=None), WEIGHT[24:])
    np.testing.assert_array_equal(weight.step, jnp.concatenate([full.step, last.step]))
    dense = lambda *leaves: jnp.concatenate([x.materialize() for x in leaves])  # noqa: E731
    np.testing.assert_array_equal(weight.materialize(), dense(full, last))
    probe = jax.random.normal(jax.random.key(3), WEIGHT.shape)
    ours = jax.jit(jax.grad(lambda w: jnp.sum(w.materialize() * probe)))(weight)
    theirs = jax.grad(lambda a, b: jnp.sum(dense(a, b) * probe), argnums=(0, 1))(full, last)
    for name in ("latent", "step"):
        parts = [getattr(part, name) for part in theirs]
        np.testing.assert_allclose(getattr(ours, name), jnp.concatenate(parts), rtol=1e-5)
    stored = quantize.settle({"kernel": weight})["kernel"]
    assert (stored.full_group, stored.scale.shape) == (GROUP, (3, OUTPUTS))
    np.testing.assert_array_equal(stored.materialize(), weight.materialize())
    whole = one(quantize.lsq(bits=3, group_size=64, pad="zero"), WEIGHT)
    assert (whole.full_group, whole.step.shape) == (0, (1, OUTPUTS))
    stack = jnp.stack([WEIGHT, 2 * WEIGHT])
    both = jw.apply(tx, {"kernel": stack}, layout=Layout.of({"kernel": Axes()}))["kernel"]
    np.testing.assert_array_equal(both.materialize()[0], weight.materialize())


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: quantize.refine(tx, sweeps=2),
        lambda tx: quantize.low_rank_residual(tx, rank=2),
        lambda tx: quantize.joint(tx, rank=2, outliers=0.02, sweeps=2, dtype=jnp.float32),
    ],
)
def test_what_goes_around_a_quantizer_takes_a_shorter_group(around):
    plain = quantize.round_to_nearest(bits=3, **SHORT)
    better = one(around(plain), WEIGHT, stats=stats_of(GRAM))
    assert error(better) < error(one(plain, WEIGHT))
    inner = [x for x in jax.tree.leaves(better, is_leaf=lambda x: isinstance(x, Quantized))]
    assert [x.full_group for x in inner if isinstance(x, Quantized)] == [GROUP]


@pytest.mark.parametrize(
    "make",
    [
        quantize.adadim,
        quantize.adaround,
        quantize.auto_round,
        quantize.awq,
        quantize.gptq,
        quantize.hqq,
        quantize.int8_dynamic,
        quantize.int8_static,
        quantize.learned_clip,
        quantize.lsq,
        quantize.round_to_nearest,
        quantize.stochastic_rounding,
    ],
)
def test_no_method_pads_where_there_are_no_groups(make):
    with pytest.raises(ValueError, match="pad='zero' fills up groups of rows, but group_size=None"):
        make(bits=4, group_size=None, pad="zero")
    with pytest.raises(ValueError, match=r"pad='one' is unknown\. Choose"):
        make(bits=4, group_size=8, pad="one")


def test_errors_name_padding_only_where_there_is_the_setting():
    words = "fill up the last group by pad='zero'"
    with pytest.raises(ValueError, match=words):
        one(quantize.hqq(bits=4, group_size=GROUP), WEIGHT)
    with pytest.raises(ValueError, match="group_size=12 does not divide") as caught:
        one(quantize.fp8(group_size=GROUP), WEIGHT)
    assert "pad" not in str(caught.value)
    with pytest.raises(ValueError, match=words):
        one(quantize.lsq(bits=4, group_size=GROUP), WEIGHT)
    with pytest.raises(ValueError, match=f"group_size=12 does not divide the input axis.*{words}"):
        one(quantize.adadim(bits=4, group_size=GROUP), WEIGHT, stats=stats_of(GRAM))
