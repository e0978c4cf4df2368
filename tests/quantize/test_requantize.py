"""Merging into weights that stay quantized: the grid kept, the outputs right, errors by name."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import merge_adapters
from jaxweights.core import Stats, apply, partition
from jaxweights.quantize import (
    add_deltas,
    fp4,
    fp8,
    fp8_dynamic,
    gptq,
    gptq_matrix,
    int8_dynamic,
    mx,
    nf4,
    nvfp4,
    output_error,
    power,
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
    View,
    materialize,
)


def correlated(in_dim=32, tokens=256, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 6)) @ rng.normal(size=(6, in_dim))
    x = x + 0.3 * rng.normal(size=(tokens, in_dim))
    return jnp.asarray(x.T @ x, jnp.float32)


def draw(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def stats_of(gram, path="kernel"):
    count = jnp.full(gram.shape[:-2], 256, jnp.int32)
    return Stats({path: {"gram": gram, "count": count}})


def quantized(shape=(32, 16), axes=None, **settings):
    layout = None if axes is None else {"kernel": axes}
    settings = {"bits": 4, "group_size": 8} | settings
    return apply(round_to_nearest(**settings), {"kernel": draw(1, *shape)}, layout=layout)["kernel"]


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


def test_a_task_vector_is_added_in_one_compiled_call_and_its_loss_is_told():
    params = {"kernel": quantized(bits=4), "dense": draw(3, 4, 4), "bias": jnp.ones(3)}
    deltas = {"kernel": draw(2, 32, 16, scale=0.02), "dense": draw(4, 4, 4)}
    gram = correlated()
    run = jax.jit(
        lambda p, d, s: add_deltas(p, d, coefficient=2.0, rounding="gptq", stats=s),
    )
    new, report = run(params, deltas, stats_of(gram))
    eager = add_deltas(params, deltas, coefficient=2.0, rounding="gptq", stats=stats_of(gram))
    chex.assert_trees_all_equal(new, eager[0])
    chex.assert_trees_all_close(new["dense"], params["dense"] + 2 * deltas["dense"])
    assert new["bias"] is not None and isinstance(new["kernel"], Quantized)
    change = 2 * deltas["kernel"]
    lost = new["kernel"].materialize() - params["kernel"].materialize() - change
    ratio = jnp.sqrt(output_error(lost, 0 * lost, gram) / output_error(change, 0 * change, gram))
    np.testing.assert_allclose(report["kernel"].output_survived, 1 - ratio, atol=1e-4)
    rms = jnp.sqrt(jnp.mean(jnp.square(change)))
    np.testing.assert_allclose(report["kernel"].delta_rms, rms, rtol=1e-5)
    assert float(report["dense"].survived) > 0.999


def test_a_small_delta_survives_in_the_outputs_only_with_statistics():
    params, gram = {"kernel": quantized(bits=4)}, correlated()
    direction = jnp.linalg.eigh(gram)[1][:, -1:]  # where the inputs vary most
    deltas = {"kernel": 0.5 * direction * draw(2, 1, 16)}
    stats = stats_of(gram)
    _, plain = add_deltas(params, deltas, stats=stats)
    _, careful = add_deltas(params, deltas, stats=stats, rounding="gptq")
    survived = [float(r["kernel"].output_survived) for r in (plain, careful)]
    assert survived[1] > 0.9
    assert 1 - survived[1] < 0.5 * (1 - survived[0])


def adapted(base, axes=Axes(), scale=0.1):
    view = View.of(base.shape, axes)
    stack = tuple(base.shape[a] for a in view.stack_axes(len(base.shape)))
    down = draw(7, *stack, view.in_dim, 2, scale=scale)
    return LowRank.over(base, down, draw(8, *stack, 2, view.out_dim), scaling=0.5, view=view)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_adapters_merge_into_their_quantized_base_on_its_own_grid(rounding):
    weight = adapted(quantized())
    stats = stats_of(correlated())
    merged, report = merge_adapters({"kernel": weight}, requantize=rounding, stats=stats)
    delta = {"kernel": weight.delta.materialize()}
    same, loss = add_deltas({"kernel": weight.base}, delta, rounding=rounding, stats=stats)
    chex.assert_trees_all_equal(merged, same)
    chex.assert_trees_all_close(report, loss)
    assert isinstance(merged["kernel"], Quantized)


def test_adapters_merge_into_a_base_that_a_transform_quantizes_anew():
    weight = adapted(quantized(), scale=1.0)
    stats = stats_of(correlated())
    tx = gptq(bits=4, group_size=8)
    merged, report = merge_adapters({"kernel": weight}, requantize=tx, stats=stats)
    total = weight.base.materialize() + weight.delta.materialize()
    chex.assert_trees_all_close(
        materialize(merged), materialize(apply(tx, {"kernel": total}, stats=stats)), atol=1e-5
    )
    assert float(report["kernel"].output_survived) > 0.8


def test_rules_by_path_requantize_each_adapter_in_its_own_way():
    params = {"a": {"kernel": adapted(quantized())}, "b": {"kernel": adapted(quantized())}}
    tx = partition(("a/.*", round_to_nearest(bits=8)), ("b/.*", round_to_nearest(bits=4)))
    merged, _ = merge_adapters(params, requantize=tx)
    assert (merged["a"]["kernel"].bits, merged["b"]["kernel"].bits) == (8, 4)


@pytest.mark.parametrize("policy", ["mask_delta", "densify"])
def test_adapters_over_a_masked_quantized_base_follow_the_mask_policy(policy):
    mask = draw(5, 32, 16) > 0
    weight = adapted(Masked(quantized(), mask))
    merged, _ = merge_adapters({"kernel": weight}, requantize="nearest", masked=policy)
    kept = isinstance(merged["kernel"], Masked)
    assert kept == (policy == "mask_delta")
    target = weight.materialize()
    target = jnp.where(mask, target, 0) if kept else target
    change = np.asarray(merged["kernel"].materialize() - target)
    assert np.abs(change).max() < 0.35  # half a step of the coarsest group, or so
    assert np.abs(np.asarray(target)).max() > 1


TABLES = {
    "nf4": nf4(group_size=8),
    "nf4 double": nf4(group_size=8, double_quantization=True),
    "fp4": fp4(group_size=16),
    "nvfp4": nvfp4(),
    "mxfp4": mx(element="e2m1"),
    "mxfp8": mx(element="e4m3"),
    "fp8": fp8(element="e5m2"),
    "power": power(bits=6, exponents=[0.5]),
}


def with_table(kind, *shape):
    layout = {"kernel": Axes()}
    return apply(TABLES[kind], {"kernel": draw(1, *shape)}, layout=layout)["kernel"]


def all_levels(weight):
    """The levels of every entry, `(levels, in, out)` float64."""
    if hasattr(weight, "table"):
        table = np.asarray(weight.table, np.float64)
    else:
        codes = jnp.arange(256, dtype=jnp.uint8)
        table = np.asarray(jax.lax.bitcast_convert_type(codes, weight.values.dtype), np.float64)
        table = table[np.isfinite(table)]
    scale = np.asarray(weight.scale_matrix(), np.float64)
    rows, cols = scale.shape
    scale = np.repeat(np.repeat(scale, 32 // rows, 0), 16 // cols, 1)
    return table[:, None, None] * scale


@pytest.mark.parametrize("kind", TABLES)
def test_values_go_to_the_nearest_of_the_levels_that_a_table_has(kind):
    weight, value = with_table(kind, 32, 16), draw(2, 32, 16, scale=0.8)
    new = requantize(weight, value).weight
    far = np.abs(all_levels(weight) - np.asarray(value, np.float64))
    missed = np.abs(np.asarray(new.materialize(), np.float64) - np.asarray(value))
    np.testing.assert_allclose(missed, far.min(0), atol=1e-6)
    assert type(new) is type(weight)
    chex.assert_trees_all_equal(new.scale, weight.scale)
    back = requantize(weight, weight.materialize())
    chex.assert_trees_all_equal(back.weight.materialize(), weight.materialize())
    assert back.clipped == 0 and requantize(weight, 3 * value).clipped > 0.02


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp8"])
def test_outputs_follow_on_tables_too_with_a_gram_matrix(kind):
    """QLoRA's base and what training added to it, merged and still what the runtime reads."""
    base, gram = with_table(kind, 32, 16), correlated()
    factors = draw(3, 32, 2, scale=0.1), draw(4, 2, 16, scale=0.1)
    params = {"kernel": LowRank.over(base, *factors)}
    target = params["kernel"].materialize()
    errors = {}
    for rounding in ("nearest", "gptq"):
        merged, report = merge_adapters(params, requantize=rounding, stats=stats_of(gram))
        new = merged["kernel"]
        chex.assert_trees_all_equal_shapes_and_dtypes(new, base)
        chex.assert_trees_all_equal(new.scale, base.scale)
        errors[rounding] = float(output_error(target, new.materialize(), gram, relative=True))
        assert report["kernel"].output_survived is not None
    assert errors["gptq"] < 0.85 * errors["nearest"]


def test_stacks_of_tables_are_requantized_as_their_slices_are():
    weight, value = with_table("nf4", 3, 32, 16), draw(5, 3, 32, 16)
    gram = jnp.stack([correlated(seed=i) for i in range(3)])
    new = requantize(weight, value, gram).weight
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[i], weight)
        one = requantize(part, value[i], gram[i]).weight
        chex.assert_trees_all_equal(new.codes[i], one.codes)


def test_scales_of_tables_may_be_stretched_unless_they_are_quantized_themselves():
    value = draw(6, 32, 16, scale=2.0)
    weight = with_table("nf4", 32, 16)
    error = lambda new: float(jnp.sum(jnp.square(new.weight.materialize() - value)))  # noqa: E731
    assert error(requantize(weight, value, rescale=True)) < 0.6 * error(requantize(weight, value))
    double = with_table("nf4 double", 32, 16)
    words = r"rescale=True, but the weight's scales are a Codebook, quantized themselves"
    with pytest.raises(ValueError, match=rf"quantize.requantize: {words}"):
        requantize(double, value, rescale=True)
    with pytest.raises(ValueError, match=rf"quantize.add_deltas: 'kernel': {words}"):
        add_deltas({"kernel": double}, {"kernel": value}, rescale=True)


def test_a_transform_gets_the_sum_unrounded_and_leaves_the_dtype_of_the_base():
    """In bfloat16 the sum would be rounded twice, and some codes would differ."""
    base = dataclasses.replace(quantized(), dtype=np.dtype(jnp.bfloat16))
    weight = LowRank.over(base, draw(3, 32, 2), draw(4, 2, 16))
    tx = round_to_nearest(bits=8)
    merged, _ = merge_adapters({"kernel": weight}, requantize=tx)
    total = base.astype(jnp.float32).materialize() + weight.delta.materialize().astype(jnp.float32)
    expected = apply(tx, {"kernel": total})["kernel"]
    chex.assert_trees_all_equal(merged["kernel"].codes, expected.codes)
    assert merged["kernel"].dtype == jnp.bfloat16
    twice = apply(tx, {"kernel": total.astype(jnp.bfloat16)})["kernel"]
    assert (twice.codes != expected.codes).any()


def test_what_cannot_be_merged_is_refused_by_name():
    weight = quantized()
    delta = {"kernel": jnp.ones((32, 16))}
    with pytest.raises(ValueError, match=r"'kernle': is no leaf of params.*'kernel'"):
        add_deltas({"kernel": weight}, {"kernle": jnp.ones((32, 16))})
    with pytest.raises(ValueError, match=r"'kernel': the delta has shape \(3, 2\).*\(32, 16\)"):
        add_deltas({"kernel": weight}, {"kernel": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=r"rounding='best' is unknown.*nearest, gptq"):
        add_deltas({"kernel": weight}, delta, rounding="best")
    with pytest.raises(ValueError, match=r"'kernel': rounding='gptq' reads Gram matrices"):
        add_deltas({"kernel": weight}, delta, rounding="gptq")
    with pytest.raises(ValueError, match=r"'kernel': the statistic 'gram' is missing"):
        add_deltas({"kernel": weight}, delta, rounding="gptq", stats=stats_of(correlated(), "b"))
    with pytest.raises(ValueError, match=r"'kernel': the statistic 'gram' has shape \(8, 8\)"):
        add_deltas({"kernel": weight}, delta, rounding="gptq", stats=stats_of(correlated(8)))
    empty = Stats({"kernel": {"gram": jnp.zeros((32, 32)), "count": jnp.asarray(0)}})
    with pytest.raises(ValueError, match=r"'kernel': no calibration token reached it"):
        add_deltas({"kernel": weight}, delta, rounding="gptq", stats=empty)
    wild = stats_of(6 * jnp.eye(32) - 5)
    with pytest.raises(ValueError, match=r"not positive definite even with damping=1"):
        add_deltas({"kernel": weight}, delta, rounding="gptq", stats=wild)
    nested = LowRank.over(weight, jnp.ones((32, 1)), jnp.ones((1, 16)))
    with pytest.raises(ValueError, match=r"'kernel': is over a LowRank, which has no levels"):
        add_deltas({"kernel": nested}, delta)
    with pytest.raises(TypeError, match=r"is over a dense array, which has no levels"):
        requantize(jnp.ones((2, 2)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"value has shape \(2, 2\), but the weight \(32, 16\)"):
        requantize(weight, jnp.ones((2, 2)))


def test_settings_of_merging_into_a_quantized_base_are_checked():
    params = {"kernel": adapted(quantized())}
    with pytest.raises(ValueError, match=r"dequantize and requantize contradict each other"):
        merge_adapters(params, dequantize=jnp.float32, requantize="nearest")
    with pytest.raises(TypeError, match=r"requantize=4 must be 'nearest', 'gptq' or a transform"):
        merge_adapters(params, requantize=4)
    with pytest.raises(ValueError, match=r"adapt.merge_adapters: requantize='hqq' is unknown"):
        merge_adapters(params, requantize="hqq")
    with pytest.raises(ValueError, match=r"'kernel': requantize='gptq' reads Gram matrices"):
        merge_adapters(params, requantize="gptq")


def test_bfloat16_weights_are_added_to_before_they_are_rounded():
    weight = dataclasses.replace(quantized(), dtype=np.dtype(jnp.bfloat16))
    exact = weight.astype(jnp.float32).materialize()
    new, _ = add_deltas({"kernel": weight}, {"kernel": jnp.zeros((32, 16))})
    chex.assert_trees_all_equal(new["kernel"].codes, weight.codes)
    assert (weight.materialize().astype(jnp.float32) != exact).any()


def test_only_named_leaves_change():
    params = {"a": quantized(), "b": quantized()}
    new, report = add_deltas(params, {"a": jnp.ones((32, 16)), "b": None})
    assert new["b"] is params["b"] and set(report) == {"a"}
