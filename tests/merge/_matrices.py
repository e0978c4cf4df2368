"""Matrices of known rank and spectrum, and trees of them, for the spectral merges."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxweights.core import Layout
from jaxweights.weights import Axes

SHAPE = (6, 4)
LAYOUT = Layout.of(
    {
        "layers/kernel": Axes(),
        "heads/kernel": Axes(inputs=(-3,), outputs=(-2, -1)),
        "table/embedding": Axes(inputs=(-1,), outputs=(-2,), kind="embedding"),
    },
    traced=True,
)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def low_rank(seed, rank, shape=SHAPE):
    return draw(seed, shape[0], rank) @ draw(seed + 100, rank, shape[1])


def zeros(*shape):
    return {"kernel": jnp.zeros(shape or SHAPE, jnp.float32)}


def merged(tx, matrices):
    """The merged delta of deltas to a base of zeros."""
    from jaxweights.core import apply

    models = [{"kernel": jnp.asarray(matrix)} for matrix in matrices]
    return np.asarray(apply(tx, zeros(*matrices[0].shape), models=models)["kernel"])


def spectrum(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def truncated(matrix, rank):
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def stacked_models(count=2):
    """Trees with a stack of two unlike layers, an attention kernel, a table and a norm."""
    trees = []
    for i in range(count):
        layers = draw(i, 2, *SHAPE) * np.array([1.0, 100.0], np.float32).reshape(2, 1, 1)
        trees.append(
            {
                "layers": {"kernel": jnp.asarray(layers), "norm": jnp.asarray(draw(40 + i, 2, 4))},
                "heads": {"kernel": jnp.asarray(draw(50 + i, 6, 2, 2))},
                "table": {"embedding": jnp.asarray(draw(60 + i, 5, 4))},
            }
        )
    return trees
