"""Small transforms that the tests of the core combine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core import Transform, leafwise, stateless


def add(amount, *, name="add", **settings):
    """Adds a number to every matrix."""
    return leafwise(
        lambda weight: weight + jnp.asarray(amount, weight.dtype), name=name, **settings
    )


def scale_by_rms(name="scale_by_rms"):
    """Divides every input row by the root mean square of its input."""

    def fn(weight, *, count, second_moment):
        rms = jnp.sqrt(second_moment / count.astype(jnp.float32))
        return weight / rms[:, None]

    return leafwise(fn, name=name, needs=("count", "second_moment"))


def add_noise(name="add_noise"):
    return leafwise(
        lambda weight, *, key: weight + jax.random.normal(key, weight.shape),
        name=name,
        randomized=True,
    )


def rotate(name="rotate"):
    return stateless(lambda params, context: params, name=name, moves_inputs=True)


def counting():
    """Counts in its state how often it ran, and adds the count."""

    def update(params, state, context):
        del context
        return jax.tree.map(lambda x: x + state.astype(x.dtype), params), state + 1

    return Transform(lambda params: jnp.int32(1), update, name="counting")


def matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
