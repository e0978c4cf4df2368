"""Quantized plus sparse plus low rank: each part the best for the others, never worse by a turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Stats, apply, chain, leafwise, partition
from jaxweights.lift import lift
from jaxweights.quantize import (
    gptq,
    joint,
    loftq,
    low_rank_of,
    low_rank_residual,
    output_error,
    round_to_nearest,
)
from jaxweights.sparsify import magnitude
from jaxweights.weights import Axes, LowRank, Outliers, Quantized
from tests._fixtures import fixture

NF4 = np.asarray(
    "-1 -0.6961928 -0.52507305 -0.39491749 -0.28444138 -0.18477343 -0.09105004 0 0.0795803 "
    "0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1".split(),
    np.float32,
)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def gram_of(in_dim, *, seed=0, tokens=256, factors=5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, factors)) @ rng.normal(size=(factors, in_dim))
    x = x + 0.2 * rng.normal(size=(tokens, in_dim))
    return jnp.asarray(x.T @ x, jnp.float32)


def stats_of(gram):
    return Stats({"kernel": {"gram": gram, "count": jnp.full(gram.shape[:-2], 256, jnp.int32)}})


def fit(tx, weight, gram=None, axes=Axes()):
    stats = None if gram is None else stats_of(gram)
    return apply(tx, {"kernel": weight}, stats=stats, layout={"kernel": axes})["kernel"]


def loss(weight, approximation, gram):
    return float(output_error(weight, approximation.materialize(), gram))


def nf4(block=64):
    """bitsandbytes' NF4: blocks of the flattened torch weight, which is `(out, in)`."""

    def quantize(weight):
        flat = weight.T.reshape(-1)
        blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
        amax = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
        unit = blocks / jnp.where(amax > 0, amax, 1)
        middles = (NF4[1:] + NF4[:-1]) / 2
        code = sum((unit > middle).astype(jnp.int32) for middle in middles)
        return (jnp.asarray(NF4)[code] * amax).reshape(-1)[: flat.size].reshape(weight.T.shape).T

    return leafwise(quantize, name="nf4")


@pytest.mark.parametrize("shape", [(24, 24), (32, 12), (12, 32)])
@pytest.mark.parametrize("singular", [False, True])
def test_the_low_rank_matrix_is_the_truncated_decomposition_of_the_weighted_residual(
    shape, singular
):
    residual, gram = draw(0, *shape), gram_of(shape[0])
    if singular:  # dead inputs, and fewer tokens than inputs
        x = np.array(draw(2, 6, shape[0]))
        x[:, 3] = 0
        gram = jnp.asarray(x.T @ x)
    values, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    singular_values = np.linalg.svd(root @ np.asarray(residual, np.float64))[1]
    for rank in (1, 4, min(shape)):
        down, up = low_rank_of(residual, gram, rank=rank)
        assert (down.shape, up.shape) == ((shape[0], rank), (rank, shape[1]))
        best = np.sum(singular_values[rank:] ** 2)
        left = output_error(residual, down @ up, gram)
        total = np.sum(singular_values**2)
        np.testing.assert_allclose(left / total, best / total, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("shape", [(32, 12), (12, 32)])
def test_without_a_gram_matrix_it_is_the_truncated_singular_value_decomposition(shape):
    residual = draw(0, *shape)
    down, up = low_rank_of(residual, None, rank=3)
    u, values, vt = np.linalg.svd(np.asarray(residual, np.float64), full_matrices=False)
    np.testing.assert_allclose(down @ up, (u[:, :3] * values[:3]) @ vt[:3], atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(down, axis=0) ** 2, values[:3], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(up, axis=1) ** 2, values[:3], rtol=1e-4)


def test_a_residual_of_zeros_gives_zeros():
    down, up = low_rank_of(jnp.zeros((4, 6)), gram_of(4), rank=2)
    np.testing.assert_array_equal(down @ up, jnp.zeros((4, 6)))


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_pefts_loftq_is_reproduced(layer):
    stored = fixture("adapt/lora_init.npz")
    weight = jnp.asarray(stored[f"base/{layer}.weight"].T)
    ours = fit(loftq(nf4(), rank=4), weight)
    adapter = f"loftq/init_adapter/base_model.model.{layer}"
    down, up = (stored[f"{adapter}.lora_{part}.weight"].T for part in "AB")
    base = stored[f"loftq/base_after_init/{layer}.weight"].T
    np.testing.assert_allclose(ours.base, base, atol=1e-5)
    np.testing.assert_allclose(ours.down @ ours.up, down @ up, atol=1e-5)


@pytest.mark.parametrize("rank, ratios", [(16, (0.942,)), (64, (0.789, 0.720, 0.694))])
def test_loftq_lowers_the_error_of_nf4_turn_by_turn(rank, ratios):
    weight = draw(0, 512, 512)
    plain = jnp.sum(jnp.square(weight - fit(nf4(), weight)))
    for iterations, ratio in enumerate(ratios, start=1):
        found = fit(loftq(nf4(), rank=rank, iterations=iterations), weight)
        error = jnp.sum(jnp.square(weight - found.materialize()))
        np.testing.assert_allclose(jnp.sqrt(error / plain), ratio, atol=0.006)


def test_alpha_changes_the_factors_but_not_the_product():
    weight = draw(0, 32, 16)
    one = fit(loftq(round_to_nearest(bits=3), rank=4), weight)
    two = fit(loftq(round_to_nearest(bits=3), rank=4, alpha=16), weight)
    assert (float(one.scaling), float(two.scaling)) == (1.0, 4.0)
    np.testing.assert_allclose(one.materialize(), two.materialize(), atol=1e-6)


@pytest.mark.parametrize(
    "quantizer",
    [round_to_nearest(bits=3, group_size=8), gptq(bits=3, group_size=8)],
    ids=["rounded", "gptq"],
)
def test_no_turn_makes_the_outputs_worse_and_the_parts_help(quantizer):
    weight, gram = draw(1, 32, 24), gram_of(32)
    alone = loss(weight, fit(quantizer, weight, gram), gram)
    errors = [
        loss(
            weight,
            fit(joint(quantizer, rank=3, outliers=0.01, sweeps=n, dtype="float32"), weight, gram),
            gram,
        )
        for n in (1, 2, 4)
    ]
    assert errors[0] < 0.9 * alone
    assert errors[0] >= errors[1] >= errors[2]
    # GPTQ spends the freedom that the low-rank part would use: its turns need not gain.
    assert errors[2] < errors[0] or quantizer.name == "quantize.gptq"


def test_weighting_by_the_inputs_leaves_less_of_the_outputs_error_than_not():
    weight, gram = draw(1, 64, 48), gram_of(64)
    quantizer = round_to_nearest(bits=3, group_size=16)
    plain = loss(weight, fit(loftq(quantizer, rank=4), weight), gram)
    weighted = loss(weight, fit(low_rank_residual(quantizer, rank=4), weight, gram), gram)
    assert weighted < 0.2 * plain


def test_one_turn_is_the_quantizer_and_the_best_correction_of_it():
    weight, gram = draw(1, 32, 24), gram_of(32)
    found = fit(low_rank_residual(gptq(bits=3), rank=3, dtype="float32"), weight, gram)
    base = fit(gptq(bits=3), weight, gram)
    np.testing.assert_array_equal(found.base.codes, base.codes)
    down, up = low_rank_of(weight - base.materialize(), gram, rank=3)
    np.testing.assert_allclose(found.down @ found.up, down @ up, atol=1e-5)


def test_outliers_are_the_entries_that_weigh_most_and_are_no_part_of_the_base():
    weight = draw(1, 32, 24).at[3, 5].set(40.0).at[10, 2].set(-30.0)
    gram = gram_of(32)
    found = fit(joint(round_to_nearest(bits=4), outliers=10 / 768, sweeps=1), weight, gram)
    assert isinstance(found, Outliers) and isinstance(found.base, Quantized)
    score = np.asarray(weight) ** 2 * np.diag(gram)[:, None]
    expected = np.sort(np.argsort(-score.reshape(-1))[:10])
    np.testing.assert_array_equal(found.index, expected)
    assert {3 * 24 + 5, 10 * 24 + 2} <= set(expected.tolist())
    rest = weight.reshape(-1).at[found.index].set(0).reshape(32, 24)
    np.testing.assert_array_equal(found.base.codes, fit(round_to_nearest(bits=4), rest).codes)
    # The scales of two outputs no longer span the outliers.
    assert loss(weight, found, gram) < 0.5 * loss(
        weight, fit(round_to_nearest(bits=4), weight), gram
    )


def test_a_stack_with_heads_is_split_as_its_slices_are():
    axes = Axes(inputs=(-3,), outputs=(-2, -1))
    weight = draw(1, 2, 16, 3, 4)
    grams = jnp.stack([gram_of(16, seed=i) for i in range(2)])
    tx = joint(gptq(bits=3, group_size=8), rank=2, outliers=0.02, sweeps=2, dtype="float32")
    found = fit(tx, weight, grams, axes)
    assert found.shape == (2, 16, 3, 4) and found.base.shape == found.shape
    for i in range(2):
        alone = fit(tx, weight[i], grams[i], axes)
        np.testing.assert_allclose(found.materialize()[i], alone.materialize(), atol=1e-5)


def test_bfloat16_weights_are_split_in_float32():
    weight = draw(1, 32, 24).astype(jnp.bfloat16)
    found = fit(joint(round_to_nearest(bits=4), rank=2, outliers=0.01), weight, gram_of(32))
    assert isinstance(found, LowRank) and found.dtype == jnp.bfloat16
    assert found.down.dtype == found.base.values.dtype == jnp.bfloat16
    wide = fit(
        joint(round_to_nearest(bits=4), rank=2, outliers=0.01),
        weight.astype(jnp.float32),
        gram_of(32),
    )
    np.testing.assert_array_equal(found.base.base.codes, wide.base.base.codes)


def test_the_model_runs_on_the_sum_and_leaves_that_the_quantizer_leaves_stay():
    params = {"kernel": draw(1, 16, 8), "bias": jnp.ones(8), "head": draw(2, 8, 4)}
    tx = partition(("kernel", loftq(round_to_nearest(bits=4), rank=2)))
    new = apply(tx, params)
    assert new["bias"] is params["bias"] and new["head"] is params["head"]
    model = lambda p, x: (x @ p["kernel"]) @ p["head"]  # noqa: E731
    x = draw(3, 5, 16)
    dense = {**params, "kernel": new["kernel"].materialize()}
    np.testing.assert_allclose(jax.jit(lift(model))(new, x), model(dense, x), rtol=1e-4, atol=1e-4)


def test_a_partition_of_quantizers_serves_as_one():
    params = {"a": draw(1, 16, 8), "b": draw(2, 16, 8), "c": draw(3, 16, 8)}
    quantizer = partition(("a", round_to_nearest(bits=2)), ("b", round_to_nearest(bits=8)))
    new = apply(loftq(quantizer, rank=2), params)
    assert (new["a"].base.bits, new["b"].base.bits) == (2, 8)
    assert new["c"] is params["c"]


def test_settings_are_refused_by_their_words():
    rounded = round_to_nearest(bits=4)
    with pytest.raises(TypeError, match=r"quantize.joint: quantizer=4 is no transform. Pass one"):
        joint(4, rank=2)
    with pytest.raises(ValueError, match=r"quantize.loftq: rank=0 must be a positive integer"):
        loftq(rounded, rank=0)
    with pytest.raises(ValueError, match=r"quantize.loftq: iterations=0 must be a positive"):
        loftq(rounded, rank=1, iterations=0)
    with pytest.raises(ValueError, match=r"quantize.loftq: alpha=-1 must be positive"):
        loftq(rounded, rank=1, alpha=-1)
    with pytest.raises(ValueError, match=r"quantize.joint: sweeps=0 must be a positive"):
        joint(rounded, rank=1, sweeps=0)
    with pytest.raises(ValueError, match=r"quantize.joint: outliers=1.5 must lie in \[0, 1\)"):
        joint(rounded, outliers=1.5)
    with pytest.raises(ValueError, match=r"rank=0 and outliers=0 leave nothing beside"):
        joint(rounded)
    with pytest.raises(TypeError, match=r"low_rank_residual: dtype=.*must be float32, bfloat16"):
        low_rank_residual(rounded, rank=1, dtype=jnp.int8)


def test_trees_are_refused_by_their_paths():
    rounded = round_to_nearest(bits=4)
    params = {"a": draw(1, 16, 8), "b": draw(2, 16, 3)}
    with pytest.raises(ValueError, match=r"'a': rank=9 exceeds.*\(16, 8\).*at most 8(.|\n)*'b'"):
        apply(loftq(rounded, rank=9), params)
    with pytest.raises(ValueError, match=r"quantize.joint: 'stats' is missing"):
        apply(joint(rounded, rank=1), params)
    stats = Stats({"a": {"gram": jnp.eye(16), "count": jnp.asarray(9)}})
    with pytest.raises(ValueError, match=r"'b': the statistic 'gram' is missing"):
        apply(joint(rounded, rank=1), params, stats=stats)
    with pytest.raises(ValueError, match=r"'a': is already a Masked, whose structure"):
        apply(chain(magnitude(sparsity=0.5), loftq(rounded, rank=1)), params)
    with pytest.raises(ValueError, match=r"'b': group_size=16 does not divide"):
        apply(loftq(round_to_nearest(bits=4, group_size=16), rank=1), {"b": draw(2, 24, 8)})


def test_a_matrix_that_no_token_reached_is_fitted_as_if_all_inputs_counted_alike():
    weight = jnp.stack([draw(0, 32, 24), draw(1, 32, 24)])
    grams = jnp.stack([gram_of(32), jnp.zeros((32, 32))])
    tx = joint(round_to_nearest(bits=2), rank=3, outliers=0.02, sweeps=2)
    found = fit(tx, weight, grams)
    alone = fit(tx, weight[1], jnp.eye(32))
    np.testing.assert_allclose(found.materialize()[1], alone.materialize(), atol=1e-5)
