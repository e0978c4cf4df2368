"""Promises that every public transform keeps."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw
from jaxweights.checkpoint import load_tree, save_tree
from tests.contract.registry import CASES

KEY = jax.random.key(7)
LAYOUT = {
    "(dense|stack)/kernel": jw.Axes(),
    "attention/kernel": jw.Axes(inputs=(-3,), outputs=(-2, -1)),
}
MATRICES = ("attention/kernel", "dense/kernel", "stack/kernel")
COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)")


def cases(keep=lambda case: True):
    """Runs a test for every transform, or for those that make the promise."""
    chosen = [case for case in CASES if keep(case)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


@functools.cache
def transform_of(case):
    """Built once: a transform compiles its own programs."""
    return case.make()


@functools.cache
def make_params(dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)  # noqa: E731
    return {
        "attention": {"kernel": normal(keys[0], 32, 4, 8)},
        "dense": {"kernel": normal(keys[1], 32, 16), "bias": jnp.ones(16, dtype)},
        "stack": {"kernel": normal(keys[2], 3, 32, 16)},
        "steps": jnp.asarray(5, jnp.int32),
    }


@functools.cache
def make_stats():
    """Statistics of correlated inputs, 32 wide, as `calibrate` would leave them."""
    x = jax.random.normal(KEY, (64, 8)) @ jax.random.normal(jax.random.fold_in(KEY, 1), (8, 32))
    x = x + 0.1 * jax.random.normal(jax.random.fold_in(KEY, 2), (64, 32))
    one = {
        "count": jnp.asarray(64, jnp.int32),
        "sum": x.sum(0),
        "gram": x.T @ x,
        "min": x.min(0),
        "max": x.max(0),
    }
    values = {path: one for path in MATRICES[:2]}
    values["stack/kernel"] = jax.tree.map(lambda v: jnp.stack([v, 2 * v, 3 * v]), one)
    return jw.Stats(values)


def context_of(case, dtype=jnp.float32):
    models = [make_params(dtype, seed=10 + i) for i in range(case.models)]
    return {
        "stats": make_stats() if transform_of(case).reads_statistics else None,
        "models": models or None,
        "key": KEY if case.keyed else None,
    }


def run(case, params, **context):
    return jw.apply(transform_of(case), params, layout=LAYOUT, **context)


@functools.cache
def eager(case):
    """The parameters, the context and the result that several tests look at."""
    params = make_params()
    context = context_of(case)
    return params, context, run(case, params, **context)


def assert_same(actual, expected, **tolerance):
    """Structures equal; integers and masks bit for bit, floats to the tolerance."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x) for x in (a, b))
        if tolerance and jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def test_every_public_transform_is_registered():
    registered = {case.name.split()[0] for case in CASES}
    public = {
        f"{family.__name__.split('.')[-1]}.{name}"
        for family in (jw.quantize, jw.sparsify, jw.adapt, jw.merge)
        for name, fn in vars(family).items()
        if inspect.isfunction(fn) and "Transform" in str(inspect.signature(fn).return_annotation)
    }
    assert len(public) > 10
    assert public == registered


@cases()
def test_jit_equals_eager(case):
    params, context, result = eager(case)
    compiled = jax.jit(lambda p, c: run(case, p, **c))(params, context)
    # Another fusion may round a scale's or a delta's last bit differently, never a code or a mask.
    assert_same(compiled, result, rtol=2e-6, atol=1e-7)


@cases()
def test_abstract_evaluation_tells_the_shapes_of_the_run(case):
    params, context, real = eager(case)
    abstract = jax.eval_shape(lambda p, c: run(case, p, **c), params, context)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@cases()
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_dtypes_and_structure_are_kept_and_matrices_change(case, dtype):
    params = make_params(dtype)
    new = run(case, params, **context_of(case, dtype))
    before = jax.tree_util.tree_leaves_with_path(params)
    after = jax.tree_util.tree_leaves_with_path(new, is_leaf=jw.is_weight)
    assert [p for p, _ in before] == [p for p, _ in after]
    for (path, old), (_, leaf) in zip(before, after, strict=True):
        assert leaf.shape == old.shape, path
        assert leaf.dtype == old.dtype, path
    dense = jw.materialize(new)
    changed = not np.array_equal(dense["dense"]["kernel"], params["dense"]["kernel"])
    # Adapters start as the identity; everything else must have done something.
    assert changed == (not case.name.startswith("adapt."))
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


@cases()
def test_vmap_over_whole_trees_equals_a_loop(case):
    first, context, alone_first = eager(case)
    second = make_params(seed=1)
    together = jax.jit(jax.vmap(lambda p: jw.materialize(run(case, p, **context))))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    )
    for i, alone in enumerate((alone_first, run(case, second, **context))):
        alone = jw.materialize(alone)
        assert_same(jax.tree.map(lambda leaf: leaf[i], together), alone, rtol=1e-5, atol=1e-6)  # noqa: B023


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


def shard(params, mesh):
    """Outputs over `model`; nothing else is split, so groups of inputs stay whole."""
    specs = {
        "attention": {"kernel": PartitionSpec(None, "model")},
        "dense": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")},
        "stack": {"kernel": PartitionSpec(None, None, "model")},
        "steps": PartitionSpec(),
    }
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, params, specs)


@cases()
def test_sharded_equals_single_device_and_keeps_the_sharding(case, mesh):
    params, context, result = eager(case)
    sharded = context | {"models": [shard(m, mesh) for m in context["models"] or ()] or None}
    expected = jw.materialize(result)
    with jax.threefry_partitionable(True):
        got = run(case, shard(params, mesh), **sharded)
    leaf = got["dense"]["kernel"]
    weights = jax.tree.leaves(leaf)
    split = [x for x in weights if len(x.sharding.device_set) == 8 and not x.is_fully_replicated]
    assert split, "nothing of the result is sharded any more"
    dense = jw.materialize(got)
    assert_same(dense, expected, rtol=1e-5, atol=1e-6)


@cases(lambda case: case.elementwise)
def test_elementwise_methods_compile_to_no_collective(case, mesh):
    params = make_params()
    context = context_of(case)
    sharded = context | {"models": [shard(m, mesh) for m in context["models"] or ()] or None}
    program = jax.jit(lambda p, c: run(case, p, **c)).lower(shard(params, mesh), sharded).compile()
    assert COLLECTIVES.findall(program.as_text()) == []


def test_the_search_for_collectives_can_fail(mesh):
    sharded = shard(make_params(), mesh)["dense"]["kernel"]
    program = jax.jit(lambda x: x / x.sum()).lower(sharded).compile()
    assert "all-reduce" in COLLECTIVES.findall(program.as_text())
