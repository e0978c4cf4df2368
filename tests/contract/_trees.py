"""The tree, the statistics and the models that every transform of the contract runs on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw
from tests.contract.registry import CASES

KEY = jax.random.key(7)
PARTS = ("attention", "dense", "stack", "steps")
LAYOUT = {
    "dense/kernel": jw.Axes(),
    "stack/kernel": jw.Axes(),
    "attention/kernel": jw.Axes(inputs=(-3,), outputs=(-2, -1)),
}
MATRICES = ("attention/kernel", "dense/kernel", "stack/kernel")


def cases(keep=lambda case: True):
    """Runs a test for every transform, or for those that make the promise."""
    chosen = [case for case in CASES if keep(case)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


@functools.cache
def transform_of(case):
    """Built once: a transform compiles its own programs."""
    return case.make()


@functools.cache
def make_params(dtype=jnp.float32, seed=0, parts=PARTS):
    """A tree with heads, a plain kernel, a stack and what is no matrix; or some parts of it."""
    keys = jax.random.split(jax.random.key(seed), 3)
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)  # noqa: E731
    tree = {
        "attention": {"kernel": normal(keys[0], 32, 4, 8)},
        "dense": {"kernel": normal(keys[1], 32, 16), "bias": jnp.ones(16, dtype)},
        "stack": {"kernel": normal(keys[2], 3, 32, 16)},
        "steps": jnp.asarray(5, jnp.int32),
    }
    return {part: tree[part] for part in parts}


@functools.cache
def make_stats():
    """Statistics of correlated inputs, 32 wide, as `calibrate` would leave them."""
    x = jax.random.normal(KEY, (64, 8)) @ jax.random.normal(jax.random.fold_in(KEY, 1), (8, 32))
    x = x + 0.1 * jax.random.normal(jax.random.fold_in(KEY, 2), (64, 32))
    original = x + 0.1 * jax.random.normal(jax.random.fold_in(KEY, 3), (64, 32))
    one = {
        "count": jnp.asarray(64, jnp.int32),
        "sum": x.sum(0),
        "abs_sum": jnp.abs(x).sum(0),
        "gram": x.T @ x,
        "cross_gram": x.T @ original,
        "min": x.min(0),
        "max": x.max(0),
    }
    values = {path: one for path in MATRICES[:2]}
    values["stack/kernel"] = jax.tree.map(lambda v: jnp.stack([v, 2 * v, 3 * v]), one)
    return jw.Stats(values)


def context_of(case, dtype=jnp.float32, parts=PARTS):
    models = [make_params(dtype, 10 + i, parts) for i in range(case.models)]
    return {
        "stats": make_stats() if transform_of(case).reads_statistics else None,
        "models": models or None,
        "key": KEY if case.keyed else None,
    }


def run(case, params, **context):
    layout = {path: axes for path, axes in LAYOUT.items() if path.split("/")[0] in params}
    return jw.apply(transform_of(case), params, layout=layout, **context)


@functools.cache
def eager(case, parts=PARTS):
    """The parameters, the context and the result that several tests look at."""
    params = make_params(parts=parts)
    context = context_of(case, parts=parts)
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


def shard(params, mesh):
    """Outputs over `model`; nothing else is split, so groups of inputs stay whole."""
    specs = {
        "attention": {"kernel": PartitionSpec(None, "model")},
        "dense": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")},
        "stack": {"kernel": PartitionSpec(None, None, "model")},
        "steps": PartitionSpec(),
    }
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, params, {part: specs[part] for part in params})


def shard_context(context, mesh):
    return context | {"models": [shard(model, mesh) for model in context["models"] or ()] or None}
