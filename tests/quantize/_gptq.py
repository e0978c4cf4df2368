"""GPTQ as the paper tells it, row by row, and data with correlated inputs."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core import Layout, Stats
from jaxweights.quantize import gptq_matrix

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


def stats_of(params, entries, axes=None):
    layout = Layout.of(axes or {})
    values = {
        path: {"gram": gram, "count": jnp.asarray(count)} for path, (gram, count) in entries.items()
    }
    return Stats(values, layout=layout)
