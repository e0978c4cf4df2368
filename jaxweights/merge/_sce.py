"""SCE: select by variance, calculate weights by energy, erase minority signs."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._paths import Path
from jaxweights.core._select import largest
from jaxweights.core._transform import Transform
from jaxweights.merge._delta_leaf import Compat, from_rows, to_rows
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    all_finite,
    check_choice,
)
from jaxweights.merge._per_leaf import LeafJob, Merged, per_leaf
from jaxweights.merge._sphere import vectors_of

MERGEKIT_ENERGY = 1e-6  # mean squares that sum to less count as equal there
AGREEING = 0.99  # share of entries without variance from which on selection is warned of


class SceMerge(NamedTuple):
    """What SCE was asked to do; a stream does it slice by slice."""

    name: str
    density: Any
    compat: Compat
    output: Output

    def warn(self, paths: list[Path]) -> None:
        """Says of which leaves the models hardly differ."""
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        warnings.warn(
            f"{self.name}: {paths[:5]}{more}: the models are equal in over 99 % of the entries, "
            "and selection by variance drops what they share. Pass density=1 to keep it.",
            stacklevel=2,
        )


def sce(
    *,
    density: float | jax.Array = 1.0,
    compat: Compat = "paper",
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Merges deltas where models differ most, weighted by their energy, in the elected sign.

    The base is the tree that is transformed. For every leaf (each layer and expert of a stacked
    one): *select* the `density` share of entries whose variance over the models is largest;
    *calculate* a weight for each model, its share of the sum of squares of what was selected;
    *erase* deltas against the sign of their plain sum; add the weighted mean of the rest.

    Args:
      density: Share of entries selected, in [0, 1]; 1 selects all. May be traced.
      compat: `"paper"`, or `"mergekit"`: the share is one of the entries whose variance is not
        zero and is rounded down, and weights are equal where mean squares sum to less than 1e-6,
        which those of most fine-tunes do.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf. It warns of leaves whose models hardly differ:
      selection by variance drops what they share.

    Raises:
      ValueError: If `density` is out of range, or a model does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"w": jnp.zeros(2)}
      >>> models = [{"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, -3.0])}]
      >>> jw.apply(jw.merge.sce(), base, models=models)["w"]
      Array([ 2., -3.], dtype=float32)

    Source: Wan et al. 2024, FuseChat, arXiv:2408.07990.
    Differs: (1) weights are equal only where all deltas are zero.
    """
    name = "merge.sce"
    check_choice(name, "compat", compat, ("paper", "mergekit"))
    if not isinstance(density, Tracer) and not (np.ndim(density) == 0 and 0 <= density <= 1):
        raise ValueError(f"{name}: density={density} must be one number in [0, 1].")
    selects = isinstance(density, Tracer) or density < 1
    output = Output.checked(name, out_dtype, rounding, nonfloat)
    settings = SceMerge(name, density, compat, output)

    def merge_leaf(job: LeafJob) -> Merged:
        mask = agree = None
        if selects:
            n = math.prod(job.base.shape[a] for a in job.axes)
            amount = count_selected(density, n) if compat == "paper" else jnp.float32(density)
            mask, agree = _selected(job.base, job.models, amount, stack=job.stack, compat=compat)
        stored, finite = _sce_leaf(
            job.base,
            job.models,
            mask,
            job.key,
            axes=job.axes,
            compat=compat,
            output=output,
            dtype=job.dtype,
        )
        return Merged(stored, finite, agree)

    return per_leaf(
        name,
        merge_leaf,
        output=output,
        names=names,
        delta=True,
        report=settings.warn,
        settings=settings,
    )


def count_selected(density: float | jax.Array, n: int) -> Any:
    """How many of n entries; at least one where the density is not zero."""
    if not isinstance(density, jax.Array):
        return np.uint32(max(round(density * n), 1) if density > 0 else 0)
    k = jnp.round(density.astype(jnp.float32) * n).astype(jnp.uint32)
    return jnp.where(density > 0, jnp.maximum(k, 1), 0)


def _selected(
    base: Any, models: list[Any], amount: Any, *, stack: tuple[int, ...], compat: Compat
) -> tuple[jax.Array, jax.Array]:
    """Which entries have the largest variance, and whether hardly any of a changed leaf has one."""
    # Two programs: in one, the compiler would compute the variance anew for every pass over it,
    # and where that rounds otherwise, the entry at the threshold is missed.
    variance, agree = _variance(base, models)
    return _largest(variance, amount, stack=stack, compat=compat), agree


@jax.jit
def _variance(base: Any, models: list[Any]) -> tuple[jax.Array, jax.Array]:
    vectors = vectors_of(base, models, deltas=True)
    variance = variance_of(vectors)
    changed = functools.reduce(jnp.logical_or, [jnp.any(x != 0) for x in vectors])
    return variance, changed & (jnp.mean(variance == 0, dtype=jnp.float32) > AGREEING)


def variance_of(vectors: list[jax.Array]) -> jax.Array:
    """Variance over the models of every entry, float32; zero where all are equal."""
    mean = sum(vectors) / len(vectors)
    variance = jnp.asarray(sum((x - mean) * (x - mean) for x in vectors)) / len(vectors)
    # Models that are equal may differ from their rounded mean.
    same = [x == vectors[0] for x in vectors[1:]]
    equal = functools.reduce(jnp.logical_and, same, jnp.ones_like(variance, bool))
    return jnp.where(equal, 0, variance).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("stack", "compat"))
def _largest(
    variance: jax.Array,
    amount: jax.Array,  # the number of entries in paper mode, their share in mergekit's
    *,
    stack: tuple[int, ...],
    compat: Compat,
) -> jax.Array:
    rows = to_rows(variance, stack)
    if compat == "mergekit":
        varying = jnp.sum(rows > 0, axis=1, dtype=jnp.uint32)
        k = jnp.floor(amount * varying.astype(jnp.float32)).astype(jnp.uint32)
    else:
        k = jnp.broadcast_to(amount, rows.shape[:1])
    return from_rows(largest(rows, k, axis=1), variance.shape, stack)


@functools.partial(jax.jit, static_argnames=("axes", "compat", "output", "dtype"))
def _sce_leaf(
    base: Any,
    models: list[Any],
    mask: jax.Array | None,
    key: jax.Array | None,
    *,
    axes: tuple[int, ...],
    compat: Compat,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    vectors = vectors_of(base, models, deltas=True)
    kept = vectors if mask is None else [jnp.where(mask, x, 0) for x in vectors]
    merged = add_agreeing(base, kept, _energy_shares(kept, axes, compat))
    stored = output.store(merged, dtype, key)
    return stored, all_finite(stored, *vectors)


def add_agreeing(base: Any, kept: list[jax.Array], weights: Sequence[Any]) -> jax.Array:
    """The base with the weighted mean of what does not go against the sign of the plain sum."""
    sign = jnp.where(jnp.asarray(sum(kept)) >= 0, 1, -1).astype(kept[0].dtype)
    parts = [jnp.sign(x) == sign for x in kept]
    chosen = [jnp.where(part, w, 0) for part, w in zip(parts, weights, strict=True)]
    total = jnp.asarray(sum(chosen))
    merged = jnp.asarray(sum(w * x for w, x in zip(chosen, kept, strict=True)))
    merged = merged / jnp.where(total > 0, total, 1)
    return jnp.asarray(base).astype(merged.dtype) + merged


def _energy_shares(kept: list[jax.Array], axes: tuple[int, ...], compat: Compat) -> list[jax.Array]:
    """Each model's share of the sum of squares, shaped to broadcast over the leaf."""
    # Beside the largest entry, so that squares of tiny deltas do not vanish.
    tops = [jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0) for x in kept]
    top = functools.reduce(jnp.maximum, tops)
    unit = jnp.where(top > 0, top, 1)
    energies = [jnp.mean((x / unit) ** 2, axis=axes, keepdims=True) for x in kept]
    total = jnp.asarray(sum(energies))
    equal = total == 0
    if compat == "mergekit":
        equal = equal | (total * unit * unit < MERGEKIT_ENERGY)
    total = jnp.where(total > 0, total, 1)
    return [jnp.where(equal, 1 / len(kept), energy / total) for energy in energies]
