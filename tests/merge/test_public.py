"""Merges agree with mergekit and with the authors' code."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply, partition
from jaxweights.merge import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    delta_merge,
    mean,
    task_arithmetic,
    task_vector,
    ties,
)
from jaxweights.merge._delta_leaf import LeafInputs, LeafPlan, Row, _sparse_delta, mask_of_leaf
from tests._fixtures import fixture
from tests.merge._public import (
    NAMES,
    assert_merged,
    checkpoint,
    models,
    results,
    settings,
    whole_checkpoint,
)

ATOL = 1e-6  # what the fixtures' README expects of a float32 implementation


@pytest.mark.parametrize("name", ["default", "unnormalized"])
def test_mean_agrees_with_mergekit(name):
    merged, cases = results("linear")
    case = cases[name]
    tx = mean(
        weights=settings(case, "weight")["weight"],
        normalize=case.get("parameters", {}).get("normalize", True),
    )
    assert_merged(apply(tx, checkpoint("base"), models=models(case)), merged[name], ATOL)


def test_weights_per_layer_are_a_partition():
    merged, cases = results("linear")
    tx = partition(
        (r"model\.layers\.1\..*", mean(weights=[0.9, 0.4])), (..., mean(weights=[0.1, 0.4]))
    )
    got = apply(tx, checkpoint("base"), models=models(cases["layer_gradient"]))
    assert_merged(got, merged["layer_gradient"], ATOL)


@pytest.mark.parametrize("name", ["default", "normalize_lambda"])
def test_task_arithmetic_agrees_with_mergekit(name):
    merged, cases = results("task_arithmetic")
    case = cases[name]
    extra = case.get("parameters", {})
    tx = task_arithmetic(
        weights=settings(case, "weight")["weight"],
        normalize=extra.get("normalize", False),
        scale=extra.get("lambda", 1.0),
    )
    assert_merged(apply(tx, checkpoint("base"), models=models(case)), merged[name], ATOL)


@pytest.mark.parametrize("name", ["default", "rescale_int8", "unnormalized_lambda"])
def test_ties_agrees_with_mergekit(name):
    merged, cases = results("ties")
    case = cases[name]
    each, extra = settings(case, "density", "weight"), case.get("parameters", {})
    tx = ties(
        density=each["density"],
        weights=each["weight"],
        combine="mean" if extra.get("normalize", True) else "sum",
        rescale="l1" if extra.get("rescale") else "none",
        scale=extra.get("lambda", 1.0),
        compat="mergekit",
    )
    assert_merged(apply(tx, checkpoint("base"), models=models(case)), merged[name], ATOL)


def test_ties_of_bfloat16_models_agrees_with_mergekit():
    merged, cases = results("ties_bfloat16")
    case = cases["default"]
    narrow = lambda tree: {path: jnp.asarray(x, jnp.bfloat16) for path, x in tree.items()}  # noqa: E731
    each = settings(case, "density", "weight")
    tx = ties(density=each["density"], weights=each["weight"], compat="mergekit")
    got = apply(tx, narrow(checkpoint("base")), models=[narrow(m) for m in models(case)])
    for path, want in merged["default"].items():
        ours = np.asarray(got[path].astype(jnp.float32))
        assert got[path].dtype == jnp.bfloat16
        # Two bfloat16 steps of what is added up, as the public program rounds each term. Deltas of
        # norms, near 1, take a dozen values in bfloat16: many tie at the cut, and which of
        # them are kept is free. Elsewhere single entries.
        size = np.maximum(np.abs(want), np.abs(checkpoint("base")[path]))
        off = np.abs(ours - want) > 2**-6 * size
        assert off.mean() < (0.1 if "norm" in path else 0.01), path


@pytest.mark.parametrize("name", ["default", "variant"])
@pytest.mark.parametrize("preset", [breadcrumbs, breadcrumbs_ties])
def test_breadcrumbs_agrees_with_mergekit(preset, name):
    merged, cases = results(preset.__name__)
    case = cases[name]
    each, extra = settings(case, "density", "gamma", "weight"), case.get("parameters", {})
    tx = preset(
        density=each["density"],
        outliers=each["gamma"],
        weights=each["weight"],
        normalize=extra.get("normalize", False),
        scale=extra.get("lambda", 1.0),
        compat="mergekit",
    )
    assert_merged(apply(tx, checkpoint("base"), models=models(case)), merged[name], ATOL)


@pytest.mark.parametrize("preset", [dare_linear, dare_ties])
def test_dare_of_density_one_agrees_with_mergekit(preset):
    merged, cases = results(preset.__name__)
    case = cases["density1"]
    tx = preset(density=1.0, weights=settings(case, "weight")["weight"], compat="mergekit")
    assert_merged(apply(tx, checkpoint("base"), models=models(case)), merged["density1"], ATOL)


def _thin(delta, *, mask=None, density=1.0, outliers=0.0, sparsifier="none", rescale="none"):
    """One delta through the sparsifier, with the recorded draw where there is one."""
    row = Row(sparsifier, rescale, "none", "sum", "none", "positive", "leaf", "mergekit")
    if mask is None:
        mask = mask_of_leaf(delta, int(outliers * delta.size), int(density * delta.size), ())
    inputs = LeafInputs(jnp.ones(1), jnp.array([density]), (None,), (mask,))
    return _sparse_delta(delta, inputs, 0, row, LeafPlan((), (False,)))


@pytest.mark.parametrize(
    "case, settings",
    [
        ("magnitude_l1", {"sparsifier": "magnitude", "density": 0.4, "rescale": "l1"}),
        ("magnitude_l2", {"sparsifier": "magnitude", "density": 0.4, "rescale": "l2"}),
        (
            "outliers_l1",
            {"sparsifier": "outliers", "density": 0.6, "outliers": 0.05, "rescale": "l1"},
        ),
        ("random_l1", {"density": 0.5, "rescale": "l1"}),
        ("random_l2", {"density": 0.7, "rescale": "l2"}),
        ("random_linf", {"density": 0.7, "rescale": "linf"}),
        ("random_none", {"density": 0.5}),
    ],
)
def test_sparsifiers_agree_with_mergekit(case, settings):
    arrays = fixture("merge/sparsify_functions.npz")
    mask = arrays.get(f"{case}/mask")
    mask = None if mask is None else jnp.asarray(mask > 0)
    got = _thin(jnp.asarray(arrays["delta"]), mask=mask, **settings)
    np.testing.assert_allclose(got, arrays[f"{case}/out"], rtol=0, atol=ATOL)


def _authors_deltas(names=NAMES):
    """Task vectors of the leaves that the authors' code was run on."""
    base = whole_checkpoint("base")
    kept = [p for p in sorted(base) if "layers.0." in p or p == "model.norm.weight"]
    pick = lambda tree: {p: tree[p] for p in kept}  # noqa: E731
    return [task_vector(pick(whole_checkpoint(name)), pick(base)) for name in names]


def _assert_agrees_but_for_extra_entry(got, want):
    """The authors keep k + 1 entries a model, so at most three entries may differ."""
    assert sum(int((np.abs(np.asarray(got[p]) - want[p]) > ATOL).sum()) for p in want) <= 3


def _joined(tree):
    """The whole model as one vector, which ranks as the tree does and compiles once."""
    return {"all": np.concatenate([np.ravel(tree[path]) for path in sorted(tree)])}


@pytest.mark.slow
def test_ties_agrees_with_its_authors_who_rank_the_whole_tree():
    deltas = _authors_deltas()
    zero = {path: jnp.zeros_like(x) for path, x in deltas[0].items()}
    want = results("ties_original", ("",))[0]["topk20_mass_mean"]
    _assert_agrees_but_for_extra_entry(apply(ties(density=0.2), zero, models=deltas), want)


@pytest.mark.parametrize(
    "name, tx",
    [
        ("topk20_mass_mean", ties(density=0.2)),
        ("topk50_mass_sum", ties(density=0.5, combine="sum")),
        ("topk30_mass_max", ties(density=0.3, combine="max")),
        (
            "topk30_nosign_mean",
            delta_merge(sparsifier="magnitude", density=0.3, normalize="entries", scope="tree"),
        ),
    ],
)
def test_ways_to_combine_agree_with_the_authors_of_ties(name, tx):
    deltas = [_joined(delta) for delta in _authors_deltas()]
    zero = {"all": np.zeros_like(deltas[0]["all"])}
    want = _joined(results("ties_original", ("",))[0][name])
    _assert_agrees_but_for_extra_entry(apply(tx, zero, models=deltas), want)


@pytest.mark.parametrize("case, model", [("middle_a", "ft1"), ("middle_b", "ft1")])
def test_breadcrumbs_masks_agree_with_their_authors_row_by_row(case, model):
    merged, cases = results("breadcrumbs_original", ("down_proj.weight", "model.norm.weight"))
    wanted = cases[case]
    for path, want in merged[case].items():
        delta = whole_checkpoint(model)[path] - whole_checkpoint("base")[path]
        n = want.shape[-1]
        removed, kept = int(n * wanted["top_k_remove"]), int(n * wanted["top_k_keep"])
        if not wanted["remove_first"]:
            kept -= removed
        rows = tuple(range(want.ndim - 1))
        mask = mask_of_leaf(jnp.asarray(delta), removed, kept, rows)
        np.testing.assert_array_equal(np.where(mask, delta, 0), want, err_msg=path)
