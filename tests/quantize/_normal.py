"""Relative squared errors on normal weights, as they are known of every format."""

import functools

import jax
import jax.numpy as jnp


@functools.cache
def normal_weight():
    return jax.random.normal(jax.random.key(0), (4096, 256))


def error_on_normal_weights(matrix):
    """Of a function from a matrix to its representation."""
    weight = normal_weight()
    miss = jax.jit(lambda w: jnp.sum((matrix(w).materialize() - w) ** 2))(weight)
    return float(miss / jnp.sum(weight**2))
