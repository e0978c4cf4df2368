"""RAM: what one model alone has changed is kept whole, what several have changed is averaged."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.core._transform import Transform
from jaxweights.merge._models import Nonfloat, Output, Rounding, all_finite
from jaxweights.merge._per_leaf import LeafJob, Merged, per_leaf
from jaxweights.merge._sphere import vectors_of


class RamMerge(NamedTuple):
    """What RAM+ was asked to do; a stream does it slice by slice."""

    name: str
    epsilon: float
    enlarge: tuple[float, float]
    output: Output


def ram(
    *,
    epsilon: float = 1e-5,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Adds the deltas that only one model has, and the mean of those that several have.

    The base is the tree that is transformed. A model has changed an entry where its delta is
    larger than `epsilon`; smaller deltas count as zero. Reinforcement learning changes few entries
    of each model, so that a plain mean would shrink most of what was learned.

    Args:
      epsilon: Deltas of at most this size are dropped; not negative, in units of the weights.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`; the base is the tree.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If `epsilon` is negative, or a model does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"w": jnp.zeros(3)}
      >>> models = [{"w": jnp.array([1.0, 2.0, 0.0])}, {"w": jnp.array([3.0, 0.0, 0.0])}]
      >>> jw.apply(jw.merge.ram(), base, models=models)["w"]
      Array([2., 2., 0.], dtype=float32)

    Source: arXiv:2601.13572, Reinforced Agent Merging.
    """
    return _ram("merge.ram", epsilon, None, names, Output.checked(
        "merge.ram", out_dtype, rounding, nonfloat))  # fmt: skip


def ram_plus(
    *,
    epsilon: float = 1e-5,
    gain: float = 0.1,
    most: float = 0.2,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Does as `ram`, and enlarges what a model alone has, to make up for what it shares.

    In each leaf (each layer and expert of a stacked one), a model's own deltas are multiplied by
    1 + gain · min(ρ, most), where ρ is the number of entries that it shares with others by the
    number that it alone has changed.

    Args:
      epsilon: As in `ram`.
      gain: The paper's r, not negative; 0 gives `ram`.
      most: The paper's α, the largest ρ that counts; not negative.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`; the base is the tree.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a setting is negative, or a model does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"w": jnp.zeros(3)}
      >>> models = [{"w": jnp.array([1.0, 2.0, 0.0])}, {"w": jnp.array([3.0, 0.0, 0.0])}]
      >>> jw.apply(jw.merge.ram_plus(gain=0.5, most=1.0), base, models=models)["w"]
      Array([2., 3., 0.], dtype=float32)

    Source: arXiv:2601.13572, RAM+.
    Differs: (1) ρ is counted leaf by leaf, as in mergekit's `ramplus_tl`, not over the whole model.
    """
    name = "merge.ram_plus"
    for setting, value in (("gain", gain), ("most", most)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: {setting}={value} must be finite and not negative.")
    output = Output.checked(name, out_dtype, rounding, nonfloat)
    return _ram(name, epsilon, (float(gain), float(most)), names, output)


def _ram(
    name: str,
    epsilon: float,
    enlarge: tuple[float, float] | None,
    names: Sequence[str] | None,
    output: Output,
) -> Transform:
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"{name}: epsilon={epsilon} must be finite and not negative.")

    def merge_leaf(job: LeafJob) -> Merged:
        return Merged(
            *_ram_leaf(
                job.base,
                job.models,
                job.key,
                epsilon=float(epsilon),
                enlarge=enlarge,
                axes=job.axes,
                output=output,
                dtype=job.dtype,
            )
        )

    return per_leaf(
        name,
        merge_leaf,
        output=output,
        names=names,
        delta=True,
        group=None if enlarge is None else "leaf",
        scope="entry" if enlarge is None else "matrix",
        settings=None if enlarge is None else RamMerge(name, float(epsilon), enlarge, output),
    )


@functools.partial(jax.jit, static_argnames=("epsilon", "enlarge", "axes", "output", "dtype"))
def _ram_leaf(
    base: Any,
    models: list[Any],
    key: jax.Array | None,
    *,
    epsilon: float,
    enlarge: tuple[float, float] | None,
    axes: tuple[int, ...],
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    deltas = vectors_of(base, models, deltas=True)
    factors = None
    if enlarge is not None:
        shared, alone = counts_of(deltas, epsilon, axes)
        factors = enlargements(shared, alone, enlarge)
    stored = output.store(add_changed(base, deltas, epsilon, factors), dtype, key)
    return stored, all_finite(stored, *deltas)


def _changed(deltas: list[jax.Array], epsilon: float) -> tuple[list[jax.Array], jax.Array]:
    """Which entries each model has changed, and how many models have."""
    changed = [jnp.abs(delta) > epsilon for delta in deltas]
    return changed, jnp.asarray(sum(mask.astype(jnp.int32) for mask in changed))


def counts_of(
    deltas: list[jax.Array], epsilon: float, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """How many entries each model shares, and how many it alone has changed; `(models, ...)`."""
    changed, count = _changed(deltas, epsilon)
    number = functools.partial(jnp.sum, axis=axes, keepdims=True, dtype=jnp.int32)
    shared = jnp.stack([number(mask & (count > 1)) for mask in changed])
    return shared, jnp.stack([number(mask & (count == 1)) for mask in changed])


def enlargements(shared: jax.Array, alone: jax.Array, enlarge: tuple[float, float]) -> jax.Array:
    """What a model's own deltas are multiplied by, float32."""
    gain, most = enlarge
    ratio = shared.astype(jnp.float32) / jnp.maximum(alone, 1).astype(jnp.float32)
    return 1 + gain * jnp.minimum(ratio, most)


def add_changed(
    base: Any, deltas: list[jax.Array], epsilon: float, factors: jax.Array | None
) -> jax.Array:
    """The base with what one model alone has changed, by its factor, and the mean of the rest."""
    changed, count = _changed(deltas, epsilon)
    share = 1 / jnp.maximum(count, 1).astype(deltas[0].dtype)
    parts = []
    for i, (delta, mask) in enumerate(zip(deltas, changed, strict=True)):
        factor = share
        if factors is not None:
            factor = jnp.where(count == 1, factors[i].astype(share.dtype), share)
        parts.append(jnp.where(mask, delta * factor, 0))
    return jnp.asarray(base).astype(deltas[0].dtype) + jnp.asarray(sum(parts))
