"""Promises that every public transform keeps."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import load_tree, save_tree
from tests.contract._trees import (
    LAYOUT,
    PARTS,
    assert_same,
    cases,
    context_of,
    eager,
    make_params,
    make_stats,
    run,
    transform_of,
)
from tests.contract.registry import CASES, TESTED_APART


def test_every_public_transform_is_registered():
    registered = {case.name.split()[0] for case in CASES}
    public = {
        f"{family.__name__.split('.')[-1]}.{name}"
        for family in (jw.align, jw.quantize, jw.sparsify, jw.adapt, jw.merge)
        for name, fn in vars(family).items()
        if inspect.isfunction(fn)
        and re.search(r"\bTransform\b", str(inspect.signature(fn).return_annotation))
    }
    assert len(public) > 10
    assert public == registered | TESTED_APART
    assert not registered & TESTED_APART


@cases(lambda case: case.traceable)
def test_abstract_evaluation_tells_the_shapes_of_the_run(case):
    params, context, real = eager(case)
    abstract = jax.eval_shape(lambda p, c: run(case, p, **c), params, context)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@cases()
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_dtypes_and_structure_are_kept_and_matrices_change(case, dtype):
    parts = PARTS if dtype == jnp.float32 else ("dense", "steps")
    params = make_params(dtype, parts=parts)
    new = run(case, params, **context_of(case, dtype, parts))
    before = jax.tree_util.tree_leaves_with_path(params)
    after = jax.tree_util.tree_leaves_with_path(new, is_leaf=jw.is_weight)
    assert [p for p, _ in before] == [p for p, _ in after]
    for (path, old), (_, leaf) in zip(before, after, strict=True):
        assert leaf.shape == old.shape, path
        assert leaf.dtype == old.dtype, path
    dense = jw.materialize(new)
    changed = not np.array_equal(dense["dense"]["kernel"], params["dense"]["kernel"])
    # Adapters start as the identity; everything else must have done something.
    assert changed == (case.name not in ("adapt.lora", "adapt.rslora"))
    finite = [bool(jnp.isfinite(leaf.astype(jnp.float32)).all()) for leaf in jax.tree.leaves(dense)]
    assert all(finite)


@cases()
def test_leaves_that_no_rule_names_are_the_same_objects(case):
    params, context, _ = eager(case)
    tx = jw.partition(("dense/kernel", transform_of(case)), (..., jw.identity()))
    new = jw.apply(tx, params, layout=LAYOUT, **context)
    assert new["attention"]["kernel"] is params["attention"]["kernel"]
    assert new["stack"]["kernel"] is params["stack"]["kernel"]
    assert new["dense"]["bias"] is params["dense"]["bias"]
    assert new["steps"] is params["steps"]


@cases(lambda case: case.per_slice)
def test_a_stack_is_transformed_as_its_slices_are(case):
    params, context, result = eager(case)
    stacked = jw.materialize(result)["stack"]["kernel"]
    for i in range(3):
        pick = lambda leaf: leaf[i]  # noqa: B023, E731
        single = {"dense": {"kernel": params["stack"]["kernel"][i]}}
        part = dict(context)
        if context["stats"] is not None:
            entry = jax.tree.map(pick, context["stats"].values["stack/kernel"])
            part["stats"] = jw.Stats({"dense/kernel": entry})
        if context["models"]:
            part["models"] = [
                {"dense": {"kernel": m["stack"]["kernel"][i]}} for m in context["models"]
            ]
        layout = {"dense/kernel": jw.Axes()}
        alone = jw.materialize(jw.apply(transform_of(case), single, layout=layout, **part))
        np.testing.assert_allclose(stacked[i], alone["dense"]["kernel"], rtol=2e-6, atol=1e-7)


@cases(lambda case: transform_of(case).scope != "tree")
def test_a_leaf_is_transformed_alone_as_it_is_in_its_tree(case):
    params, context, result = eager(case, ("dense", "stack"))
    only = lambda tree: {"dense": {"kernel": tree["dense"]["kernel"]}}  # noqa: E731
    part = context | {"models": [only(m) for m in context["models"] or ()] or None}
    layout = {"dense/kernel": jw.Axes()}
    alone = jw.apply(transform_of(case), only(params), layout=layout, **part)
    assert_same(alone, only(result))


@cases(lambda case: transform_of(case).scope == "entry")
def test_rows_are_transformed_alone_as_they_are_in_their_leaf(case):
    params, context, result = eager(case, ("dense", "stack"))
    rows = lambda tree: {"rows": tree["dense"]["kernel"].reshape(-1)[40:90]}  # noqa: E731
    part = context | {"models": [rows(m) for m in context["models"] or ()] or None}
    alone = jw.apply(transform_of(case), rows(params), **part)
    assert_same(alone, rows(result))


@cases()
def test_the_same_key_gives_the_same_bits_and_another_key_others(case):
    params, context, first = eager(case)
    second = run(case, params, **context)
    assert_same(first, second)
    if case.keyed:
        other = run(case, params, **(context | {"key": jax.random.key(8)}))
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
        assert any(not np.array_equal(a, b) for a, b in pairs)


@cases(lambda case: transform_of(case).reads_statistics)
def test_a_missing_statistic_is_refused_by_name(case):
    params = make_params()
    with pytest.raises(ValueError, match=rf"{case.name.split()[0]}: 'stats' is missing"):
        run(case, params)
    values = make_stats().values
    stats = jw.Stats({path: values[path] for path in values if path != "dense/kernel"})
    with pytest.raises(ValueError, match=r"'dense/kernel': the statistic '\w+' is missing"):
        run(case, params, stats=stats)


@cases(lambda case: case.models > 0)
def test_missing_models_are_refused_by_name(case):
    with pytest.raises(ValueError, match=r"merge\.\w+: .*models"):
        run(case, make_params(), **(context_of(case) | {"models": None}))


@cases()
def test_saving_and_loading_gives_the_same_bits(case, tmp_path):
    _, _, new = eager(case)
    save_tree(tmp_path / "tree", new)
    assert_same(load_tree(tmp_path / "tree").tree, new)
