"""Norms of vectors that are seen slice by slice, in runs that no slice divides."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.merge._delta_leaf import Rescale
from jaxweights.stream._sums import folded


def run_norms(values: Any, run: int, kind: Rescale) -> np.ndarray:
    """What each run of a slice adds to a norm: `(runs,)` float64, for `norms_of_runs`.

    Args:
      values: The slice, flat.
      run: Entries of a run.
      kind: Which norm.

    Returns:
      Sums of magnitudes for `"l1"`, of squares for `"l2"`, and the largest ones for `"linf"`.
    """
    parts, top = (np.asarray(x).astype(np.float64) for x in _parts(values, run=run, kind=kind))
    if kind == "linf":
        return top[:, 0]
    total = parts.sum(axis=1)
    return total if kind == "l1" else total * np.square(top[:, 0])


def norms_of_runs(runs: Sequence[np.ndarray], kind: Rescale) -> np.ndarray:
    """Norms `(vectors,)` from the `run_norms` of all slices, each `(vectors, runs)`."""
    every = np.concatenate(runs, axis=1)
    if kind == "linf":
        return every.max(axis=1, initial=0)
    total = every.sum(axis=1)
    return total if kind == "l1" else np.sqrt(total)


@functools.partial(jax.jit, static_argnames=("run", "kind"))
def _parts(values: Any, *, run: int, kind: Rescale) -> tuple[jax.Array, jax.Array]:
    """Partial sums of each run, of squares in units of its largest magnitude, and that one."""
    rows = jnp.abs(values).reshape(-1, run)
    if kind == "l1":
        return folded(rows), rows[:, :1]
    top = jnp.max(rows, axis=1, keepdims=True)
    if kind == "linf":
        return top, top
    # Squares of tiny differences would vanish.
    return folded(jnp.square(rows / jnp.where(top > 0, top, 1))), top
