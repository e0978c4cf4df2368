"""Small models, random weights for them, and random permutations."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights import align
from jaxweights.core import flatten, unflatten
from jaxweights.models import build, config_from_dict
from tests.models._cases import CASES


def random_like(params, seed=0):
    """Weights of the same shapes, none of them zero or equal, so that every move shows."""
    flat, structure = flatten(params)
    rng = np.random.default_rng(seed)
    leaves = {
        path: jnp.asarray(
            rng.standard_normal(x.shape) / max(1, x.shape[-2] if len(x.shape) > 1 else 4) ** 0.5,
            jnp.float32,
        )
        for path, x in flat.items()
    }
    return unflatten(structure, leaves)


def random_permutations(spec, seed=1):
    """A random permutation of every name, another one for every place in its stack."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.permuted(array, axis=-1).astype(np.int32)
        for name, array in spec.identity().items()
    }


def library_model(case):
    """One of the library's models: its config, its module, and random weights."""
    config = config_from_dict(CASES[case])
    model = build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return config, model, random_like(shapes)


def mlp(params, x):
    """Dense layers with tanh between them."""
    names = sorted(params)
    for name in names:
        x = x @ params[name]["kernel"] + params[name]["bias"][None]
        x = jnp.tanh(x) if name != names[-1] else x
    return x


def mlp_params(*sizes, seed=0):
    """Weights of `mlp`."""
    shapes = {
        f"Dense_{i}": {
            "kernel": jax.ShapeDtypeStruct((rows, columns), jnp.float32),
            "bias": jax.ShapeDtypeStruct((columns,), jnp.float32),
        }
        for i, (rows, columns) in enumerate(itertools.pairwise(sizes))
    }
    return random_like(shapes, seed)


def assert_preserved(fn, spec, params, *inputs, seed=1, tolerance=1e-5):
    """Asserts that permuted weights compute the same, and that they are other weights.

    Sums are taken in another order, so the outputs differ by rounding: 1e-5 of the largest.
    """
    permutations = random_permutations(spec, seed)
    moved = align.apply_permutation(spec, params, permutations)
    before, after = flatten(params)[0], flatten(moved)[0]
    for name in spec.names:
        if np.array_equal(permutations[name], spec.identity()[name]):
            continue
        for path in spec.leaves_of(name):
            assert not np.array_equal(before[path], after[path]), (name, path)
    expected, got = fn(params, *inputs), fn(moved, *inputs)
    expected, got = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(y)]) for y in (expected, got)
    )
    scale = np.abs(expected).max()
    assert scale > 0 and np.isfinite(scale)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)
