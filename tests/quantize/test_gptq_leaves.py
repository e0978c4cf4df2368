import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, Stats, apply, partition
from jaxweights.quantize import _gptq as module
from jaxweights.quantize import fp4, gptq, gptq_matrix, nf4, output_error, round_to_nearest
from jaxweights.weights import CONV_HWIO, Axes, Codebook, Masked
from tests.quantize._gptq import (
    assert_mostly_equal,
    correlated,
    dense,
    gptq_by_rows,
    run,
    stats_of,
)


@pytest.mark.parametrize("static", [False, True])
def test_ordered_groups_stay_together_and_equal_row_by_row_elimination(static):
    weight, gram = correlated()
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.3, 3, 64), jnp.float32)
    gram = gram * jnp.outer(scale, scale)
    groups = np.diag(gram).reshape(4, 16)
    within = np.argsort(-groups, axis=1, kind="stable") + 16 * np.arange(4)[:, None]
    order = within[np.argsort(-groups.max(axis=1), kind="stable")].reshape(-1)
    assert not np.array_equal(order // 16, np.arange(64) // 16)
    ours = run(weight, gram, bits=4, group_size=16, act_order="groups", static_groups=static)
    assert ours.group_index is None
    if not static:
        theirs = gptq_by_rows(weight, gram, bits=4, group=16, order=order)
        assert_mostly_equal(dense(ours), theirs, 0.1)
    diagonal = jnp.diag(jnp.diagonal(gram))
    plain = run(weight, diagonal, bits=4, group_size=16)
    ordered = run(weight, diagonal, bits=4, group_size=16, act_order="groups")
    assert np.array_equal(plain.codes.codes, ordered.codes.codes)
    assert np.array_equal(plain.codes.scale, ordered.codes.scale)


def test_ordering_groups_needs_groups_of_rows():
    with pytest.raises(ValueError, match="act_order='groups' orders groups of rows"):
        gptq(bits=4, act_order="groups")
    with pytest.raises(ValueError, match="act_order=1 must be False, True or 'groups'"):
        gptq(bits=4, group_size=8, act_order=1)
    with pytest.raises(ValueError, match="act_order='rows' must be False, True or 'groups'"):
        gptq(bits=4, group_size=8, act_order="rows")


def test_weights_of_one_input_share_a_factorization_and_equal_separate_calls(monkeypatch):
    weight, gram = correlated()
    params = {name: {"kernel": weight[:, i : i + 8] + i} for i, name in enumerate("qkv")}
    entry = {"gram": gram, "count": jnp.asarray(256)}
    shared = Stats({"q/kernel": entry}, owners=(("k/kernel", "q/kernel"), ("v/kernel", "q/kernel")))
    alone = Stats({f"{name}/kernel": entry for name in "qkv"})
    traced = []
    original = module.prepare_gram
    monkeypatch.setattr(
        module, "prepare_gram", lambda *a, **k: traced.append(1) or original(*a, **k)
    )
    together = apply(gptq(bits=4, group_size=16), params, stats=shared)
    assert len(traced) == 1
    apart = apply(gptq(bits=4, group_size=16), params, stats=alone)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        assert np.array_equal(a, b)


def test_the_report_tells_what_became_of_every_matrix_of_a_stack():
    weight, gram = correlated()
    # Of rank one, with a diagonal below what its row needs: damping of 0.01 does not suffice.
    poor = (jnp.ones((64, 64)) - 0.05 * jnp.eye(64)) * 100
    grams = jnp.stack([gram, 0 * gram, poor, jnp.full((64, 64), jnp.nan)])
    params = {"experts": {"kernel": jnp.stack([weight] * 4)}}
    stats = stats_of(
        params,
        {"experts/kernel": (grams, jnp.array([256, 0, 256, 256]))},
        {"experts/kernel": Axes()},
    )
    report = {}
    tx = gptq(bits=4, group_size=16, on_failure="round_to_nearest", report=report.__setitem__)
    new = apply(tx, params, stats=stats)["experts"]["kernel"]
    found = report["experts/kernel"]
    assert found.status.tolist() == [
        "gptq",
        "round_to_nearest:no_tokens",
        "gptq_damped:0.1",
        "round_to_nearest:not_positive_definite",
    ]
    assert found.tokens.tolist() == [256, 0, 256, 256]
    plain = apply(round_to_nearest(bits=4, group_size=16, grid="affine"), {"kernel": weight})[
        "kernel"
    ].materialize()
    for i in (1, 3):
        assert np.array_equal(new.materialize()[i], plain)
    expected = output_error(weight, new.materialize()[0], gram, relative=True)
    assert float(found.error[0]) == pytest.approx(float(expected), rel=1e-4)
    assert found.error[1] == 0  # no output, no error


def test_without_a_report_a_fallback_is_warned_of():
    weight, gram = correlated()
    params = {"experts": {"kernel": jnp.stack([weight] * 2)}}
    stats = stats_of(
        params,
        {"experts/kernel": (jnp.stack([gram, 0 * gram]), jnp.array([256, 0]))},
        {"experts/kernel": Axes()},
    )
    words = (
        r"'experts/kernel': was rounded to nearest \(no_tokens\) \(matrices \[1\] of its stack\)"
    )
    with pytest.warns(UserWarning, match=words):
        apply(gptq(bits=4, on_failure="round_to_nearest"), params, stats=stats)


@pytest.mark.parametrize(
    "path, axes, to_leaf",
    [
        ("conv/kernel", CONV_HWIO, lambda w: w.reshape(2, 2, 16, 24)),
        ("embedding", Axes((-1,), (-2,), "embedding"), lambda w: w.T),
    ],
)
def test_convolutions_and_named_embeddings_are_rounded_as_their_matrices(path, axes, to_leaf):
    weight, gram = correlated()
    leaf = to_leaf(weight)
    params = {"conv": {"kernel": leaf}} if "/" in path else {"embedding": leaf}
    stats = stats_of(params, {path: (gram, 256)}, {path: axes})
    tx = partition((path, gptq(bits=4, group_size=16)))
    (new,) = jax.tree.leaves(
        apply(tx, params, stats=stats), is_leaf=lambda x: hasattr(x, "materialize")
    )
    alone = dense(run(weight, gram, bits=4, group_size=16))
    assert new.shape == leaf.shape
    np.testing.assert_allclose(new.materialize(), to_leaf(jnp.asarray(alone)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (8, 0), (1, 1)])
def test_empty_and_single_entries_are_rounded(shape):
    result = gptq_matrix(jnp.ones(shape), jnp.eye(shape[0]), bits=4)
    assert result.codes.codes.shape == shape
    if shape == (1, 1):
        assert dense(result)[0, 0] == pytest.approx(1)


def test_statistics_of_another_layout_are_refused_with_both_shapes():
    params = {"q": {"kernel": jnp.ones((64, 4, 6))}}
    axes = {"q/kernel": Axes(inputs=(-3,), outputs=(-2, -1))}
    stats = Stats(
        {"q/kernel": {"gram": jnp.eye(4), "count": jnp.asarray(9)}}, layout=Layout.of(axes)
    )
    words = r"'q/kernel': the statistic 'gram' has shape \(4, 4\), but .* needs \(64, 64\)"
    with pytest.raises(ValueError, match=words):
        apply(gptq(bits=4), params, stats=stats)


TABLES = {"nf4": nf4, "fp4": fp4}


@pytest.mark.parametrize("table", list(TABLES))
@pytest.mark.parametrize("group, act_order", [(16, False), (16, "groups"), (None, True)])
def test_uncorrelated_inputs_make_it_round_to_the_nearest_level_of_a_table(table, group, act_order):
    weight, _ = correlated()
    gram = jnp.diag(jax.random.uniform(jax.random.key(1), (64,), minval=0.1, maxval=9.0))
    params, stats = {"kernel": weight}, stats_of({}, {"kernel": (gram, 256)})
    tx = gptq(bits=4, grid=table, group_size=group, act_order=act_order)
    new = apply(tx, params, stats=stats)["kernel"]
    assert isinstance(new, Codebook)
    plain = apply(TABLES[table](group_size=group), params)["kernel"].materialize()
    assert np.array_equal(new.materialize(), plain)


@pytest.mark.parametrize("table", list(TABLES))
def test_levels_of_a_table_lose_less_than_rounding_where_inputs_are_correlated(table):
    weight, gram = correlated()
    params, stats = {"kernel": weight}, stats_of({}, {"kernel": (gram, 256)})
    report = {}
    tx = gptq(bits=4, grid=table, group_size=16, report=report.__setitem__)
    new = apply(tx, params, stats=stats)["kernel"].materialize()
    plain = apply(TABLES[table](group_size=16), params)["kernel"].materialize()
    errors = [float(output_error(weight, w, gram, relative=True)) for w in (new, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert float(report["kernel"].error) == pytest.approx(errors[0], rel=1e-3)


def test_pruned_weights_stay_zero_on_a_table():
    weight, gram = correlated()
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, weight.shape)
    stats = stats_of({}, {"kernel": (gram, 256)})
    tx = gptq(bits=4, grid="nf4", group_size=16)
    new = apply(tx, {"kernel": Masked(weight, mask)}, stats=stats)["kernel"]
    assert np.all(np.asarray(new.base.materialize())[~np.asarray(mask)] == 0)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"bits": 3}, r"bits=3 means nothing to it\. Pass bits=4"),
        ({"search": "mse"}, "search='mse' means nothing"),
        ({"group_axis": "output"}, "group_axis='output' means nothing"),
        ({"act_order": True}, "act_order=True scatters groups"),
    ],
)
def test_settings_that_a_table_cannot_follow_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        gptq(**({"bits": 4, "grid": "nf4", "group_size": 16} | settings))
