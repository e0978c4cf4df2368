"""Vectors on spheres: lengths and angles, factors from them, and the sum. Arrays in, arrays out.

A spherical merge is a sum of the models with one factor for each model and vector. Lengths and
angles are one compiled program for each shape of leaf and the sum is another; the factors between
them depend on few numbers, and compile once for all leaves.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.merge._models import Output, all_finite, compute_dtype

# Below this angle the first two terms of the series are exact to float32.
_SMALL = 1e-3
_ANTIPODAL = math.pi - 1e-3  # beyond it the arc between two points is not determined


class Arcs(NamedTuple):
    """Two models' vectors on the unit sphere; every field has one entry per vector."""

    first: jax.Array  # norm of the first model's
    second: jax.Array  # norm of the second's
    apart: jax.Array  # square of the distance between the two directions
    together: jax.Array  # square of the length of the sum of the two directions


def vectors_of(base: Any, models: list[Any], *, deltas: bool) -> list[jax.Array]:
    """The models, or their differences to the base, in the dtype of the computation."""
    dtype = compute_dtype(base)
    wide = [jnp.asarray(x).astype(dtype) for x in models]
    if not deltas:
        return wide
    origin = jnp.asarray(base).astype(dtype)
    return [x - origin for x in wide]


def square(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum of squares of each vector, over axes that stay with length 1."""
    return jnp.sum(x * x, axis=axes, keepdims=True)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root whose gradient at zero is zero."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def safe_inverse(x: jax.Array) -> jax.Array:
    """One over x, and zero where x is zero."""
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


def directions(
    vectors: list[jax.Array], axes: tuple[int, ...]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Unit vectors and norms. A vector without length stays zero; so do values below 1e-19."""
    norms = [safe_sqrt(square(x, axes)) for x in vectors]
    return [x * safe_inverse(n) for x, n in zip(vectors, norms, strict=True)], norms


@functools.partial(jax.jit, static_argnames=("axes", "deltas"))
def arcs(base: Any, models: list[Any], *, axes: tuple[int, ...], deltas: bool) -> Arcs:
    """Lengths and distances of two models' vectors."""
    (a, b), (norm_a, norm_b) = directions(vectors_of(base, models, deltas=deltas), axes)
    apart = square(a - b, axes)
    # The two squares sum to 4. Only near π, where the second nearly vanishes, is it summed itself.
    together = jax.lax.cond(
        jnp.any(apart > 3),
        lambda a, b, _: square(a + b, axes),
        lambda _a, _b, apart: jnp.maximum(4 - apart, 0),
        a,
        b,
        apart,
    )
    return Arcs(*(x.reshape(-1) for x in (norm_a, norm_b, apart, together)))


@functools.partial(jax.jit, static_argnames=("axes", "deltas"))
def mean_direction(
    base: Any, models: list[Any], shares: jax.Array, *, axes: tuple[int, ...], deltas: bool
) -> tuple[jax.Array, jax.Array]:
    """Norms of the models' vectors `(models, vectors)`, and of the weighted sum of directions."""
    units, norms = directions(vectors_of(base, models, deltas=deltas), axes)
    total = sum(shares[i] * unit for i, unit in enumerate(units))
    length = safe_sqrt(square(jnp.asarray(total), axes))
    return jnp.stack([n.reshape(-1) for n in norms]), length.reshape(-1)


@functools.partial(jax.jit, static_argnames=("axes", "deltas"))
def chords(
    base: Any, models: list[Any], shares: jax.Array, *, axes: tuple[int, ...], deltas: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `mean_direction`, and the squared distances between directions.

    Directions of fine-tuned models are close. What they differ by from their mean is multiplied, so
    that distances are exact to their own size.

    Returns:
      Norms `(models, vectors)`, the length of the weighted sum of directions `(vectors,)`, and
      squared distances `(vectors, models, models)`.
    """
    units, norms = directions(vectors_of(base, models, deltas=deltas), axes)
    mean = jnp.asarray(sum(shares[i] * unit for i, unit in enumerate(units)))
    length = safe_sqrt(square(mean, axes)).reshape(-1)
    left = jnp.stack([unit - mean for unit in units])  # (models, *shape)
    contract = tuple(1 + a for a in axes)
    batch = tuple(1 + a for a in range(mean.ndim) if a not in axes)
    gram = jax.lax.dot_general(
        left, left, ((contract, contract), (batch, batch)), precision="highest"
    ).reshape(-1, len(units), len(units))
    own = jnp.diagonal(gram, axis1=1, axis2=2)
    squares = jnp.maximum(own[:, :, None] + own[:, None, :] - 2 * gram, 0)
    return jnp.stack([n.reshape(-1) for n in norms]), length, squares


def angle(apart: jax.Array, together: jax.Array) -> jax.Array:
    """Angle between unit vectors; accurate near 0 and near π, where arc cosines are not."""
    return 2 * jnp.arctan2(safe_sqrt(apart), safe_sqrt(together))


def sine_ratio(t: jax.Array, omega: jax.Array) -> jax.Array:
    """sin(tΩ) / sin Ω, which tends to t as Ω tends to 0."""
    small = omega < _SMALL
    large = jnp.where(small, 1, omega)
    series = t * (1 + (1 - t * t) * omega * omega / 6)
    return jnp.where(small, series, jnp.sin(t * large) / jnp.sin(large))


@functools.partial(jax.jit, static_argnames=("interpolate_norm", "lerp_cosine"))
def slerp_factors(
    found: Arcs,
    t: jax.Array,
    *,
    interpolate_norm: bool = False,
    lerp_cosine: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Factors of two models in their spherical interpolation.

    Args:
      found: Of their vectors.
      t: Scalar; 0 is the first model.
      interpolate_norm: Whether directions are interpolated, and scaled to the interpolated norm;
        otherwise the factors that directions would have are used for the vectors as they are.
      lerp_cosine: Interpolates linearly where |cos Ω| is larger.

    Returns:
      Factors `(2, vectors)`, and whether any two vectors are antipodal. Antipodal and zero vectors
      are interpolated linearly.
    """
    omega = angle(found.apart, found.together)
    zero = (found.first == 0) | (found.second == 0)
    antipodal = (omega > _ANTIPODAL) & ~zero
    linear = zero | antipodal
    if lerp_cosine is not None:
        linear = linear | (jnp.abs(1 - found.apart / 2) > lerp_cosine)
    omega = jnp.where(linear, 0, omega)
    factors = jnp.stack(
        [
            jnp.where(linear, 1 - t, sine_ratio(1 - t, omega)),
            jnp.where(linear, t, sine_ratio(t, omega)),
        ]
    )
    if interpolate_norm:
        size = (1 - t) * found.first + t * found.second
        norms = jnp.stack([found.first, found.second])
        factors = factors * jnp.where(linear[None], 1, size[None] * safe_inverse(norms))
    return factors, jnp.any(antipodal)


@functools.partial(jax.jit, static_argnames=("axes", "deltas", "output", "dtype"))
def weighted_sum(
    base: Any,
    models: list[Any],
    factors: jax.Array,
    key: jax.Array | None,
    *,
    axes: tuple[int, ...],
    deltas: bool,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Sums models, each vector with a factor of its own.

    Args:
      base: The tree's leaf.
      models: The models' leaves.
      factors: `(models, vectors)`.
      key: Where rounding draws random numbers.
      axes: Along which a vector runs.
      deltas: Whether differences to the base are summed, and added to it.
      output: How the result is stored.
      dtype: Of the result.

    Returns:
      The stored sum, and whether it is finite.
    """
    vectors = vectors_of(base, models, deltas=deltas)
    kept = tuple(1 if a in axes else n for a, n in enumerate(vectors[0].shape))
    total = sum(x * f.reshape(kept) for x, f in zip(vectors, factors, strict=True))
    if deltas:
        total = jnp.asarray(base).astype(vectors[0].dtype) + total
    stored = output.store(jnp.asarray(total), dtype, key)
    return stored, all_finite(stored)
