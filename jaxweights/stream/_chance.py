"""Delta merges that drop by chance, with the draws of `merge.delta_merge`, slice by slice.

DELLA ranks within the inputs of one output, so that a slice of whole rows is all it takes; where a
norm is restored, those of each layer are surveyed first, and then, where the sign of most entries
decides about ties, what they elect.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._delta import DeltaMerge
from jaxweights.merge._delta_leaf import LeafPlan, Rescale, Row, add_deltas, delta_of
from jaxweights.merge._models import compute_dtype, model_key, per_model
from jaxweights.stream._grouping import Grouping
from jaxweights.stream._jobs import Job, Survey
from jaxweights.stream._leaf import Leaf
from jaxweights.stream._norm_sums import norms_of_runs, run_norms
from jaxweights.stream._program import slice_program
from jaxweights.stream._row_ranks import row_ranks
from jaxweights.stream._signs import Signs
from jaxweights.stream._store import checked, stored
from jaxweights.stream._surveys import InTurn, OfBlocks

# Bits of draws that are kept from the survey of a tensor until it is made; more are drawn anew.
_MOST_KEPT = 1 << 28
_LEAST_RUN = 1 << 12  # entries that are summed together, at least


def chance_job(leaf: Leaf, merge: DeltaMerge) -> Job | None:
    """The job that merges a leaf as `merge.delta_merge` does.

    Args:
      leaf: The leaf.
      merge: What is done.

    Returns:
      The job; None where only the whole leaf can be merged.
    """
    row, name = merge.row, leaf.name
    if not _can_slice(merge):
        return None
    matrices = leaf.matrices(merge.name) if row.mixes_entries else Grouping(1, leaf.entries, 1)
    ranked = row.sparsifier == "ranked"
    rows = leaf.grouping(merge.name, "output") if ranked else Grouping(1, 1, 1)
    if matrices is None or rows is None:
        return None
    draws = _Draws.of(leaf, merge, rows)
    survey = None
    restores = row.rescale in ("l1", "l2", "linf")
    keeps = restores and leaf.entries * len(draws.drops) <= _MOST_KEPT
    n = len(leaf.operands) - 1
    numbers = _Numbers(
        *(np.asarray(x, draws.wide) for x in (draws.weights, draws.density, draws.epsilon)),
        factors=np.ones(n, draws.wide),
        scale=np.asarray(merge.scale, draws.wide),
    )

    def thinning(arrays: Sequence[Any], start: int, norms: _Norms | None) -> _Thinning:
        size, own, masks = arrays[0].size, numbers, None
        if norms is not None:
            own = dataclasses.replace(numbers, factors=np.asarray(norms.factors(), draws.wide))
            masks = norms.kept(start, size)
        needs = masks is None or row.rescale == "inverse_density"
        ranks = draws.ranks(arrays) if needs else (None,) * n
        masks = draws.masks(start, size, ranks) if masks is None else masks
        return _Thinning(masks, ranks if row.rescale == "inverse_density" else (None,) * n, own)

    how = {"row": row, "along": rows.along}

    def elected(norms: _Norms | None, job: Job, start: int, arrays: Sequence[Any]) -> jax.Array:
        del job
        base, *models = arrays
        return _elected(base, tuple(models), thinning(arrays, start, norms), **how)

    if restores or row.asks_majority:
        make = functools.partial(
            _Layer,
            functools.partial(_Norms, draws, keeps, row.rescale) if restores else None,
            elected if row.asks_majority else None,
        )
        survey = OfBlocks(make, matrices.before, matrices.block)

    def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
        base, *models = arrays
        layer = None if survey is None else survey.of(start)
        thinned = thinning(arrays, start, layer and layer.norms)
        sign = layer and layer.signs and layer.signs.sign
        merged = _merge_slice(base, tuple(models), thinned, sign, **how, dtype=leaf.dtype)
        if layer is not None:
            layer.forget(start)
        return checked(name, leaf.operands, arrays, merged)

    return leaf.job(
        compute,
        matrices,
        temporaries=(16 if ranked else 6) * n + 60,
        survey=survey,
        kept=-(-n // 8) if keeps else 0,
        unit=draws.run,
    )


def _can_slice(merge: DeltaMerge) -> bool:
    return (
        merge.output.rounding == "nearest"
        and np.all(np.asarray(merge.trim) == 1)
        # Such a key gives every entry its number by its place.
        and bool(jax.config.jax_threefry_partitionable)  # pyright: ignore
        and jax.config.jax_default_prng_impl == "threefry2x32"  # pyright: ignore
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Numbers:
    # Host arrays: placing each by itself takes longer than the call that reads them.
    weights: Any  # (models,)
    density: Any  # (models,)
    epsilon: Any  # (models,)
    factors: Any  # (models,), restoring norms
    scale: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Thinning:
    # What chance leaves of a slice, per model; None where it drops nothing, or ranks do not count.
    masks: tuple[Any, ...]
    ranks: tuple[Any, ...]
    numbers: _Numbers


@dataclasses.dataclass(frozen=True)
class _Draws:
    """What chance keeps of each model's delta; numbers are per model.

    Args:
      rows: Among which entries chances rank; None where they do not.
      run: Entries that no slice divides.
      wide: Dtype of the computation.
      weights: Of the deltas.
      density: Mean chance to be kept.
      epsilon: Half the range of chances.
      drops: Whether any entry is dropped.
      keys: Data of the keys, `(models, 2)`.
    """

    rows: Grouping | None
    run: int
    wide: Any
    weights: tuple[float, ...]
    density: tuple[float, ...]
    epsilon: tuple[float, ...]
    drops: tuple[bool, ...]
    keys: np.ndarray

    @classmethod
    def of(cls, leaf: Leaf, merge: DeltaMerge, rows: Grouping) -> _Draws:
        """Those of a leaf."""
        n = len(leaf.operands) - 1

        def spread(argument: str, value: Any) -> tuple[float, ...]:
            return tuple(map(float, per_model(merge.name, argument, value, n)))

        ids = [str(i) for i in range(n)] if merge.names is None else list(merge.names)
        density = spread("density", merge.density)
        key = jax.random.key(leaf.seed)
        keys = [jax.random.key_data(model_key(key, leaf.name, model)) for model in ids]
        ranked = merge.row.sparsifier == "ranked"
        chunk = rows.along * rows.behind
        return cls(
            rows=rows if ranked else None,
            run=chunk * max(_LEAST_RUN // chunk, 1),
            wide=compute_dtype(leaf.operands[0]),
            weights=spread("weights", 1.0 if merge.weights is None else merge.weights),
            density=density,
            epsilon=spread("epsilon", merge.epsilon),
            drops=tuple(share < 1 for share in density),
            keys=np.asarray(keys, np.uint32),
        )

    def ranks(self, arrays: Sequence[Any]) -> tuple[np.ndarray | None, ...]:
        """Ranks of each model's entries, as `row_ranks`; None where no chance depends on them."""
        base, *models = arrays
        return tuple(
            None
            if self.rows is None or not drops
            else row_ranks(np.asarray(_patterns(base, model)), self.rows.along, self.rows.behind)
            for model, drops in zip(models, self.drops, strict=True)
        )

    def masks(
        self, start: int, size: int, ranks: Sequence[np.ndarray | None]
    ) -> tuple[jax.Array | None, ...]:
        """Which entries from `start` on are kept; None where all are."""
        along = 1 if self.rows is None else self.rows.along
        place = np.asarray(divmod(start, 1 << 32), np.uint32)
        return tuple(
            _mask(
                self.keys[i],
                place,
                ranks[i],
                np.asarray(self.density[i], self.wide),
                np.asarray(self.epsilon[i], self.wide),
                along=along,
                size=size,
            )
            if drops
            else None
            for i, drops in enumerate(self.drops)
        )

    def run_norms(self, values: jax.Array, count: int, kind: Rescale) -> np.ndarray:
        """What runs add to norms, `(runs,)` float64, the same however a tensor is cut."""
        found = run_norms(values, self.run, kind)
        return found[: -(-count * len(found) // values.size)]


@slice_program
def _patterns(base: Any, model: Any) -> jax.Array:
    """Integers that order as magnitudes of the delta do, in float32."""
    delta = delta_of(base, model).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(delta, jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def _chance(ranks: Any, density: Any, epsilon: Any, along: int) -> jax.Array:
    """Chance of every entry to be kept, as the whole leaf's."""
    if ranks is None:
        return density
    share = jnp.full(ranks.shape, 0.5, jnp.float32)
    if along > 1:
        share = ranks.astype(jnp.float32) / (2 * (along - 1))
    return density - epsilon + 2 * epsilon * share.astype(density.dtype)


@functools.partial(slice_program, static_argnames=("along", "size"))
def _mask(
    key: Any, start: Any, ranks: Any, density: Any, epsilon: Any, *, along: int, size: int
) -> jax.Array:
    """What `jax.random.bernoulli` draws of the whole leaf, from an entry on."""
    low = start[1] + jax.lax.iota(jnp.uint32, size)
    high = start[0] + (low < start[1]).astype(jnp.uint32)
    both = jax.extend.random.threefry_2x32(key, jnp.concatenate([high, low]))
    bits = both[:size] ^ both[size:]
    # 23 bits behind the exponent of 1.
    ones = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    return ones - 1 < _chance(ranks, density, epsilon, along).astype(jnp.float32)


@slice_program
def _sizes(base: Any, model: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    size = jnp.abs(delta_of(base, model))
    return size, jnp.where(mask, size, 0)


def _thinned(
    deltas: Sequence[jax.Array], thinning: _Thinning, row: Row, along: int
) -> list[jax.Array]:
    """What is left of deltas, rescaled."""
    kept, numbers = [], thinning.numbers
    for i, (delta, mask) in enumerate(zip(deltas, thinning.masks, strict=True)):
        left = delta if mask is None else jnp.where(mask, delta, 0)
        if mask is not None and row.rescale == "inverse_density":
            ranks = thinning.ranks[i]
            left = left / _chance(ranks, numbers.density[i], numbers.epsilon[i], along)
        elif mask is not None and row.rescale != "none":
            left = left * numbers.factors[i]
        kept.append(left)
    return kept


@functools.partial(slice_program, static_argnames=("row", "along", "dtype"))
def _merge_slice(
    base: Any,
    models: tuple[Any, ...],
    thinning: _Thinning,
    sign: jax.Array | None,
    *,
    row: Row,
    along: int,
    dtype: Any,
) -> jax.Array:
    deltas = [delta_of(base, model) for model in models]
    kept, numbers = _thinned(deltas, thinning, row, along), thinning.numbers
    plan = LeafPlan((), ())
    new = add_deltas(base, kept, numbers.weights, numbers.scale, row=row, plan=plan, sign=sign)
    return stored(new, dtype, *deltas)


@functools.partial(slice_program, static_argnames=("row", "along"))
def _elected(
    base: Any, models: tuple[Any, ...], thinning: _Thinning, *, row: Row, along: int
) -> jax.Array:
    """Sign of the weighted sum of what is left of deltas, int8."""
    kept = _thinned([delta_of(base, model) for model in models], thinning, row, along)
    total = sum(thinning.numbers.weights[i] * left for i, left in enumerate(kept))
    return jnp.sign(jnp.asarray(total)).astype(jnp.int8)


class _Layer(InTurn):
    """What is known of one layer before it is made: norms, then the sign that most entries have."""

    def __init__(
        self, norms: Callable[[], _Norms] | None, elected: Callable[..., jax.Array] | None
    ):
        self.norms = None if norms is None else norms()
        self.signs = None if elected is None else Signs(functools.partial(elected, self.norms))
        super().__init__(*(survey for survey in (self.norms, self.signs) if survey is not None))

    def forget(self, start: int) -> None:
        """Lets go of what is kept of a slice that is made."""
        if self.norms is not None:
            self.norms.forget(start)


class _Norms(Survey):
    """Norms of each delta of one layer, and of what chance leaves of it.

    Args:
      draws: What chance keeps.
      keeps: Whether it is remembered until the layer is made.
      kind: Which norm.
    """

    def __init__(self, draws: _Draws, keeps: bool, kind: Rescale):
        self._draws = draws
        self._keeps = keeps
        self._kind: Rescale = kind
        self._runs: list[np.ndarray] = []
        self._drawn: dict[int, list[np.ndarray | None]] = {}

    def look(self, job: Job, start: int, count: int, arrays: Sequence[Any]) -> np.ndarray:
        del job
        draws, [base, *models] = self._draws, arrays
        masks = draws.masks(start, base.size, draws.ranks(arrays))
        if self._keeps:
            self._drawn[start] = [None if m is None else np.packbits(np.asarray(m)) for m in masks]
        sums = []
        for model, mask in zip(models, masks, strict=True):
            if mask is not None:
                sizes = _sizes(base, model, mask)
                sums += [draws.run_norms(x, count, self._kind) for x in sizes]
        return np.stack(sums) if sums else np.zeros((0, 1))

    def add(self, job: Job, start: int, seen: np.ndarray) -> None:
        del job, start
        self._runs.append(seen)

    def decide(self) -> bool:
        return False

    def factors(self) -> np.ndarray:
        """What restores each norm, `(models,)`."""
        whole, left = norms_of_runs(self._runs, self._kind).reshape(-1, 2).T
        factors = np.ones(len(self._draws.drops))
        factors[np.array(self._draws.drops)] = np.where(
            left > 0, whole / np.where(left > 0, left, 1), 1
        )
        return factors

    def kept(self, start: int, size: int) -> tuple[Any, ...] | None:
        """The masks of a slice, if they were kept."""
        bits = self._drawn.get(start)
        if bits is None:
            return None
        return tuple(None if b is None else np.unpackbits(b, count=size).view(bool) for b in bits)

    def forget(self, start: int) -> None:
        """Lets go of the masks of a slice."""
        self._drawn.pop(start, None)
