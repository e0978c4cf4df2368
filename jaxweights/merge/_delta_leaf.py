"""The generalized delta merge of one leaf: arrays in, arrays out; no trees, no names."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._rank_search import magnitude_bits
from jaxweights.core._select import largest, smallest_of_leaves
from jaxweights.merge._models import Output, all_finite, check_choice, compute_dtype

Sparsifier = Literal["none", "magnitude", "outliers", "bernoulli", "ranked"]
Rescale = Literal["none", "inverse_density", "l1", "l2", "linf"]
Consensus = Literal["none", "sum"]
Combine = Literal["sum", "max"]
Normalize = Literal["none", "models", "entries"]
SignTies = Literal["positive", "majority"]
Scope = Literal["row", "leaf", "tree"]
Compat = Literal["paper", "mergekit"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "sparsifier": ("none", "magnitude", "outliers", "bernoulli", "ranked"),
    "rescale": ("none", "inverse_density", "l1", "l2", "linf"),
    "consensus": ("none", "sum"),
    "combine": ("sum", "max"),
    "normalize": ("none", "models", "entries"),
    "sign_ties": ("positive", "majority"),
    "scope": ("row", "leaf", "tree"),
    "compat": ("paper", "mergekit"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """The choices that make a method; hashable."""

    sparsifier: Sparsifier
    rescale: Rescale
    consensus: Consensus
    combine: Combine
    normalize: Normalize
    sign_ties: SignTies
    scope: Scope
    compat: Compat

    def __post_init__(self) -> None:
        """Refuses a choice that the table does not have."""
        for field in dataclasses.fields(self):
            check_choice(
                "merge.delta_merge", field.name, getattr(self, field.name), _CHOICES[field.name]
            )

    @property
    def asks_majority(self) -> bool:
        """Whether the sign of entries whose sum is zero comes from all other entries."""
        return self.consensus == "sum" and self.sign_ties == "majority"

    @property
    def mixes_entries(self) -> bool:
        """Whether entries of one matrix depend on each other, so that stack axes matter."""
        if self.sparsifier == "ranked" or self.rescale in ("l1", "l2", "linf"):
            return True
        ranks = self.sparsifier in ("magnitude", "outliers")
        return (ranks or self.asks_majority) and self.scope != "tree"

    @property
    def drops_entries(self) -> bool:
        """Whether a delta that is NaN may be dropped, so that the result alone proves nothing."""
        return self.sparsifier != "none" or self.consensus != "none"

    @property
    def draws(self) -> bool:
        """Whether it drops entries by chance."""
        return self.sparsifier in ("bernoulli", "ranked")


class LeafPlan(NamedTuple):
    """What is static about the merge of one leaf; hashable: equal leaves share a program."""

    stack: tuple[int, ...]
    drops: tuple[bool, ...]  # per model: whether entries are dropped by chance
    ranked: tuple[int, ...] = ()  # axes of the inputs of one output, among which chances rank


class LeafInputs(NamedTuple):
    """What is an array about it."""

    weights: jax.Array  # (models,), in the dtype of the computation
    density: jax.Array  # (models,)
    keys: tuple[jax.Array | None, ...]
    masks: tuple[jax.Array | None, ...]  # per model: what ranking keeps; None keeps all
    epsilon: jax.Array | None = None  # (models,), where chances rank


@functools.partial(jax.jit, static_argnames=("i", "row", "plan"))
def ranked_values(
    base: Any, model: Any, inputs: LeafInputs, i: int, row: Row, plan: LeafPlan
) -> jax.Array:
    """What is ranked of one model: its delta, thinned by chance where that comes first."""
    return _before_ranking(delta_of(base, model), inputs, i, row, plan).astype(jnp.float32)


def mask_of_leaf(values: jax.Array, skip: int, keep: int, stack: tuple[int, ...]) -> jax.Array:
    """Drops the `skip` largest entries of each matrix, and keeps the next `keep`.

    One program serves all models, counts and methods.
    """
    mask = _largest(values, np.uint32(skip + keep), stack)
    return mask & ~_largest(values, np.uint32(skip), stack) if skip else mask


@functools.partial(jax.jit, static_argnums=2)
def _largest(values: jax.Array, k: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    if values.size == 0:
        return jnp.ones(values.shape, bool)
    if not stack:
        return largest(values, k)
    return from_rows(largest(to_rows(values, stack), k, axis=1), values.shape, stack)


def masks_of_tree(values: list[jax.Array], skip: int, keep: int) -> list[jax.Array]:
    """Drops the `skip` largest entries of all leaves together, and keeps the next `keep`."""
    # The largest magnitudes are those whose patterns, counted from the top, are smallest.
    turned = [_turn(x) for x in values]
    masks = smallest_of_leaves(turned, skip + keep)
    if not skip:
        return masks
    return [m & ~top for m, top in zip(masks, smallest_of_leaves(turned, skip), strict=True)]


@jax.jit
def _turn(x: jax.Array) -> jax.Array:
    top = jnp.uint32(0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(top - magnitude_bits(x), jnp.float32)


@functools.partial(jax.jit, static_argnames=("row", "plan"))
def sign_sum(
    base: Any, models: list[Any], inputs: LeafInputs, *, row: Row, plan: LeafPlan
) -> jax.Array:
    """Sum of the elected signs of one leaf."""
    deltas = [_sparse_delta(delta_of(base, m), inputs, i, row, plan) for i, m in enumerate(models)]
    signs = jnp.sign(sum(_weighted(deltas, inputs))).astype(jnp.int32)
    # As integers: a float32 sum of ones stands still at 2**24, which large embeddings exceed.
    return jnp.sum(signs).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("row", "plan", "output", "dtype"))
def merge_delta_leaf(
    base: Any,
    models: list[Any],
    inputs: LeafInputs,
    scale: jax.Array,
    sign: jax.Array | None,
    key: jax.Array | None,
    *,
    row: Row,
    plan: LeafPlan,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """The table, for one leaf: merged values, and whether everything was finite."""
    deltas = [delta_of(base, model) for model in models]
    sparse = [_sparse_delta(delta, inputs, i, row, plan) for i, delta in enumerate(deltas)]
    merged = add_deltas(base, sparse, inputs.weights, scale, row=row, plan=plan, sign=sign)
    stored = output.store(merged, dtype, key)
    return stored, all_finite(stored, *(deltas if row.drops_entries else ()))


def add_deltas(
    base: Any,
    deltas: list[jax.Array],
    weights: jax.Array,
    scale: jax.Array,
    *,
    row: Row,
    plan: LeafPlan,
    sign: jax.Array | None,
) -> jax.Array:
    """The base with thinned deltas: weighted, elected, combined and normalised.

    Args:
      base: One leaf, or a slice of it.
      deltas: What thinning and rescaling left of each model's.
      weights: `(models,)`, in the dtype of the computation.
      scale: λ.
      row: The method's row of the table.
      plan: Of the leaf.
      sign: Sum of the elected signs of all entries, where it decides about those that tie; None
        sums up those of the leaf.

    Returns:
      The merged values, in the dtype of the computation.
    """
    weighted = [weights[i] * delta for i, delta in enumerate(deltas)]
    takes_part = _takes_part(weighted, row, plan, sign)
    merged = _combine([jnp.where(m, d, 0) for m, d in zip(takes_part, weighted, strict=True)], row)
    if row.normalize != "none":
        merged = merged / _divisor(takes_part, weights, row)
    return base.astype(merged.dtype) + scale * merged


def delta_of(base: Any, model: Any) -> jax.Array:
    """A model's difference to the base, in the dtype of the computation."""
    dtype = compute_dtype(base)
    return jnp.asarray(model).astype(dtype) - jnp.asarray(base).astype(dtype)


def _before_ranking(
    delta: jax.Array, inputs: LeafInputs, i: int, row: Row, plan: LeafPlan
) -> jax.Array:
    if not plan.drops[i]:
        return delta
    key = inputs.keys[i]
    assert key is not None
    chance = inputs.density[i]
    if inputs.epsilon is not None:
        share = rank_shares(delta, plan.ranked).astype(chance.dtype)
        chance = chance - inputs.epsilon[i] + 2 * inputs.epsilon[i] * share
    mask = jax.random.bernoulli(key, chance.astype(jnp.float32), delta.shape)
    return _rescaled(jnp.where(mask, delta, 0), delta, chance, row, plan)


def rank_shares(delta: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Rank of each magnitude among those along some axes, from 0 for the smallest to 1.

    Equal magnitudes share the mean of their ranks, and an entry that is alone has 1/2; so the mean
    is 1/2 everywhere.
    """
    others = tuple(a for a in range(delta.ndim) if a not in axes)
    bits = to_rows(magnitude_bits(delta.astype(jnp.float32)), others)
    n = bits.shape[1]
    # Sorting values alone and searching them is twice as fast as sorting their places too.
    in_order = jax.lax.sort(bits, dimension=1)
    last = jnp.pad(in_order[:, 1:] != in_order[:, :-1], [(0, 0), (0, 1)], constant_values=True)
    place = jnp.arange(n, dtype=jnp.int32)[None]
    run_ends = jax.lax.cummin(jnp.where(last, place, n), axis=1, reverse=True)
    first = jax.vmap(jnp.searchsorted)(in_order, bits)
    both = first + jnp.take_along_axis(run_ends, first, axis=1)  # first and last rank of equals
    share = both.astype(jnp.float32) / (2 * (n - 1)) if n > 1 else jnp.full(bits.shape, 0.5)
    return from_rows(share, delta.shape, others)


def _sparse_delta(
    delta: jax.Array, inputs: LeafInputs, i: int, row: Row, plan: LeafPlan
) -> jax.Array:
    before = _before_ranking(delta, inputs, i, row, plan)
    mask = inputs.masks[i]
    if mask is None:
        return before
    after = jnp.where(mask, before, 0)
    trims = row.sparsifier == "bernoulli"
    return after if trims else _rescaled(after, delta, inputs.density[i], row, plan)


def _rescaled(
    kept: jax.Array, delta: jax.Array, chance: jax.Array, row: Row, plan: LeafPlan
) -> jax.Array:
    if row.rescale == "none":
        return kept
    if row.rescale == "inverse_density":
        return kept / chance
    axes = tuple(a for a in range(delta.ndim) if a not in plan.stack)
    left = _norm(kept, axes, row.rescale)
    factor = jnp.where(left > 0, _norm(delta, axes, row.rescale) / jnp.where(left > 0, left, 1), 1)
    return kept * factor


def _norm(x: jax.Array, axes: tuple[int, ...], kind: Rescale) -> jax.Array:
    """Norm of each matrix, scaled so that squares of tiny deltas do not vanish."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    if kind == "linf":
        return largest
    if kind == "l1":
        return jnp.sum(jnp.abs(x), axis=axes, keepdims=True)
    unit = x / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(unit * unit, axis=axes, keepdims=True))


def _weighted(deltas: list[jax.Array], inputs: LeafInputs) -> list[jax.Array]:
    return [inputs.weights[i] * delta for i, delta in enumerate(deltas)]


def _takes_part(
    weighted: list[jax.Array], row: Row, plan: LeafPlan, sign: jax.Array | None
) -> list[jax.Array]:
    """Which entries of each delta count."""
    if row.consensus == "none":
        if row.normalize == "entries":
            return [delta != 0 for delta in weighted]
        return [jnp.ones(delta.shape, bool) for delta in weighted]
    total = jnp.asarray(sum(weighted))
    if row.asks_majority and sign is None:
        axes = tuple(a for a in range(total.ndim) if a not in plan.stack)
        sign = jnp.sum(jnp.sign(total), axis=axes, keepdims=True)
    lowers = total < 0
    if sign is not None:
        lowers = lowers | ((total == 0) & (sign < 0))
    return [jnp.where(lowers, delta < 0, delta > 0) for delta in weighted]


def _combine(deltas: list[jax.Array], row: Row) -> jax.Array:
    if row.combine == "sum":
        return sum(deltas[1:], start=deltas[0])
    merged = deltas[0]
    for delta in deltas[1:]:
        merged = jnp.where(jnp.abs(delta) > jnp.abs(merged), delta, merged)
    return merged


def _divisor(takes_part: list[jax.Array], weights: jax.Array, row: Row) -> jax.Array:
    """Sum of |w|, over all models or over those that take part; 1 where none does."""
    sizes = jnp.abs(weights)
    if row.normalize == "models":
        return jnp.sum(sizes)
    total = sum(jnp.where(part, sizes[i], 0) for i, part in enumerate(takes_part))
    return jnp.where(jnp.asarray(total) > 0, total, 1)


def to_rows(x: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    """`(stack, entries)`, entries in the leaf's own order."""
    rows = math.prod(x.shape[a] for a in stack)
    return jnp.moveaxis(x, stack, range(len(stack))).reshape(rows, -1)


def from_rows(rows: jax.Array, shape: tuple[int, ...], stack: tuple[int, ...]) -> jax.Array:
    rest = [n for a, n in enumerate(shape) if a not in stack]
    moved = rows.reshape(*(shape[a] for a in stack), *rest)
    return jnp.moveaxis(moved, range(len(stack)), stack)
