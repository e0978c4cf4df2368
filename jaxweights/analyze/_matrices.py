"""Leaves as stacks of matrices, and their singular values."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxweights.core import _lapack
from jaxweights.weights._axes import Axes, View

Method = Literal["svd", "gram"]
Precision = Literal["float32", "float64"]


def matrix_view(shape: tuple[int, ...], axes: Axes, heads: str, conv: str) -> View:
    """The view that splits heads and kernel positions off as stack axes, where asked to."""
    if axes.kind == "conv" and conv == "per_position":
        axes = dataclasses.replace(axes, inputs=axes.inputs[-1:])
    elif axes.kind == "linear" and heads == "split":
        many = [len(axes.inputs) > 1, len(axes.outputs) > 1]
        # With several axes on both sides there is no telling which of them is the heads'.
        if many == [False, True]:
            axes = dataclasses.replace(axes, outputs=axes.outputs[1:])
        elif many == [True, False]:
            axes = dataclasses.replace(axes, inputs=axes.inputs[1:])
    return View.of(shape, axes)


def check_precision(name: str, precision: Precision) -> Any:
    """The dtype to compute in."""
    if precision not in ("float32", "float64"):
        raise ValueError(f"{name}: precision={precision!r} is neither 'float32' nor 'float64'.")
    if precision == "float64" and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise ValueError(
            f"{name}: float64 requested but jax_enable_x64 is off. Turn it on with "
            "jax.config.update('jax_enable_x64', True), or pass precision='float32'."
        )
    return jnp.dtype(precision)


def power_of_two(x: jax.Array) -> jax.Array:
    """A power of two near the largest magnitude of each matrix, `(*stack, 1, 1)`; 1 for zeros.

    Division by it is exact, so that squares of tiny weights do not vanish.
    """
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)
    largest = jax.lax.stop_gradient(largest)
    mantissa = jnp.frexp(largest)[0]  # in [1/2, 1)
    return jnp.where(largest > 0, largest / jnp.where(largest > 0, 2 * mantissa, 1), 1)


def singular_values(matrix: jax.Array, method: Method = "svd") -> jax.Array:
    """Singular values of each matrix, `(*stack, min(in, out))`, descending.

    Args:
      matrix: `(*stack, in, out)`, float32 or float64.
      method: `"gram"` takes roots of eigenvalues of the smaller Gram matrix: faster, but values
        below the root of the dtype's epsilon times the largest are noise.

    Returns:
      The values, in the dtype of `matrix`.
    """
    if method == "svd":
        return _lapack.singular_values(matrix)
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else jnp.swapaxes(matrix, -1, -2)
    gram = jnp.matmul(wide, jnp.swapaxes(wide, -1, -2), precision="highest")
    squares = _lapack.eigenvalues(gram)[..., ::-1]
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
