"""Merging: exact sums, honest losses, masks, quantized bases, and the way back."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import merge_adapters, unmerge
from jaxweights.lift import lift
from jaxweights.weights import EMBEDDING, Axes, LowRank, Masked, Quantized, View, materialize
from tests._fixtures import fixture, fixture_path


def draw(seed: int, shape, dtype=jnp.float32, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def low_rank(shape=(12, 8), axes=Axes(), *, base=None, scale=1.0, dtype=jnp.float32):
    view = View.of(shape, axes)
    stack = tuple(shape[a] for a in view.stack_axes(len(shape)))
    return LowRank.over(
        draw(1, shape, dtype) if base is None else base,
        draw(2, (*stack, view.in_dim, 2), scale=scale),
        draw(3, (*stack, 2, view.out_dim)),
        scaling=0.5,
        view=view,
    )


def quantized(shape=(12, 8)):
    codes = np.random.default_rng(4).integers(-8, 8, shape).astype(np.int8)
    return Quantized.from_codes(
        jnp.asarray(codes), jnp.full((1, shape[1]), 0.1), bits=4, dtype=jnp.bfloat16
    )


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((12, 8), Axes()),
        ((3, 12, 8), Axes()),
        ((12, 4, 2), Axes((-3,), (-2, -1))),
        ((8, 12), EMBEDDING),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_merged_weight_is_the_sum_rounded_once(shape, axes, dtype):
    weight = low_rank(shape, axes, dtype=dtype)
    merged, _ = merge_adapters({"kernel": weight, "bias": jnp.ones(3)})
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    delta = jnp.asarray(0.5 * wide(weight.down) @ wide(weight.up), jnp.float32)
    exact = wide(weight.base) + wide(weight.view.from_matrix(delta))
    # Half a unit in the last place of the dtype, and the float32 sum's own roundings.
    half_ulp = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-24
    np.testing.assert_allclose(wide(merged["kernel"]), exact, rtol=half_ulp, atol=1e-6)
    assert merged["kernel"].dtype == dtype
    chex.assert_trees_all_equal(merged["bias"], jnp.ones(3))


def test_merged_and_factored_forward_agree():
    params = {"first": low_rank((12, 8)), "second": low_rank((8, 5))}
    model = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]  # noqa: E731
    x = draw(5, (7, 12))
    merged, _ = merge_adapters(params)
    np.testing.assert_allclose(
        jax.jit(lift(model))(params, x), jax.jit(model)(merged, x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rms, lost", [(1e-3, 0.03), (1e-4, 0.32), (3e-5, 0.68), (1e-5, 0.89)])
def test_the_report_says_how_much_a_bfloat16_merge_loses(rms, lost):
    base = draw(0, (512, 512), jnp.bfloat16, scale=0.02)
    down, up = draw(1, (512, 8)), draw(2, (8, 512))
    weight = LowRank.over(base, down, up, scaling=rms / np.sqrt(8))
    _, report = merge_adapters({"kernel": weight})
    loss = report["kernel"]
    np.testing.assert_allclose(loss.delta_rms, rms, rtol=0.1)  # one draw of rank 8
    # The published figures, to the point: the loss depends on the two scales only.
    np.testing.assert_allclose(1 - loss.survived, lost, atol=0.02)


def test_a_float32_merge_loses_next_to_nothing_and_a_zero_delta_nothing():
    weight = low_rank()
    zero = dataclasses.replace(weight, up=jnp.zeros_like(weight.up))
    merged, report = merge_adapters({"a": weight, "b": zero})
    assert float(report["a"].survived) > 0.9999
    assert (float(report["b"].survived), float(report["b"].delta_rms)) == (1.0, 0.0)
    chex.assert_trees_all_equal(merged["b"], zero.base)


def test_a_mask_survives_the_merge_unless_it_is_told_to_go():
    mask = draw(6, (12, 8)) > 0
    weight = low_rank(base=Masked(draw(1, (12, 8)), mask))
    kept, report = merge_adapters({"kernel": weight})
    assert isinstance(kept["kernel"], Masked)
    chex.assert_trees_all_equal(kept["kernel"].mask, mask)
    dense = np.asarray(kept["kernel"].materialize())
    assert not dense[~np.asarray(mask)].any()
    full = np.asarray(weight.materialize())
    np.testing.assert_allclose(dense[np.asarray(mask)], full[np.asarray(mask)], rtol=1e-6)
    # The part of the delta outside of the mask is lost, and counted.
    delta = np.asarray(weight.delta.materialize())
    lost = np.linalg.norm(delta[~np.asarray(mask)]) / np.linalg.norm(delta)
    np.testing.assert_allclose(report["kernel"].survived, 1 - lost, rtol=1e-4)

    filled, _ = merge_adapters({"kernel": weight}, masked="densify")
    np.testing.assert_allclose(filled["kernel"], full, rtol=1e-6)
    with pytest.raises(ValueError, match=r"'kernel': has a masked base.*masked='mask_delta'"):
        merge_adapters({"kernel": weight}, masked="error")


def test_a_quantized_base_is_merged_only_into_a_dtype_that_is_named():
    weight = low_rank(base=quantized())
    with pytest.raises(
        ValueError, match=r"'kernel': has a Quantized base.*dequantize=jnp.bfloat16"
    ):
        merge_adapters({"kernel": weight})
    merged, _ = merge_adapters({"kernel": weight}, dequantize=jnp.float32)
    exact = np.asarray(materialize(weight.base.astype(jnp.float32))) + np.asarray(
        weight.delta.materialize()
    )
    assert merged["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(merged["kernel"], exact, rtol=1e-5, atol=1e-6)


def test_rounding_of_the_base_alone_does_not_count_as_a_loss_of_the_delta():
    base = quantized().astype(jnp.float32)  # whose values bfloat16 cannot hold
    weight = low_rank(base=base)
    weight = dataclasses.replace(weight, up=jnp.zeros_like(weight.up))
    merged, report = merge_adapters({"kernel": weight}, dequantize=jnp.bfloat16)
    assert (merged["kernel"].astype(jnp.float32) != base.materialize()).any()
    assert float(report["kernel"].survived) == 1.0


def test_a_masked_quantized_base_keeps_its_mask_and_leaves_its_grid():
    mask = draw(6, (12, 8)) > 0
    weight = low_rank(base=Masked(quantized(), mask))
    with pytest.raises(ValueError, match=r"Quantized base"):
        merge_adapters({"kernel": weight})
    merged, _ = merge_adapters({"kernel": weight}, dequantize=jnp.bfloat16)
    assert isinstance(merged["kernel"], Masked)
    assert (merged["kernel"].base.dtype, merged["kernel"].dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert not np.asarray(merged["kernel"].materialize())[~np.asarray(mask)].any()


def test_factors_under_another_representation_are_merged_in_place():
    mask = draw(6, (12, 8)) > 0
    merged, report = merge_adapters({"kernel": Masked(low_rank(), mask)})
    assert set(report) == {"kernel"}
    assert isinstance(merged["kernel"].base, jax.Array)
    chex.assert_trees_all_close(
        merged["kernel"].materialize(), Masked(low_rank(), mask).materialize(), rtol=1e-6
    )


def test_it_runs_under_jit():
    params = {"kernel": low_rank()}
    chex.assert_trees_all_close(jax.jit(merge_adapters)(params), merge_adapters(params), rtol=1e-5)


def test_unmerging_gives_the_adapted_tree_bit_for_bit():
    adapted = {"kernel": low_rank(dtype=jnp.bfloat16), "bias": draw(0, (8,))}
    merged, _ = merge_adapters(adapted)
    assert not isinstance(merged["kernel"], LowRank)
    chex.assert_trees_all_equal(unmerge(merged, adapted), adapted)


def test_unmerging_by_subtraction_keeps_later_changes_and_is_close_but_not_exact():
    adapted = {"kernel": low_rank((64, 64), base=draw(1, (64, 64), scale=0.02), scale=0.01)}
    merged, _ = merge_adapters(adapted)
    back = unmerge(merged, adapted, subtract=True)["kernel"].base
    original = adapted["kernel"].base
    np.testing.assert_allclose(back, original, atol=2e-8)  # a unit in the last place of the sum
    assert 0 < float(jnp.mean(back != original)) < 0.7
    edited = unmerge({"kernel": merged["kernel"] + 1.0}, adapted, subtract=True)["kernel"]
    np.testing.assert_allclose(edited.materialize(), merged["kernel"] + 1.0, rtol=1e-6)


def test_trees_that_do_not_belong_together_cannot_be_unmerged():
    adapted = {"a": low_rank(), "b": low_rank()}
    with pytest.raises(ValueError, match=r"'b': is not in the merged tree. .*'bb'"):
        unmerge({"a": jnp.ones((12, 8)), "bb": jnp.ones((12, 8))}, adapted)
    with pytest.raises(ValueError, match=r"'b': has shape \(8, 12\)"):
        unmerge({"a": jnp.ones((12, 8)), "b": jnp.ones((8, 12))}, adapted)
    with pytest.raises(ValueError, match=r"no leaf of `adapted` has low-rank factors"):
        unmerge({"a": jnp.ones((12, 8))}, {"a": jnp.ones((12, 8))})


def test_a_tree_without_factors_and_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"no leaf has low-rank factors. Add them with adapt.lora"):
        merge_adapters({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"masked='keep' is unknown"):
        merge_adapters({"kernel": low_rank()}, masked="keep")
    with pytest.raises(ValueError, match=r"dequantize=.*must be a floating dtype"):
        merge_adapters({"kernel": low_rank()}, dequantize=jnp.int8)


@pytest.mark.parametrize("case", ["lora", "embed"])
def test_merged_checkpoints_are_those_of_peft(case):
    """Adapters as peft wrote them, on a Llama, its table of embeddings among them."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    base = load_file(fixture_path("adapt/llama_base.safetensors"))
    adapter = load_file(fixture_path(f"adapt/llama_{case}_adapter_model.safetensors"))
    expected = fixture("adapt/llama_lora.npz")
    params = {}
    for key, value in adapter.items():
        name = key.removeprefix("base_model.model.")
        if name.endswith("lora_A.weight"):
            name = name.replace("lora_A.weight", "weight")
            up = adapter[key.replace("lora_A", "lora_B")].T
            down, axes = value.T, Axes()
            kernel = jnp.asarray(base[name].T)
        elif name.endswith("lora_embedding_A"):
            name = name.replace("lora_embedding_A", "weight")
            down, up = adapter[key.replace("embedding_A", "embedding_B")], value
            kernel, axes = jnp.asarray(base[name]), EMBEDDING
        else:
            continue
        params[name] = LowRank.over(
            kernel,
            jnp.asarray(down),
            jnp.asarray(up),
            scaling=8 / 4,
            view=View.of(kernel.shape, axes),
        )
    assert len(params) == {"lora": 4, "embed": 3}[case]
    merged, _ = merge_adapters(params)
    for name, kernel in merged.items():
        kernel = kernel if "embed" in name else kernel.T
        np.testing.assert_allclose(kernel, expected[f"{case}/merged/{name}"], atol=1e-6, rtol=1e-6)
