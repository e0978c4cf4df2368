"""The searches of AWQ: the scale that protects salient inputs, and the range that errs least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.quantize._folds import Fold
from jaxweights.quantize._grid import (
    Codes,
    Grid,
    decode,
    encode,
    find_scale,
    join_groups,
    round_matrix,
    split_groups,
)
from jaxweights.quantize._output_error import output_errors
from jaxweights.quantize._unit import unit_of

Duo = bool | Literal["both"]

STEPS = 20  # ratios 0, 1/20, ... 19/20; and ranges of 1, 19/20, ... of the full one
_SHRINKS = 10  # down to 11/20
_LEAST = 1e-4  # of the authors, for scales and for what they are divided by


class ScaleChoice(NamedTuple):
    """What `search_scale` found.

    Attributes:
      scale: What input rows are multiplied by, `(written,)` float32.
      losses: Of all candidates, `(candidates,)` float32.
    """

    scale: Float[Array, " written"]
    losses: Float[Array, " candidates"]


def candidate_scales(
    input_mean: Float[Array, "in"], weight_mean: Float[Array, "in"] | None, *, duo: Duo = False
) -> Float[Array, "candidates in"]:
    r"""The scales that are tried.

    :math:`s = a^r` for 20 ratios r in [0, 1), or with `duo` :math:`s = a^r / w^{1-r}`, over the
    geometric mean of its extremes.

    Args:
      input_mean: a, the mean magnitude of every input.
      weight_mean: w, the mean magnitude of every input row of the weights, as a fraction of the
        largest in its group; needed for `duo`.
      duo: Whether weights count too; "both" tries the one and then the other.

    Returns:
      `(20, in)`, or `(40, in)` for "both", float32. All are 1 where no input was seen.

    Example:
      >>> candidate_scales(jnp.array([4.0, 1.0]), None)[10].round(2)
      Array([1.41, 0.71], dtype=float32)
    """
    ratios = jnp.arange(STEPS, dtype=jnp.float32)[:, None] / STEPS
    power = input_mean.astype(jnp.float32)[None] ** ratios
    kinds = []
    if duo is not True:
        kinds.append(power)
    if duo:
        assert weight_mean is not None
        kinds.append(power / (weight_mean.astype(jnp.float32)[None] ** (1 - ratios) + _LEAST))
    scales = jnp.maximum(jnp.concatenate(kinds), _LEAST)
    low = jnp.min(scales, axis=1, keepdims=True, initial=jnp.inf)
    high = jnp.max(scales, axis=1, keepdims=True, initial=0)
    scales = scales / jnp.sqrt(low * high)
    return jnp.where(jnp.isfinite(scales), scales, 1)


def search_scale(
    weights: Sequence[Float[Array, "in _out"]],
    moments: Float[Array, "in in"] | Float[Array, "in"],
    input_mean: Float[Array, "in"],
    grid: Grid,
    *,
    duo: Duo = False,
    fold: Fold | None = None,
) -> ScaleChoice:
    r"""The scale under which rounding changes the outputs least.

    Every candidate s is judged by :math:`\sum_W \operatorname{tr}(D^\top H D)` with
    :math:`D = Q(\operatorname{diag}(s) W) / s - W`, which is exactly the squared change of all
    outputs over the calibration tokens, at a cost that does not grow with them.

    Args:
      weights: Matrices that read the same input.
      moments: H, :math:`X^\top X`; or its diagonal alone.
      input_mean: Mean magnitude of every input.
      grid: Where the levels lie.
      duo: As in `candidate_scales`.
      fold: How the readers repeat what is written; their repeats then share a scale.

    Returns:
      The scale and all losses.
    """
    spread = (lambda x: x) if fold is None else fold.spread
    gather = (lambda x: x) if fold is None else (lambda x: fold.gather(x, jnp.mean))
    weights = [weight.astype(jnp.float32) for weight in weights]
    unit = unit_of(*weights)
    weights = [weight / unit for weight in weights]
    weight_mean = gather(_relative_size(weights, grid)) if duo else None
    candidates = candidate_scales(gather(input_mean), weight_mean, duo=duo)

    def loss(scale: jax.Array) -> jax.Array:
        rows = spread(scale)[:, None]
        changes = (rounded(weight * rows, grid) / rows - weight for weight in weights)
        return sum((jnp.sum(output_errors(d, moments)) for d in changes), jnp.float32(0))

    losses = jax.lax.map(loss, candidates)
    return ScaleChoice(candidates[jnp.argmin(losses)], losses)


def rounded(weight: jax.Array, grid: Grid) -> jax.Array:
    """A float32 matrix on the levels of its grid."""
    groups = split_groups(weight, grid)
    scale, zero = find_scale(groups, grid)
    return join_groups(decode(encode(groups, scale, zero, grid), scale, zero), weight.shape)


def _relative_size(weights: Sequence[jax.Array], grid: Grid) -> jax.Array:
    """Mean over all outputs of |w| over the largest in its group, `(in,)`."""
    total, count = jnp.zeros([], jnp.float32), 0
    for weight in weights:
        groups = jnp.abs(split_groups(weight, grid))
        largest = jnp.max(groups, axis=1, keepdims=True, initial=0)
        share = jnp.where(largest > 0, groups / jnp.where(largest > 0, largest, 1), 0)
        total = total + jnp.sum(share, axis=-1).reshape(-1)[: len(weight)]
        count += weight.shape[1]
    return total / count


def search_limits(
    weight: Float[Array, "in out"], moments: Float[Array, "in in"] | Float[Array, "in"], grid: Grid
) -> Float[Array, "rows out"]:
    r"""The largest magnitude that each group is clipped to.

    Tries 1, 0.95, ... 0.55 of a group's own largest magnitude and keeps what changes the group's
    share of the output least, :math:`d^\top H_{gg} d`.

    Args:
      weight: `(in, out)`, float32.
      moments: Gram matrix, or its diagonal.
      grid: Where the levels lie.

    Returns:
      The limits, float32.
    """
    groups = split_groups(weight, grid)  # (rows, group, out)
    rows, size, _ = groups.shape
    largest = jnp.max(jnp.abs(groups), axis=1, keepdims=True, initial=0)
    if padding := rows * size - len(weight):
        moments = jnp.pad(moments, [(0, padding)] * moments.ndim)
    if moments.ndim == 1:
        own = moments.reshape(rows, size)
    else:
        blocks = moments.reshape(rows, size, rows, size)
        own = blocks[jnp.arange(rows), :, jnp.arange(rows)]  # (rows, group, group)

    def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, limit = best
        candidate = largest * (1 - i.astype(jnp.float32) / STEPS)
        clipped = jnp.clip(groups, -candidate, candidate)
        scale, zero = find_scale(clipped, grid)
        change = decode(encode(clipped, scale, zero, grid), scale, zero) - groups
        new = output_errors(change, own)[:, None]
        better = new < error
        return jnp.where(better, new, error), jnp.where(better, candidate, limit)

    start = jnp.full_like(largest, jnp.inf), largest
    _, limit = jax.lax.fori_loop(0, _SHRINKS, attempt, start)
    return limit[:, 0]


def clip_and_round(
    weight: jax.Array, moments: jax.Array, scale: jax.Array | None, grid: Grid, *, clip: bool
) -> Codes:
    """Codes of a float32 matrix whose rows already carry a scale that the moments do not know."""
    if clip:
        if scale is not None:
            inverse = 1 / scale
            moments = moments * inverse if moments.ndim == 1 else moments * inverse[:, None]
            moments = moments * (inverse if moments.ndim == 1 else inverse[None])
        unit = unit_of(weight)
        limit = (search_limits(weight / unit, moments, grid) * unit)[:, None]
        groups = split_groups(weight, grid)
        weight = join_groups(jnp.clip(groups, -limit, limit), weight.shape)
    return round_matrix(weight, grid)
