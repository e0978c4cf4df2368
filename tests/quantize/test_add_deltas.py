"""Deltas and adapters are added to quantized weights on their own grid."""

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
    gptq,
    output_error,
    requantize,
    round_to_nearest,
)
from jaxweights.weights import (
    Axes,
    LowRank,
    Masked,
    Quantized,
    View,
    materialize,
)
from tests.quantize._requantize import correlated, draw, quantized, stats_of


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
