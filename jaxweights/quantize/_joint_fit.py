"""Fits the three parts of one leaf in turns: quantized, sparse and low-rank."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.core._stored import stored_as
from jaxweights.quantize._low_rank_of import low_rank_of
from jaxweights.quantize._output_error import output_errors
from jaxweights.quantize._unit import unit_of
from jaxweights.weights._axes import View
from jaxweights.weights._low_rank import LowRank
from jaxweights.weights._outliers import Outliers
from jaxweights.weights._weight import materialize


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fitted, static under `jit`."""

    rank: int
    outliers: float
    sweeps: int
    weighted: bool
    scaling: float
    dtype: Any

    def count(self, view: View) -> int:
        """Outliers of one matrix."""
        return round(self.outliers * view.in_dim * view.out_dim)


class _Parts(NamedTuple):
    """The parts of a leaf; arrays have the stack axes in front."""

    base: Any
    values: jax.Array
    index: jax.Array
    down: jax.Array
    up: jax.Array


def fit_leaf(
    leaf: jax.Array, quantize: Any, gram: jax.Array | None, view: View, settings: Settings
) -> Any:
    """The leaf as the sum of its parts, those of the turn that errs least for each matrix.

    Args:
      leaf: A dense weight.
      quantize: Makes the quantized part of an array like the leaf.
      gram: `(*stack, in, in)`; None weighs all inputs alike.
      view: Its matrices.
      settings: What is fitted.

    Returns:
      The quantized part under `Outliers` and `LowRank`, as far as these are asked for.
    """

    def turn(parts: _Parts) -> tuple[_Parts, jax.Array]:
        parts, target = _split_off(leaf, parts, gram, view=view, settings=settings)
        parts = parts._replace(base=_cast(quantize(target), np.dtype(jnp.float32)))
        return _correct(leaf, parts, gram, view=view, settings=settings)

    parts, error = best, least = turn(_empty(leaf, view, settings))
    for _ in range(settings.sweeps - 1):
        parts, error = turn(parts)
        best, least = _better(parts, error, best, least)
    weight = _cast(best.base, leaf.dtype)
    if settings.count(view):
        weight = Outliers.over(weight, best.values, best.index, view=view)
    if settings.rank:
        up = (best.up.astype(jnp.float32) / settings.scaling).astype(settings.dtype)
        weight = LowRank.over(weight, best.down, up, scaling=settings.scaling, view=view)
    return weight


def _empty(leaf: jax.Array, view: View, settings: Settings) -> _Parts:
    stack = tuple(leaf.shape[a] for a in view.stack_axes(leaf.ndim))
    count, rank, dtype = settings.count(view), settings.rank, settings.dtype
    return _Parts(
        base=None,
        values=jnp.zeros((*stack, count), dtype),
        index=jnp.full((*stack, count), view.in_dim * view.out_dim, jnp.int32),
        down=jnp.zeros((*stack, view.in_dim, rank), dtype),
        up=jnp.zeros((*stack, rank, view.out_dim), dtype),
    )


@functools.partial(jax.jit, static_argnames=("view", "settings"))
def _split_off(
    leaf: jax.Array, parts: _Parts, gram: jax.Array | None, *, view: View, settings: Settings
) -> tuple[_Parts, jax.Array]:
    """Chooses the outliers, and gives what is left for the quantizer, of the leaf's shape."""
    rest = view.to_matrix(leaf).astype(jnp.float32) - _product(parts)
    count = settings.count(view)
    if not count:
        return parts, view.from_matrix(rest)
    importance = None if gram is None else jnp.diagonal(_reached(gram), axis1=-2, axis2=-1)
    score = jnp.abs(rest / unit_of(rest))
    if importance is not None:
        score = score * jnp.sqrt(importance)[..., None]

    def pick(one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest, score = (x.reshape(-1) for x in one)
        index = jnp.sort(jax.lax.top_k(score, count)[1]).astype(jnp.int32)
        return stored_as(rest[index], settings.dtype), index

    values, index = map_over_stack(pick, (rest, score), rest.shape[:-2])
    parts = parts._replace(values=values, index=index)
    return parts, view.from_matrix(rest - _sparse(parts, view))


@functools.partial(jax.jit, static_argnames=("view", "settings"))
def _correct(
    leaf: jax.Array, parts: _Parts, gram: jax.Array | None, *, view: View, settings: Settings
) -> tuple[_Parts, jax.Array]:
    """Finds the low-rank part for the residual, and each matrix's error, of the stack's shape."""
    base = view.to_matrix(materialize(parts.base)).astype(jnp.float32)
    matrix = view.to_matrix(leaf).astype(jnp.float32)
    residual = matrix - base - _sparse(parts, view)

    def one(given: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, ...]:
        matrix, residual, gram = given
        gram = None if gram is None else _reached(gram)
        down, up = low_rank_of(residual, gram, rank=settings.rank)
        down, up = stored_as(down, settings.dtype), stored_as(up, settings.dtype)
        left = residual - jnp.matmul(
            down.astype(jnp.float32), up.astype(jnp.float32), precision="highest"
        )
        moments = jnp.ones(len(left)) if gram is None else gram
        return down, up, jnp.sum(output_errors(left / unit_of(matrix), moments))

    down, up, error = map_over_stack(one, (matrix, residual, gram), residual.shape[:-2])
    return parts._replace(down=down, up=up), error


def _reached(gram: jax.Array) -> jax.Array:
    """Gram matrices `(*stack, in, in)`; the identity in place of those that no token reached."""
    total = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return jnp.where(total == 0, identity, gram)


def _product(parts: _Parts) -> jax.Array:
    down, up = parts.down.astype(jnp.float32), parts.up.astype(jnp.float32)
    return jnp.matmul(down, up, precision="highest")


def _sparse(parts: _Parts, view: View) -> jax.Array:
    """The outliers, `(*stack, in, out)`."""
    plain = View.of((view.in_dim, view.out_dim))
    shape = (*parts.values.shape[:-1], view.in_dim, view.out_dim)
    if not math.prod(parts.values.shape):
        return jnp.zeros(shape)
    return Outliers(jnp.zeros(shape), parts.values, parts.index, plain).sparse_part()


def _better(
    parts: _Parts, error: jax.Array, best: _Parts, least: jax.Array
) -> tuple[_Parts, jax.Array]:
    """Of each matrix the parts that err less."""
    better = error < least
    pick = lambda new, old: jnp.where(  # noqa: E731
        better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old
    )
    return jax.tree.map(pick, parts, best), jnp.where(better, error, least)


def _cast(base: Any, dtype: Any) -> Any:
    """The same parts, materialising to another dtype."""
    cast = base.astype(dtype)
    return base if cast is None else cast
