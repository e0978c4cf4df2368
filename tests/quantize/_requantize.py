"""Weights and data for the tests of rounding on a weight's own grid."""

import jax.numpy as jnp
import numpy as np

from jaxweights.core import Stats, apply
from jaxweights.quantize import (
    round_to_nearest,
)


def correlated(in_dim=32, tokens=256, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 6)) @ rng.normal(size=(6, in_dim))
    x = x + 0.3 * rng.normal(size=(tokens, in_dim))
    return jnp.asarray(x.T @ x, jnp.float32)


def draw(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def stats_of(gram, path="kernel"):
    count = jnp.full(gram.shape[:-2], 256, jnp.int32)
    return Stats({path: {"gram": gram, "count": count}})


def quantized(shape=(32, 16), axes=None, **settings):
    layout = None if axes is None else {"kernel": axes}
    settings = {"bits": 4, "group_size": 8} | settings
    return apply(round_to_nearest(**settings), {"kernel": draw(1, *shape)}, layout=layout)["kernel"]
