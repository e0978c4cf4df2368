"""Nearswap: take another model's entries where they are near."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._transform import Transform
from jaxweights.merge._models import Nonfloat, Output, Rounding, all_finite, compute_dtype
from jaxweights.merge._per_leaf import LeafJob, Merged, per_leaf


def nearswap(
    *,
    t: float | jax.Array,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Takes the model's entries that are within `t` of the tree's, and moves the others by `t`.

    With g = min(t / \|θ1 - θ0\|, 1), every entry becomes g·θ1 + (1 - g)·θ0, for the tree θ0 and the
    one model θ1 given to `apply`. No entry moves by more than `t`.

    Args:
      t: Greatest move, not negative, in units of the weights; may be traced.
      names: What errors call the model.
      out_dtype: Dtype of the merged leaves; None keeps the tree's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`; the base is the tree.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If `t` is negative, or the number of models is not one.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> tree, model = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([1.25, -3.0])}
      >>> jw.apply(jw.merge.nearswap(t=0.5), tree, models=[model])["w"]
      Array([1.25, 0.5 ], dtype=float32)

    Source: mergekit's method of this name; no paper.
    Differs: (1) the move is clipped, not divided by a difference that is bounded from below.
    """
    name = "merge.nearswap"
    if not isinstance(t, Tracer) and not (np.ndim(t) == 0 and 0 <= t < np.inf):
        raise ValueError(f"{name}: t={t} must be one finite number, not negative.")
    output = Output.checked(name, out_dtype, rounding, nonfloat)

    def merge_leaf(job: LeafJob) -> Merged:
        limit = jnp.asarray(t, compute_dtype(job.base))
        return Merged(
            *_nearswap_leaf(job.base, job.models[0], limit, job.key, output=output, dtype=job.dtype)
        )

    return per_leaf(
        name,
        merge_leaf,
        output=output,
        names=names,
        most=1,
        remedy="The tree is moved towards the one model.",
        group=None,
        scope="entry",
    )


@functools.partial(jax.jit, static_argnames=("output", "dtype"))
def _nearswap_leaf(
    base: Any, model: Any, t: jax.Array, key: jax.Array | None, *, output: Output, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    here, there = (jnp.asarray(x).astype(t.dtype) for x in (base, model))
    delta = there - here
    merged = jnp.where(jnp.abs(delta) <= t, there, here + jnp.clip(delta, -t, t))
    stored = output.store(merged, dtype, key)
    return stored, all_finite(stored, delta)
