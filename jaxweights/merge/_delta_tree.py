"""The generalized delta merge of a tree: settings per model and leaf, and what leaves share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._context import Context
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Path
from jaxweights.merge._delta_leaf import (
    Compat,
    LeafInputs,
    LeafPlan,
    Row,
    mask_of_leaf,
    masks_of_tree,
    ranked_values,
    sign_sum,
)
from jaxweights.merge._models import compute_dtype, model_key, per_model
from jaxweights.merge._per_leaf import group_axes
from jaxweights.merge._stacks import stack_axes

PerModel = float | Sequence[float]
Masks = tuple[jax.Array | None, ...]  # one per model; None keeps all entries


class Thinning(NamedTuple):
    """How one model's delta is thinned out."""

    density: float  # share kept by the sparsifier
    outliers: float  # share of the largest entries that is dropped
    trim: float  # share kept by magnitude of what a random sparsifier left
    epsilon: float = 0.0  # how far chances of the smallest and largest entry are from density

    @property
    def thins(self) -> bool:
        """Whether the sparsifier drops anything; at density 1 it returns its input."""
        return self.density < 1

    def counts(self, n: int, share: float, compat: Compat) -> tuple[int, int]:
        """How many of `n` ranked entries are dropped from the top, and how many kept below."""
        count = round if compat == "paper" else int
        kept = min(max(count(share * n), 1), n) if share > 0 else 0
        return min(count(self.outliers * n), n - kept), kept


@dataclasses.dataclass(frozen=True)
class DeltaJob:
    """One merge of one tree: settings per model and leaf, as the leaf functions want them."""

    row: Row
    flat: Flat  # floating leaves
    models: tuple[Flat, ...]
    key: jax.Array | None
    names: Sequence[str]
    thinning: tuple[Thinning, ...]
    weights: Any  # (models,)
    stacks: dict[Path, tuple[int, ...]]
    rows: dict[Path, tuple[int, ...]]  # axes of the inputs of one output

    @classmethod
    def of(
        cls,
        name: str,
        row: Row,
        flat: Flat,
        models: tuple[Flat, ...],
        context: Context,
        names: Sequence[str] | None,
        shares: dict[str, PerModel],
        weights: Any,
    ) -> DeltaJob:
        """Spreads the settings over the models, and finds the stack axes where they matter."""
        n = len(models)
        floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
        spread = {a: map(float, per_model(name, a, share, n)) for a, share in shares.items()}
        thinning = tuple(map(Thinning, *(spread[field] for field in Thinning._fields)))
        given = np.ones(n) if weights is None else per_model(name, "weights", weights, n)
        mixes = row.mixes_entries or (row.scope != "tree" and any(t.trim < 1 for t in thinning))
        none: dict[Path, tuple[int, ...]] = dict.fromkeys(floats, ())
        stacks = stack_axes(name, floats, context.layout) if mixes else none
        by_row = row.sparsifier == "ranked" or row.scope == "row"
        rows = group_axes(floats, context.layout, stacks, "output") if by_row else none
        ids = [str(i) for i in range(n)] if names is None else list(names)
        job = cls(row, floats, models, context.key, ids, thinning, given, stacks, rows)
        if any(job._drops):
            context.require("key", name)
        return job

    @property
    def _drops(self) -> tuple[bool, ...]:
        return tuple(self.row.draws and t.thins for t in self.thinning)

    @property
    def _ranks(self) -> tuple[bool, ...]:
        ranking = self.row.sparsifier in ("magnitude", "outliers")
        return tuple((ranking and t.thins) or t.trim < 1 for t in self.thinning)

    def plan(self, path: Path) -> LeafPlan:
        """What is static about one leaf."""
        return LeafPlan(self.stacks[path], self._drops, self.rows[path])

    def inputs(self, path: Path, masks: Masks) -> LeafInputs:
        """What is an array about it."""
        dtype = compute_dtype(self.flat[path])
        epsilon = None
        if self.row.sparsifier == "ranked":
            epsilon = jnp.asarray([t.epsilon for t in self.thinning], dtype)
        return LeafInputs(
            weights=jnp.asarray(self.weights, dtype),
            density=jnp.asarray([t.density for t in self.thinning], dtype),
            keys=self._keys(path),
            masks=masks,
            epsilon=epsilon,
        )

    def _keys(self, path: Path) -> tuple[jax.Array | None, ...]:
        key = self.key
        return tuple(
            model_key(key, path, model) if drops and key is not None else None
            for drops, model in zip(self._drops, self.names, strict=True)
        )

    def masks_of_leaf(self, path: Path) -> Masks:
        """What ranking keeps of each model's delta of one leaf."""
        leaf, stack = self.flat[path], self.stacks[path]
        if self.row.scope == "row":
            stack = tuple(a for a in range(len(leaf.shape)) if a not in self.rows[path])
        n = leaf.size // max(math.prod(leaf.shape[a] for a in stack), 1)
        return tuple(
            mask_of_leaf(self._ranked(path, i), *self._counts(i, n), stack) if ranks else None
            for i, ranks in enumerate(self._ranks)
        )

    def masks_of_tree(self) -> dict[Path, Masks]:
        """What ranking keeps of each model's whole delta."""
        n = sum(leaf.size for leaf in self.flat.values())
        none: list[jax.Array | None] = [None] * len(self.flat)
        columns = [
            masks_of_tree([self._ranked(path, i) for path in self.flat], *self._counts(i, n))
            if ranks
            else none
            for i, ranks in enumerate(self._ranks)
        ]
        return dict(zip(self.flat, zip(*columns, strict=True), strict=True))

    def sign_of_tree(self, masks: dict[Path, Masks]) -> jax.Array:
        """Sum of the elected signs of all entries."""
        total = jnp.zeros((), jnp.float32)
        for path, leaf in self.flat.items():
            others = [model[path] for model in self.models]
            inputs = self.inputs(path, masks[path])
            total = total + sign_sum(leaf, others, inputs, row=self.row, plan=self.plan(path))
        return total

    def _ranked(self, path: Path, i: int) -> jax.Array:
        inputs = self.inputs(path, (None,) * len(self.models))
        plan = self.plan(path)
        return ranked_values(self.flat[path], self.models[i][path], inputs, i, self.row, plan)

    def _counts(self, i: int, n: int) -> tuple[int, int]:
        thinning = self.thinning[i]
        share = thinning.trim if self.row.draws else thinning.density
        return thinning.counts(n, share, self.row.compat)
