"""Vectors on spheres: lengths and angles, factors from them, and the sum. Arrays in, arrays out.

A spherical merge is a sum of the models with one factor for each model and vector. Lengths and
angles are one compiled program for each shape of leaf and the sum is another; the factors between
them depend on few numbers, and compile once for all leaves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.merge._models import Output, all_finite, compute_dtype

# Below this angle the first two terms of the series are exact to float32.
_SMALL = 1e-3
# Sums of squares in float32 lose nothing to underflow above this; below it, vectors are lifted.
LEAST_SQUARE, _LIFT = 1e-24, 2.0**60
_ANTIPODAL = math.pi - 1e-3  # beyond it the arc between two points is not determined


class Arcs(NamedTuple):
    """Two models' vectors on the unit sphere; every field has one entry per vector."""

    first: jax.Array  # norm of the first model's
    second: jax.Array  # norm of the second's
    apart: jax.Array  # square of the distance between the two directions
    together: jax.Array  # square of the length of the sum of the two directions


class Vectors(NamedTuple):
    """What is measured: vectors of one leaf, as many of each model."""

    models: int
    count: int
    dtype: Any  # of the computation


class Length(NamedTuple):
    """One question about them: the squared lengths `(vectors,)` of a sum of some models."""

    models: tuple[int, ...]
    factors: jax.Array | np.ndarray  # (these models, vectors)


Found = TypeVar("Found")
# Asks in rounds, and gets the answers in the order of the questions. Who answers decides how: from
# a whole leaf, or from slices of one that is never held. Answers are arrays of NumPy or JAX, and
# what is made of them stays so: on few numbers, a compiled program takes far longer than NumPy.
Measuring = Generator[list[Length], list[Any], Found]


def measured(
    measuring: Measuring[Found],
    base: Any,
    models: list[Any],
    *,
    axes: tuple[int, ...],
    deltas: bool,
) -> Found:
    """What comes of measuring a leaf that is at hand.

    Args:
      measuring: What asks.
      base: The tree's leaf.
      models: The models' leaves.
      axes: Along which a vector runs.
      deltas: Whether the vectors are differences to the base.
    """
    try:
        asked = next(measuring)
        while True:
            answers = [
                squared_length(
                    base, [models[i] for i in one.models], one.factors, axes=axes, deltas=deltas
                )
                for one in asked
            ]
            asked = measuring.send(answers)
    except StopIteration as end:
        return end.value


def vectors_in(base: Any, models: int, axes: tuple[int, ...]) -> Vectors:
    """The vectors of a leaf that run along some of its axes."""
    count = math.prod(n for a, n in enumerate(jnp.shape(base)) if a not in axes)
    return Vectors(models, count, compute_dtype(base))


def vectors_of(base: Any, models: list[Any], *, deltas: bool) -> list[jax.Array]:
    """The models, or their differences to the base, in the dtype of the computation."""
    dtype = compute_dtype(base)
    wide = [jnp.asarray(x).astype(dtype) for x in models]
    if not deltas:
        return wide
    origin = jnp.asarray(base).astype(dtype)
    return [x - origin for x in wide]


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root whose gradient at zero is zero."""
    positive, xp = x > 0, x.__array_namespace__()
    return xp.where(positive, xp.sqrt(xp.where(positive, x, 1)), 0)


def safe_inverse(x: jax.Array) -> jax.Array:
    """One over x, and zero where x is zero."""
    xp = x.__array_namespace__()
    return xp.where(x != 0, 1 / xp.where(x != 0, x, 1), 0)


@functools.partial(jax.jit, static_argnames=("axes", "deltas"))
def squared_length(
    base: Any, models: list[Any], factors: Any, *, axes: tuple[int, ...], deltas: bool
) -> jax.Array:
    """Squared lengths `(vectors,)` of the models' sum, with factors `(models, vectors)`.

    One pass over the leaves, and little to compile: one program for each shape and number of
    models. Several sums in one program would share the widened leaves, and write them to memory.
    """
    vectors = vectors_of(base, models, deltas=deltas)
    total = _sum(vectors, factors, axes)
    return jnp.sum(total * total, axis=axes).reshape(-1)


def _sum(vectors: list[jax.Array], factors: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    kept = tuple(1 if a in axes else n for a, n in enumerate(vectors[0].shape))
    return jnp.asarray(sum(x * f.reshape(kept) for x, f in zip(vectors, factors, strict=True)))


def norms_of(vectors: Vectors) -> Measuring[list[jax.Array]]:
    """Norms `(vectors,)` of each model's vectors."""
    one = np.ones((1, vectors.count), vectors.dtype)
    plain = yield [Length((i,), one) for i in range(vectors.models)]
    norms = [safe_sqrt(square) for square in plain]
    tiny = [square < LEAST_SQUARE for square in plain]
    lifting = [i for i, flags in enumerate(tiny) if _may_hold(flags)]
    if lifting:
        lifted = yield [Length((i,), _LIFT * one) for i in lifting]
        for i, square in zip(lifting, lifted, strict=True):
            xp = square.__array_namespace__()
            norms[i] = xp.where(tiny[i], safe_sqrt(square) / _LIFT, norms[i])
    return norms


def _may_hold(flags: jax.Array) -> bool:
    """Whether any flag holds; yes, where values cannot be looked at."""
    return isinstance(flags, Tracer) or bool(flags.any())


def arcs(vectors: Vectors) -> Measuring[Arcs]:
    """Lengths and distances of two models' vectors."""
    norms = yield from norms_of(vectors)
    a, b = (safe_inverse(n) for n in norms)
    xp = a.__array_namespace__()
    [apart] = yield [Length((0, 1), xp.stack([a, -b]))]
    # The two squares sum to 4. Only near π, where the second nearly vanishes, is it summed itself.
    together = xp.maximum(4 - apart, 0)
    near = apart > 3
    if _may_hold(near):
        [summed] = yield [Length((0, 1), xp.stack([a, b]))]
        together = xp.where(near, summed, together)
    return Arcs(norms[0], norms[1], apart, together)


def mean_direction(vectors: Vectors, shares: jax.Array) -> Measuring[tuple[jax.Array, jax.Array]]:
    """Norms of the models' vectors `(models, vectors)`, and of the weighted sum of directions."""
    found = yield from norms_of(vectors)
    norms = found[0].__array_namespace__().stack(found)
    factors = shares[:, None] * safe_inverse(norms)
    [square] = yield [Length(tuple(range(vectors.models)), factors)]
    return norms, safe_sqrt(square)


def chords(vectors: Vectors, norms: jax.Array) -> Measuring[jax.Array]:
    """Squared distances between the models' directions, `(vectors, models, models)`.

    Args:
      vectors: What is measured.
      norms: As `mean_direction` gives them.
    """
    scale, n = safe_inverse(norms), vectors.models
    pairs = [(i, j) for i in range(n) for j in range(i)]
    squares = []
    if pairs:
        squares = yield [Length((i, j), jnp.stack([scale[i], -scale[j]])) for i, j in pairs]
    found = [[jnp.zeros_like(norms[0])] * n for _ in range(n)]
    for (i, j), square in zip(pairs, squares, strict=True):
        found[i][j] = found[j][i] = square
    return jnp.stack([jnp.stack(row, axis=-1) for row in found], axis=-2)


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
      t: Number; 0 is the first model.
      interpolate_norm: Whether directions are interpolated, and scaled to the interpolated norm;
        otherwise the factors that directions would have are used for the vectors as they are.
      lerp_cosine: Interpolates linearly where |cos Ω| is larger.

    Returns:
      Factors `(2, vectors)`, and whether any two vectors are antipodal. Antipodal and zero vectors
      are interpolated linearly.
    """
    t = jnp.asarray(t, found.first.dtype)
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
        # The ends of the arc are exact also where a device's x / x is not 1.
        same = linear[None] | (norms == size[None])
        factors = factors * jnp.where(same, 1, size[None] / jnp.where(norms > 0, norms, 1))
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
    total = _sum(vectors, factors, axes)
    if deltas:
        total = jnp.asarray(base).astype(vectors[0].dtype) + total
    stored = output.store(total, dtype, key)
    return stored, all_finite(stored)
