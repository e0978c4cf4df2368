import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, Stats, apply, partition
from jaxweights.quantize import Grid, decode, gptq, gptq_matrix, quantize_matrix, round_to_nearest
from jaxweights.quantize._damped_factor import damped_factor, normalize_gram
from jaxweights.quantize._gptq_rows import _block_sizes
from jaxweights.weights import Axes, Masked, Quantized
from tests._fixtures import fixture

run = jax.jit(
    gptq_matrix,
    static_argnames=(
        "bits group_size group_axis grid act_order static_groups damping block_size "
        "scale_dtype search compat pad"
    ).split(),
)


def correlated(in_dim=64, out_dim=24, tokens=256, seed=0):
    """A weight and the Gram matrix of inputs with a few common factors."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(8, in_dim))
    x = rng.normal(size=(tokens, 8)) @ factors + 0.3 * rng.normal(size=(tokens, in_dim))
    return jnp.asarray(rng.normal(size=(in_dim, out_dim)), jnp.float32), jnp.asarray(
        x.T @ x, jnp.float32
    )


def dense(result, group=None):
    """The matrix that a result stands for, `(in, out)`, float64; `group` if the last is short."""
    codes, scale, zero = result.codes
    in_dim = codes.shape[0]
    index = result.group_index
    index = np.arange(in_dim) // (group or in_dim // scale.shape[0]) if index is None else index
    index = np.asarray(index)
    steps = np.asarray(codes, np.float64)
    if zero is not None:
        steps = steps - np.asarray(zero, np.float64)[index]
    return steps * np.asarray(scale, np.float64)[index]


def loss(weight, result, gram, group=None):
    change = np.asarray(weight, np.float64) - dense(result, group)
    return np.einsum("io,ij,jo->", change, np.asarray(gram, np.float64), change)


def damped(gram, fraction=0.01):
    gram = np.asarray(gram, np.float64)
    return gram + fraction * np.mean(np.diag(gram)) * np.eye(len(gram))


def gptq_by_rows(weight, gram, *, bits, group=None, damping=0.01, mask=None, order=None):
    """Affine GPTQ in float64 as the paper tells it: a row, then a new inverse of what is left.

    Instead of a Cholesky factor it eliminates each row from the inverse Gram matrix of the rows
    that are left (the paper's equation 3), and instead of blocks it updates everything at once.
    """
    in_dim = len(weight)
    order = np.arange(in_dim) if order is None else order
    weight = np.asarray(weight, np.float64)[order]
    mask = np.ones(weight.shape, bool) if mask is None else np.asarray(mask)[order]
    weight = np.where(mask, weight, 0)
    inverse = np.linalg.inv(damped(gram, damping)[order][:, order])
    group = group or in_dim
    result = np.zeros_like(weight)
    for i in range(in_dim):
        if i % group == 0:
            rows = np.where(mask, weight, 0)[i : i + group].astype(np.float32)
            low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
            scale = (high - low) / np.float32(2**bits - 1)
            scale = np.where(scale == 0, 1, scale).astype(np.float32)
            zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
        codes = np.clip(np.round(weight[i] / scale) + zero, 0, 2**bits - 1)
        result[i] = np.where(mask[i], (codes - zero) * scale, 0)
        error = (weight[i] - result[i]) / inverse[i, i]
        weight = weight - np.outer(inverse[:, i], error)
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    unordered = np.empty_like(result)
    unordered[order] = result
    return unordered


def assert_mostly_equal(ours, theirs, step, share=0.95):
    # A rounding that float32 turns over changes the rest of its output by about a step, so
    # outputs are counted, not entries.
    same = np.all(np.abs(ours - theirs) < 0.01 * step, axis=0)
    assert same.mean() >= share


@pytest.mark.parametrize(
    "group, block", [(None, 32), (16, 32), (48, 32), (8, 128), (32, 32), (3, 24)]
)
def test_it_equals_row_by_row_elimination(group, block):
    weight, gram = correlated(in_dim=96)
    ours = run(weight, gram, bits=4, group_size=group, block_size=block)
    assert_mostly_equal(dense(ours), gptq_by_rows(weight, gram, bits=4, group=group), 0.1)


@pytest.mark.parametrize("group, block", [(20, 128), (20, 40), (36, 16), (7, 21), (200, 32)])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_row_by_row_elimination_where_the_last_group_is_shorter(group, block, masked):
    weight, gram = correlated(in_dim=96)
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, weight.shape) if masked else None
    ours = run(weight, gram, bits=4, group_size=group, block_size=block, pad="zero", mask=mask)
    assert ours.group_index is None
    assert ours.codes.scale.shape == (-(-96 // group), 24)
    theirs = gptq_by_rows(weight, gram, bits=4, group=group, mask=mask)
    assert_mostly_equal(dense(ours, group), theirs, 0.1)


def test_full_groups_lose_what_they_would_without_the_shorter_one():
    # The last rows take errors and hand none on: rows before them do not know of them.
    weight, gram = correlated(in_dim=56)
    ours = run(weight, gram, bits=4, group_size=16, pad="zero")
    factor = np.linalg.cholesky(damped(gram)[::-1, ::-1])[::-1, ::-1]  # upper: gram = R R^T
    cut = jnp.asarray(factor[:48, :48] @ factor[:48, :48].T, jnp.float32)
    theirs = run(weight[:48], cut, bits=4, group_size=16, damping=1e-7)
    np.testing.assert_array_equal(ours.codes.scale[0], theirs.codes.scale[0])
    same = np.all(ours.codes.codes[:48] == theirs.codes.codes, axis=0)
    assert same.mean() >= 0.8


@pytest.mark.parametrize("static", [False, True])
def test_the_rows_that_are_visited_last_make_up_the_shorter_group(static):
    weight, gram = correlated()
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.3, 3, 64), jnp.float32)
    gram = gram * jnp.outer(scale, scale)
    order = np.argsort(-np.diag(gram), kind="stable")
    ours = run(
        weight, gram, bits=4, group_size=24, pad="zero", act_order=True, static_groups=static
    )
    if static:
        assert ours.group_index is None
        plain = quantize_matrix(weight, Grid("affine", 4, 24, pad="zero"))
        np.testing.assert_array_equal(ours.codes.scale, plain.scale)
        assert loss(weight, ours, gram, 24) < 0.8 * loss(
            weight, ours._replace(codes=plain), gram, 24
        )
        return
    assert np.bincount(ours.group_index).tolist() == [24, 24, 16]
    theirs = gptq_by_rows(weight, gram, bits=4, group=24, order=order)
    assert_mostly_equal(dense(ours), theirs, 0.1)


def test_it_equals_row_by_row_elimination_in_order_of_activity():
    weight, gram = correlated()
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.3, 3, 64), jnp.float32)
    gram = gram * jnp.outer(scale, scale)
    order = np.argsort(-np.diag(gram), kind="stable")
    assert not np.array_equal(order, np.arange(64))
    ours = run(weight, gram, bits=4, group_size=16, act_order=True)
    assert_mostly_equal(dense(ours), gptq_by_rows(weight, gram, bits=4, group=16, order=order), 0.1)
    assert np.bincount(ours.group_index).tolist() == [16] * 4


@pytest.mark.parametrize("group", [None, 16])
def test_pruned_weights_stay_zero_and_their_error_is_made_up_for(group):
    weight, gram = correlated()
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, weight.shape)
    ours = run(weight, gram, bits=4, group_size=group, mask=mask)
    assert np.all(dense(ours)[~np.asarray(mask)] == 0)
    theirs = gptq_by_rows(weight, gram, bits=4, group=group, mask=mask)
    assert_mostly_equal(dense(ours), theirs, 0.1)


CASES = [
    "b2_row_damp",
    "b3_g32_asym",
    "b3_g32_sym_act",
    "b3_row_asym",
    "b3_row_sym_mse",
    "b4_g32_asym_act_static",
    "b4_g32_asym_block32",
    "b4_g32_sym",
    "b4_row_asym",
    "b4_row_asym_act",
    "b4_row_asym_dead",
    "b4_row_sym",
]


@pytest.mark.parametrize("case", CASES)
def test_the_authors_results_are_reproduced(case):
    stored = fixture("quantize/gptq.npz")
    settings = json.loads(str(stored["meta"]))["cases"][case]
    ours = run(
        jnp.asarray(stored["W"].T),
        jnp.asarray(stored["H_dead" if settings.get("dead") else "H"]),
        bits=settings["bits"],
        group_size=None if settings["groupsize"] < 0 else settings["groupsize"],
        grid="gptq_sym" if settings["sym"] else "affine",
        act_order=settings["actorder"],
        static_groups=settings.get("static_groups", False),
        damping=settings.get("percdamp", 0.01),
        block_size=settings.get("blocksize", 128),
        search="mse" if settings.get("mse") else "absmax",
        compat=True,
    )
    np.testing.assert_allclose(ours.codes.scale.T, stored[f"{case}/scale"], rtol=1e-6)
    np.testing.assert_array_equal(ours.codes.zero_point.T, stored[f"{case}/zero"])
    same = np.all(np.abs(dense(ours).T - stored[f"{case}/Q"]) < 1e-5, axis=1)
    assert same.mean() >= 0.95


@pytest.mark.parametrize("group", [None, 16, "tensor"])
@pytest.mark.parametrize("act_order, static", [(False, False), (True, True)])
def test_uncorrelated_inputs_make_it_round_to_nearest(group, act_order, static):
    weight, _ = correlated()
    gram = jnp.diag(jax.random.uniform(jax.random.key(1), (64,), minval=0.1, maxval=9.0))
    ours = run(weight, gram, bits=4, group_size=group, act_order=act_order, static_groups=static)
    plain = quantize_matrix(weight, Grid("affine", 4, group))
    assert np.array_equal(ours.codes.codes, plain.codes)
    assert np.array_equal(ours.codes.scale, plain.scale)
    assert ours.group_index is None


@pytest.mark.parametrize("group, static", [(None, False), (16, True), (16, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_squared_errors_add_up_to_the_damped_loss(group, static, masked):
    weight, gram = correlated()
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, weight.shape) if masked else None
    ours = run(weight, gram, bits=3, group_size=group, static_groups=static, mask=mask)
    weight = weight if mask is None else jnp.where(mask, weight, 0)
    expected = loss(weight, ours, damped(gram) / np.mean(np.diag(gram)))
    assert float(ours.error) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_less_than_rounding_where_inputs_are_correlated(bits):
    weight, gram = correlated()
    off_diagonal = gram / jnp.sqrt(jnp.outer(jnp.diag(gram), jnp.diag(gram))) - jnp.eye(64)
    assert float(jnp.mean(jnp.abs(off_diagonal))) > 0.2  # they are
    ours = run(weight, gram, bits=bits, group_size=16, static_groups=True)
    plain = quantize_matrix(weight, Grid("affine", bits, 16))
    plain = ours._replace(codes=plain)
    assert loss(weight, ours, gram) < 0.5 * loss(weight, plain, gram)


def test_rows_are_stale_only_in_groups_shorter_than_a_block():
    weight, gram = correlated()
    scales = {
        (compat, group): run(
            weight, gram, bits=3, group_size=group, block_size=32, compat=compat
        ).codes.scale
        for compat in (False, True)
        for group in (16, 32)
    }
    assert np.array_equal(scales[False, 32], scales[True, 32])
    # Of each block's two groups the first sees the same rows, the second does not.
    assert np.array_equal(scales[False, 16][0], scales[True, 16][0])
    assert not np.array_equal(scales[False, 16][1], scales[True, 16][1])


def test_a_power_of_two_in_the_gram_matrix_changes_nothing():
    weight, gram = correlated()
    gram = gram.at[5].set(0).at[:, 5].set(0)  # a dead input too
    plain, scaled = (run(weight, g, bits=4, group_size=16) for g in (gram, gram * 1024))
    assert np.array_equal(plain.codes.codes, scaled.codes.codes)
    assert float(plain.damping) == float(scaled.damping)


def test_outputs_do_not_know_of_each_other():
    weight, gram = correlated()
    whole = run(weight, gram, bits=4, group_size=16)
    order = np.random.default_rng(0).permutation(24)
    moved = run(weight[:, order], gram, bits=4, group_size=16)
    # Products of other widths may add in another order, hence not bit for bit.
    assert_mostly_equal(dense(whole)[:, order], dense(moved), 0.1)


@pytest.mark.parametrize("compat, expected", [(False, "rounded"), (True, "zero")])
def test_weights_of_dead_inputs_are_rounded_or_zero_as_the_authors_do(compat, expected):
    weight, gram = correlated()
    gram = gram.at[5].set(0).at[:, 5].set(0)
    ours = run(weight, gram, bits=4, compat=compat)
    plain = ours._replace(codes=quantize_matrix(weight, Grid("affine", 4)))
    assert np.array_equal(
        dense(ours)[5], dense(plain)[5] if expected == "rounded" else 0 * plain.codes.scale[0]
    )


def test_the_factor_is_that_of_the_damped_matrix():
    _, gram = correlated()
    spread, diagonal, used = damped_factor(normalize_gram(gram), 0.01)
    assert float(used) == pytest.approx(0.01)
    assert np.array_equal(spread, np.tril(spread))
    assert np.array_equal(np.diagonal(spread), np.ones(64))
    upper = np.asarray(spread, np.float64).T * np.asarray(diagonal, np.float64)
    expected = damped(gram) / np.mean(np.diag(gram))
    np.testing.assert_allclose(upper @ upper.T, expected, atol=1e-5)


def test_a_gram_matrix_that_is_not_quite_symmetric_counts_as_the_mean_with_its_transpose():
    gram = jnp.array([[1.0, 0.5], [0.25, 1.0]])
    found, mean = damped_factor(gram, 0.0), damped_factor((gram + gram.T) / 2, 0.0)
    np.testing.assert_array_equal(found.spread, mean.spread)
    np.testing.assert_array_equal(found.spread[1, 0], np.float32(0.375))


@pytest.mark.parametrize(
    "shift, first, used", [(-0.05, 0.01, 0.1), (-0.5, 0.01, 1.0), (-0.05, 0.0, 0.1)]
)
def test_damping_grows_until_the_factor_exists(shift, first, used):
    # Eigenvalues of this are 1 + shift - 1 on all but one direction: `shift` must be outweighed.
    gram = jnp.ones((16, 16)) + shift * jnp.eye(16)
    factor = damped_factor(gram, first)
    assert float(factor.damping) == pytest.approx(used)
    assert np.isfinite(factor.spread).all()


@pytest.mark.parametrize("gram", [-2 * jnp.eye(16), jnp.full((16, 16), jnp.nan)])
def test_where_no_damping_helps_the_weight_is_rounded_and_the_status_says_so(gram):
    weight = jax.random.normal(jax.random.key(0), (16, 4))
    factor = damped_factor(gram, 0.01)
    assert np.isnan(factor.damping)
    assert np.array_equal(factor.spread, np.eye(16))
    ours = run(weight, jnp.full((16, 16), jnp.nan), bits=4, group_size=8)
    assert np.isnan(ours.damping)
    assert np.array_equal(ours.codes.codes, quantize_matrix(weight, Grid("affine", 4, 8)).codes)


def test_compiled_equals_eager():
    weight, gram = correlated()
    eager, compiled = (f(weight, gram, bits=4, group_size=16) for f in (gptq_matrix, run))
    assert_mostly_equal(dense(eager), dense(compiled), 0.1)


def test_bfloat16_weights_are_rounded_as_their_float32_values():
    weight, gram = correlated()
    weight = weight.astype(jnp.bfloat16)
    ours, wide = (run(w, gram, bits=4, group_size=16) for w in (weight, weight.astype(jnp.float32)))
    assert np.array_equal(ours.codes.codes, wide.codes.codes)


@pytest.mark.parametrize(
    "in_dim, group, block_size, expected",
    [
        (2048, None, 128, (128, 8)),
        (2048, 128, 128, (128, 8)),
        (100, None, 128, (104, 8)),
        (48, 12, 32, (24, 6)),
        (512, 256, 128, (256, 8)),
        (96, 3, 24, (24, 3)),
        (97, 97, 128, (97, 1)),
    ],
)
def test_blocks_hold_whole_groups_and_the_few_at_once_divide_them(
    in_dim, group, block_size, expected
):
    assert _block_sizes(in_dim, group, block_size) == expected


def test_the_program_does_not_grow_with_the_width():
    sizes = []
    for in_dim in (256, 2048):
        shapes = (
            jax.ShapeDtypeStruct((in_dim, 64), jnp.float32),
            jax.ShapeDtypeStruct((in_dim, in_dim), jnp.float32),
        )
        fn = functools.partial(gptq_matrix, bits=4, group_size=128)
        sizes.append(len(str(jax.make_jaxpr(fn)(*shapes)).splitlines()))
    assert sizes[1] < 1.01 * sizes[0]  # longer numbers break a few more lines


# The transform.


def stats_of(params, entries, axes=None):
    layout = Layout.of(axes or {})
    values = {
        path: {"gram": gram, "count": jnp.asarray(count)} for path, (gram, count) in entries.items()
    }
    return Stats(values, layout=layout)


def test_a_stack_equals_its_matrices_one_by_one():
    pairs = [correlated(seed=seed) for seed in range(3)]
    weights, grams = (jnp.stack(x) for x in zip(*pairs, strict=True))
    params = {"layers": {"kernel": weights}}
    stats = stats_of(
        params, {"layers/kernel": (grams, jnp.full(3, 256))}, {"layers/kernel": Axes()}
    )
    stacked = apply(gptq(bits=4, group_size=16), params, stats=stats)["layers"]["kernel"]
    assert isinstance(stacked, Quantized)
    assert stacked.shape == (3, 64, 24)
    for i, (weight, gram) in enumerate(pairs):
        alone = run(weight, gram, bits=4, group_size=16)
        one = jax.tree.map(lambda x, i=i: x[i], stacked)
        assert np.array_equal(one.codes_matrix(), alone.codes.codes)
        assert np.array_equal(one.scale, alone.codes.scale)


def test_a_tree_can_be_rounded_as_the_authors_do():
    weight, gram = correlated()
    gram = gram.at[5].set(0).at[:, 5].set(0)
    stats = stats_of({"kernel": weight}, {"kernel": (gram, 256)})
    settings = {"bits": 3, "group_size": 16, "block_size": 32}
    found = {}
    for compat in (False, True):
        tx = gptq(compat=compat, **settings)
        found[compat] = apply(tx, {"kernel": weight}, stats=stats)["kernel"]
        alone = run(weight, gram, compat=compat, **settings).codes
        assert np.array_equal(found[compat].codes_matrix(), alone.codes)
        assert np.array_equal(found[compat].scale, alone.scale)
    assert np.all(found[True].materialize()[5] == 0)
    assert not np.array_equal(found[True].scale, found[False].scale)


@pytest.mark.parametrize("act_order", [False, True])
def test_an_attention_kernel_is_rounded_as_its_matrix(act_order):
    weight, gram = correlated()
    params = {"q": {"kernel": weight.reshape(64, 4, 6)}, "o": {"kernel": weight.reshape(8, 8, 24)}}
    axes = {
        "q/kernel": Axes(inputs=(-3,), outputs=(-2, -1)),
        "o/kernel": Axes(inputs=(-3, -2), outputs=(-1,)),
    }
    stats = stats_of(params, dict.fromkeys(axes, (gram, 256)), axes)
    new = apply(gptq(bits=4, group_size=16, act_order=act_order), params, stats=stats)
    alone = run(weight, gram, bits=4, group_size=16, act_order=act_order)
    for name in ("q", "o"):
        kernel = new[name]["kernel"]
        assert kernel.shape == params[name]["kernel"].shape
        np.testing.assert_allclose(
            kernel.materialize().reshape(64, 24), dense(alone), rtol=1e-6, atol=1e-6
        )


def test_a_masked_leaf_stays_masked():
    weight, gram = correlated()
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, weight.shape)
    params = {"kernel": Masked(weight, mask)}
    new = apply(gptq(bits=4), params, stats=stats_of(params, {"kernel": (gram, 256)}))["kernel"]
    assert isinstance(new, Masked)
    assert isinstance(new.base, Quantized)
    assert np.all(np.asarray(new.base.materialize())[~np.asarray(mask)] == 0)
    alone = run(weight, gram, bits=4, mask=mask)
    assert np.array_equal(new.base.codes_matrix(), alone.codes.codes)


def test_it_asks_for_the_gram_matrix_and_the_count():
    params = {"mlp": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    assert gptq(bits=4).needs(params) == {"mlp/kernel": frozenset({"gram", "count"})}


@pytest.mark.parametrize(
    "gram, count, words",
    [
        (
            jnp.zeros((64, 64)),
            0,
            "'kernel': no calibration token reached it. Calibrate on more data",
        ),
        (
            jnp.full((64, 64), jnp.nan),
            256,
            "'kernel': its Gram matrix is not positive definite even",
        ),
    ],
)
def test_a_matrix_that_cannot_be_calibrated_is_refused_by_name_or_rounded(gram, count, words):
    weight, _ = correlated()
    params = {"kernel": weight}
    stats = stats_of(params, {"kernel": (gram, count)})
    with pytest.raises(ValueError) as error:
        apply(gptq(bits=4), params, stats=stats)
    assert words in str(error.value)
    assert "on_failure='round_to_nearest'" in str(error.value)
    tolerant = gptq(bits=4, on_failure="round_to_nearest")
    reason = "no_tokens" if count == 0 else "not_positive_definite"
    with pytest.warns(UserWarning, match=rf"'kernel': was rounded to nearest \({reason}\)"):
        rounded = apply(tolerant, params, stats=stats)["kernel"]
    plain = apply(round_to_nearest(bits=4, grid="affine"), params)["kernel"]
    assert np.array_equal(rounded.materialize(), plain.materialize())


def test_the_matrices_of_a_stack_that_fail_are_named():
    weight, gram = correlated()
    params = {"experts": {"kernel": jnp.stack([weight] * 3)}}
    grams = jnp.stack([gram, 0 * gram, gram])
    stats = stats_of(
        params,
        {"experts/kernel": (grams, jnp.array([256, 0, 256]))},
        {"experts/kernel": Axes()},
    )
    with pytest.raises(ValueError, match=r"'experts/kernel'.*matrices \[1\] of its stack"):
        apply(gptq(bits=4), params, stats=stats)


def test_fewer_tokens_than_inputs_are_warned_of():
    weight, gram = correlated(tokens=32)
    params = {"kernel": weight}
    with pytest.warns(
        UserWarning, match=r"'kernel': 32 tokens were seen, fewer than its 64 inputs"
    ):
        apply(gptq(bits=4), params, stats=stats_of(params, {"kernel": (gram, 32)}))


def test_values_that_are_not_finite_are_refused():
    weight, gram = correlated()
    params = {"kernel": weight.at[40, 3].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"quantize.gptq: 'kernel': 1 of 24 groups hold values"):
        apply(gptq(bits=4), params, stats=stats_of(params, {"kernel": (gram, 256)}))


def test_a_group_that_does_not_divide_is_refused_with_the_sizes_that_do():
    params = {"kernel": jnp.ones((100, 8))}
    stats = stats_of(params, {"kernel": (jnp.eye(100), 256)})
    with pytest.raises(ValueError) as error:
        apply(gptq(bits=4, group_size=128), params, stats=stats)
    assert (
        "quantize.gptq: 'kernel': group_size=128 does not divide the input axis, which has length "
        "100. Choose one of 1, 2, 4, 5, 10, 20, 25, 50, 100, fill up the last group by pad='zero', "
    ) in str(error.value)
    with pytest.raises(ValueError, match="group_size=128 does not divide"):
        gptq_matrix(jnp.ones((100, 8)), jnp.eye(100), bits=4, group_size=128)


def test_a_quantized_leaf_is_refused():
    weight, gram = correlated()
    params = apply(round_to_nearest(bits=4), {"kernel": weight})
    with pytest.raises(ValueError, match=r"is already a Quantized\. Quantizing it again"):
        apply(gptq(bits=4), params, stats=stats_of(params, {"kernel": (gram, 256)}))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"damping": 1.5}, r"damping=1.5 must lie in \[0, 1\]"),
        ({"block_size": 0}, "block_size=0 must be a positive integer"),
        ({"bits": 1}, "bits=1 must lie between 2 and 8"),
        ({"on_failure": "skip"}, "on_failure='skip' is unknown"),
        (
            {"pad": "zero"},
            "pad='zero' fills up groups of rows, but group_size=None along the input",
        ),
        (
            {"pad": "zero", "group_size": 8, "act_order": "groups"},
            "act_order='groups' visits whole groups in another order, so that a shorter one may",
        ),
    ],
)
def test_settings_are_checked_when_built(settings, words):
    with pytest.raises(ValueError, match=words):
        gptq(**({"bits": 4} | settings))


def test_it_works_inside_jit_and_on_abstract_values():
    weight, gram = correlated()
    params, tx = {"kernel": weight}, gptq(bits=4, group_size=16)
    stats = stats_of(params, {"kernel": (gram, 256)})
    outside = apply(tx, params, stats=stats)["kernel"]
    inside = jax.jit(lambda p, s: apply(tx, p, stats=s))(params, stats)["kernel"]
    assert_mostly_equal(np.asarray(outside.materialize()), np.asarray(inside.materialize()), 0.1)
    shape = jax.eval_shape(lambda p, s: apply(tx, p, stats=s), params, stats)["kernel"]
    assert shape.shape == (64, 24)
    assert shape.codes.shape == (32, 24)


def test_rules_name_what_is_rounded_and_how():
    weight, gram = correlated()
    params = {"a": {"kernel": weight}, "b": {"kernel": -weight}}
    stats = stats_of(params, {"a/kernel": (gram, 256)})
    tx = partition(("a/.*", gptq(bits=4)), (..., round_to_nearest(bits=8)))
    new = apply(tx, params, stats=stats)
    assert (new["a"]["kernel"].bits, new["b"]["kernel"].bits) == (4, 8)


def test_decoded_codes_are_what_the_weight_materialises_to():
    weight, gram = correlated()
    params = {"kernel": weight}
    new = apply(
        gptq(bits=3, group_size=16), params, stats=stats_of(params, {"kernel": (gram, 256)})
    )
    alone = run(weight, gram, bits=3, group_size=16).codes
    spread = jax.tree.map(lambda x: jnp.repeat(x, 64 // x.shape[0], 0), alone)
    assert np.array_equal(new["kernel"].materialize(), decode(*spread))
