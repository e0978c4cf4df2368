"""Small representations that the tests of `lift` put in place of dense weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.weights import Axes, LowRank, Masked, MatrixWeight, View, Weight
from jaxweights.weights._weight import static, weight_dataclass


@weight_dataclass
class Int8(MatrixWeight):
    """Integers times one scale per output: the simplest matrix weight with rules of its own."""

    codes: jax.Array  # (*stack, in, out) int8
    scale: jax.Array  # (*stack, 1, out)
    dtype: Any = static()
    view: View = static()

    @classmethod
    def of(cls, leaf, axes=Axes()):
        view = View.of(leaf.shape, axes)
        *stack, _, _ = _matrix_shape(view, leaf.shape)
        order = [*view.stack_axes(leaf.ndim), *axes.inputs, *axes.outputs]
        matrix = np.transpose(np.float32(leaf), order).reshape(*stack, view.in_dim, view.out_dim)
        scale = np.abs(matrix).max(axis=-2, keepdims=True) / 127
        codes = np.round(matrix / scale).astype(np.int8)
        return cls(jnp.asarray(codes), jnp.asarray(scale), np.dtype(leaf.dtype), view)

    @property
    def _stack(self):
        return tuple(self.codes.shape[:-2])

    def matrix(self):
        return self.codes.astype(self.dtype) * self.scale.astype(self.dtype)

    def astype(self, dtype):
        return Int8(self.codes, self.scale, np.dtype(dtype), self.view)

    def multiply(self, x, **options):
        y = jnp.matmul(x, self.codes.astype(x.dtype), **options)
        return y * self.scale.astype(y.dtype)

    def columns(self, indices):
        return self.matrix()[:, indices].T


@weight_dataclass
class Opaque(Weight):
    """A weight without any rule: all that it can do is to become dense."""

    dense: jax.Array

    @property
    def shape(self):
        return tuple(self.dense.shape)

    @property
    def dtype(self):
        return self.dense.dtype

    def materialize(self):
        return self.dense + jnp.ones((), self.dense.dtype)


def _matrix_shape(view, shape):
    return (*(shape[a] for a in view.stack_axes(len(shape))), view.in_dim, view.out_dim)


def int8(leaf, axes=Axes()):
    return Int8.of(leaf, axes)


def masked(leaf, axes=Axes()):
    return Masked(Int8.of(leaf, axes), jnp.asarray(np.float32(leaf) > 0))


def low_rank(leaf, axes=Axes(), *, base=int8, rank=2):
    view = View.of(leaf.shape, axes)
    *stack, in_dim, out_dim = _matrix_shape(view, leaf.shape)
    down = normal(leaf.size, *stack, in_dim, rank) * np.float32(0.1)
    up = normal(leaf.size + 1, *stack, rank, out_dim) * np.float32(0.1)
    scaling = jnp.asarray(np.full(stack, 0.5, np.float32))
    return LowRank(base(leaf, axes), jnp.asarray(down), jnp.asarray(up), scaling, view)


REPRESENTATIONS = {"int8": int8, "masked": masked, "low_rank": low_rank}


def normal(seed, *shape, dtype=np.float32):
    """Drawn by NumPy: JAX would compile a program for every shape."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_same(actual, expected, tolerance=2e-5):
    """Equal up to the order of float32 sums of at most a hundred terms of order one."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )
