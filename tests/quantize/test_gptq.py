"""GPTQ of one matrix."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.quantize import Grid, gptq_matrix, quantize_matrix
from jaxweights.quantize._damped_factor import damped_factor, normalize_gram
from jaxweights.quantize._gptq_rows import _block_sizes
from tests._fixtures import fixture
from tests.quantize._gptq import (
    assert_mostly_equal,
    correlated,
    damped,
    dense,
    gptq_by_rows,
    loss,
    run,
)


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
