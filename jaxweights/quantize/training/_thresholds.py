"""Where weights lie on their grid: their level, and how far the next threshold is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core._apply import LayoutLike, apply
from jaxweights.core._paths import Flat, Params, flatten
from jaxweights.core._transform import Transform
from jaxweights.quantize.training._lsq import settle
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._learned_step import LearnedStep
from jaxweights.weights._masked import Masked
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._quantized_product import QuantizedProduct
from jaxweights.weights._rounded_inputs import RoundedInputs
from jaxweights.weights._trits import Trits

Quantizer = Transform | Callable[[Params], Params]


def quantizer_of(asker: str, quantizer: Any, layout: LayoutLike) -> Callable[[Params], Flat]:
    """A function from parameters to the leaves that a quantizer makes of them.

    `LearnedStep` leaves are settled whatever the quantizer is.

    Raises:
      TypeError: If the quantizer is neither a transform nor a function.
    """
    if not isinstance(quantizer, Transform) and not callable(quantizer):
        raise TypeError(
            f"{asker}: quantizer={quantizer!r} is a {type(quantizer).__name__}. Pass the "
            "transform that fake_quant uses, or a function from parameters to quantized ones, "
            "such as settle."
        )

    def leaves(params: Params) -> Flat:
        if isinstance(quantizer, Transform):
            return flatten(apply(quantizer, params, layout=layout))[0]
        return flatten(settle(quantizer(params)))[0]

    return leaves


def grid_of(leaf: Any) -> Quantized | Codebook | None:
    """The part of a leaf that has codes; None where there is none."""
    if isinstance(leaf, RoundedInputs):
        leaf = leaf.weight_only()
    if isinstance(leaf, Masked):
        leaf = leaf.base
    if isinstance(leaf, QuantizedProduct):
        leaf = leaf.weight_only()
    if isinstance(leaf, Trits):
        leaf = leaf.quantized()
    return leaf if isinstance(leaf, Quantized | Codebook) else None


def latent_matrix(leaf: Any, grid: Quantized | Codebook) -> jax.Array:
    """The unrounded weights that a grid was made of, `(*stack, in, out)` float32."""
    if isinstance(leaf, LearnedStep):
        return leaf.latent.astype(jnp.float32)
    return grid.view.to_matrix(leaf).astype(jnp.float32)


def levels_of(grid: Quantized | Codebook) -> jax.Array:
    """The level of every entry in units of its scale's size, `(*stack, in, out)` float32.

    Codes would not do: where scales are negative a larger code is a smaller weight.
    """
    return grid.units() * jnp.sign(_scale_of_entries(grid))


def threshold_distance(latent: jax.Array, grid: Quantized | Codebook) -> jax.Array:
    """How far every entry is from the nearest threshold between two levels, in steps.

    Args:
      latent: `(*stack, in, out)` float32.
      grid: What it was rounded to.

    Returns:
      Of the shape of `latent`: a share of the distance of the two levels. Thresholds lie halfway
      between levels that exist; beyond the last ones there is none. The lowest level of a signed
      grid exists where any entry has it, since "narrow" grids leave it out. On signed grids of 2
      bits, levels and thresholds are read off the entries: see `_distance_on_few_levels`.
    """
    scale = _scale_of_entries(grid)
    offset = _offset_of_entries(grid)
    place = (latent if offset is None else latent - offset) / jnp.where(scale == 0, 1, scale)
    if isinstance(grid, Codebook):
        return _distance_to_table(place, jnp.sort(grid.table, axis=-1))
    signed = grid.zero_point is None and grid.offset is None
    if signed and grid.bits == 2:
        return _distance_on_few_levels(place, grid)
    smallest: Any = 0
    largest = 2**grid.bits - 1
    if grid.zero_point is not None:
        # codes minus zero points: what `place` counts in
        zero = grid.codes_matrix().astype(jnp.float32) - grid.units()
        place = place + zero
    elif signed:
        smallest, largest = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
        lowest = grid.codes_matrix() == smallest
        smallest = jnp.where(jnp.any(lowest, axis=(-2, -1), keepdims=True), smallest, smallest + 1)
    nearest = jnp.maximum(jnp.minimum(jnp.round(place - 0.5), largest - 1), smallest) + 0.5
    return jnp.abs(place - nearest)


def _distance_on_few_levels(place: jax.Array, grid: Quantized) -> jax.Array:
    """As `threshold_distance`, on signed grids of 2 bits, which `ternary` and `binary` write too.

    Their levels are not all used, and what is rounded at differs from halfway where a mean is taken
    away first or a scale is fitted afterwards. So a level is left out that no entry of the matrix
    has, unless it is an inner one that stands at an end of those in use; and a threshold that is
    not where the entries on either side of it are divided lies halfway between those.
    """
    codes = grid.codes_matrix().astype(jnp.int32)
    any_is = lambda code: jnp.any(codes == code, axis=(-2, -1), keepdims=True)  # noqa: E731
    lowest = any_is(-2)
    split = any_is(-1) & any_is(1) & ~any_is(0) & ~lowest  # two levels, 0 not among them
    axes = (-2, -1) if grid.scale.shape[-1] == 1 else (-2,)
    distance = jnp.full(place.shape, jnp.inf, jnp.float32)
    for below, above, exists in ((-2, -1, lowest), (-1, 0, ~split), (0, 1, ~split), (-1, 1, split)):
        low = jnp.max(jnp.where(codes <= below, place, -jnp.inf), axes, keepdims=True)
        high = jnp.min(jnp.where(codes >= above, place, jnp.inf), axes, keepdims=True)
        middle = (below + above) / 2
        threshold = jnp.where((low <= middle) & (middle <= high), middle, (low + high) / 2)
        here = jnp.abs(place - threshold) / (above - below)
        distance = jnp.minimum(distance, jnp.where(exists, here, jnp.inf))
    return distance


def _distance_to_table(place: jax.Array, levels: jax.Array) -> jax.Array:
    """As `threshold_distance`, to the midpoints of `(*stack, levels)` ascending levels."""
    spread = levels[..., None, None, :]  # (*stack, 1, 1, levels)

    def attempt(i: jax.Array, best: jax.Array) -> jax.Array:
        lower = jax.lax.dynamic_index_in_dim(spread, i, axis=-1, keepdims=False)
        upper = jax.lax.dynamic_index_in_dim(spread, i + 1, axis=-1, keepdims=False)
        gap = upper - lower
        # Two levels that are one have no threshold between them.
        distance = jnp.abs(place - (lower + upper) / 2) / jnp.where(gap == 0, 1, gap)
        return jnp.minimum(best, jnp.where(gap == 0, jnp.inf, distance))

    start = jnp.full(place.shape, jnp.inf, jnp.float32)
    return jax.lax.fori_loop(0, levels.shape[-1] - 1, attempt, start)


def _scale_of_entries(grid: Quantized | Codebook) -> jax.Array:
    """The scale of every entry, `(*stack, in, out)` float32."""
    if isinstance(grid, Codebook):
        ones = dataclasses.replace(grid, table=jnp.ones_like(grid.table), offset=None)
    else:
        ones = all_ones(grid)
    return ones.astype(jnp.float32).matrix()  # type: ignore[union-attr]


def _offset_of_entries(grid: Quantized | Codebook) -> jax.Array | None:
    if grid.offset is None:
        return None
    if isinstance(grid, Codebook):
        none = dataclasses.replace(grid, table=jnp.zeros_like(grid.table))
    else:
        zero = jnp.zeros(grid.codes.shape, grid.codes.dtype)
        none = dataclasses.replace(grid, codes=zero)
    return none.astype(jnp.float32).matrix()  # type: ignore[union-attr]


def all_ones(grid: Quantized) -> Quantized:
    """A grid whose every entry is one step: the scale, with its sign."""
    shape = (*grid.codes.shape[:-2], grid.in_dim, grid.out_dim)
    codes = jnp.ones(shape, jnp.int8)
    return dataclasses.replace(
        grid, codes=codes, zero_point=None, offset=None, codes_per_byte=1, bits=8
    )
