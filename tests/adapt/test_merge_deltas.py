"""merge_adapter_deltas: merges of models, applied to what adapters add."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import combine_adapters, merge_adapter_deltas
from jaxweights.core import apply
from jaxweights.merge import breadcrumbs, dare_linear, delta_merge, task_arithmetic, ties, tsv
from jaxweights.weights import EMBEDDING, Axes, LowRank, View
from tests.adapt.test_combine import HEADS, TOL, adapter, deltas, draw, peft_trees

AXES = {"attention/kernel": HEADS, "stack/kernel": Axes()}


@pytest.mark.parametrize(
    "case, preset",
    [
        ("mixed_rank/magnitude_prune_svd", delta_merge),
        ("mixed_rank/dare_linear_svd_d1", dare_linear),  # which drops nothing
    ],
)
def test_merged_deltas_are_those_of_peft(case, preset):
    arrays, trees = peft_trees("mixed_rank")
    settings = json.loads(str(arrays["meta"]))["cases"][case]
    extra = {"sparsifier": "magnitude"} if preset is delta_merge else {}
    tx = preset(
        weights=settings["weights"], density=settings["density"], compat="mergekit", **extra
    )
    merged, report = merge_adapter_deltas(tx, trees, key=jax.random.key(0))
    for name, leaf in merged.items():
        want = arrays[f"{case}/{name}.delta"].T
        np.testing.assert_allclose(leaf.delta.materialize(), want, rtol=0, atol=1e-5)
        assert report[name].rank == 6


def dense_models(trees):
    """The base and the adapted models, for the same merge on whole weights."""
    return [
        {f"{n}/kernel": jnp.asarray(leaf.delta.materialize()) for n, leaf in kernels(tree).items()}
        for tree in trees
    ]


def kernels(tree):
    return {n: x["kernel"] for n, x in tree.items() if isinstance(x["kernel"], LowRank)}


@pytest.mark.parametrize(
    "tx",
    [
        ties(density=0.5),
        ties(density=0.5, scope="leaf", weights=[1.0, -0.5]),
        breadcrumbs(density=0.6, outliers=0.1),
        dare_linear(density=0.5),
        tsv(),
    ],
    ids=["ties", "ties leaf", "breadcrumbs", "dare", "tsv"],
)
def test_full_rank_gives_what_the_merge_makes_of_dense_models(tx):
    trees, key = [adapter(1), adapter(2, 3)], jax.random.key(3)
    merged, report = merge_adapter_deltas(tx, trees, rank=12, key=key)
    models = dense_models(trees)
    zero = jax.tree.map(jnp.zeros_like, models[0])
    want = apply(tx, zero, models=models, key=key, layout=AXES)
    for name, leaf in kernels(merged).items():
        np.testing.assert_allclose(
            leaf.delta.materialize(), want[f"{name}/kernel"], rtol=0, atol=5e-5
        )
        assert float(report[f"{name}/kernel"].error) < 1e-6


@pytest.mark.parametrize("tx", [ties(density=1.0), task_arithmetic(), dare_linear(density=1.0)])
def test_one_adapter_that_is_not_thinned_keeps_its_delta(tx):
    merged, report = merge_adapter_deltas(tx, [adapter(1)], key=jax.random.key(0))
    for name, delta in deltas(adapter(1)).items():
        np.testing.assert_allclose(deltas(merged)[name], delta, **TOL)
    assert all(loss.rank == 2 for loss in report.values())


def test_task_arithmetic_is_the_truncated_sum():
    trees, weights = [adapter(1), adapter(2)], [0.7, -0.4]
    merged, report = merge_adapter_deltas(task_arithmetic(weights=weights), trees, rank=3)
    want, losses = combine_adapters(trees, weights, mode="svd", rank=3)
    for name in deltas(want):
        np.testing.assert_allclose(deltas(merged)[name], deltas(want)[name], rtol=0, atol=5e-5)
        got, expected = (float(r[f"{name}/kernel"].error) for r in (report, losses))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_thinning_raises_the_rank_and_the_report_says_what_is_lost():
    _, report = merge_adapter_deltas(ties(density=0.3), [adapter(1), adapter(2)], rank=4)
    assert all(0.05 < float(loss.error) < 1 for loss in report.values())


def test_an_adapter_without_a_leaf_has_zeros_there():
    trees = [adapter(1, only=("dense",)), adapter(2)]
    tx = delta_merge(normalize="models", weights=[3.0, 1.0])
    merged, _ = merge_adapter_deltas(tx, trees, rank=12)
    want = deltas(trees[1])["stack"] / 4
    np.testing.assert_allclose(deltas(merged)["stack"], want, **TOL)


def test_tables_of_embeddings_are_merged_too():
    table = draw(1, (10, 6))
    view = View.of(table.shape, EMBEDDING)
    trees = [
        {"embedding": LowRank.over(table, draw(s, (6, 1)), draw(s + 9, (1, 10)), view=view)}
        for s in (1, 2)
    ]
    merged, _ = merge_adapter_deltas(ties(density=0.5), trees, rank=6)
    models = [{"embedding": t["embedding"].delta.materialize()} for t in trees]
    want = apply(ties(density=0.5), {"embedding": jnp.zeros((10, 6))}, models=models)
    got = merged["embedding"].delta.materialize()
    np.testing.assert_allclose(got, want["embedding"], **TOL)


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(TypeError, match=r"adapt.merge_adapter_deltas: 'ties' is no transform"):
        merge_adapter_deltas("ties", [adapter(1)])
    with pytest.raises(ValueError, match=r"merge.dare_linear: 'key' is missing"):
        merge_adapter_deltas(dare_linear(density=0.5), [adapter(1)])
    with pytest.raises(ValueError, match=r"merge.ties: weights has 3 entries, but 2 models"):
        merge_adapter_deltas(ties(weights=[1, 2, 3]), [adapter(1), adapter(2)])
