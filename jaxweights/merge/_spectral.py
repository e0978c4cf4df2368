"""What TSV-Merge, Iso-C and Iso-CTS share: deltas matrix by matrix, and partial isometries."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._context import Context
from jaxweights.core._lapack import svd
from jaxweights.core._layout import is_float
from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.core._paths import Params, Path, flatten, path_key, unflatten
from jaxweights.core._transform import Transform, stateless
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    all_finite,
    check_names,
    check_weights,
    compute_dtype,
    merge_leaves,
    per_model,
    require_models,
    selected,
)
from jaxweights.merge._views import matrix_views
from jaxweights.weights._axes import View


class SpectralSettings(TypedDict, total=False):
    """What spectral merges take besides their own choices; see `tsv`."""

    weights: Weights
    rank_tol: float | None
    scale: float | jax.Array
    names: Sequence[str] | None
    out_dtype: DTypeLike | None
    rounding: Rounding
    nonfloat: Nonfloat


class Method(Protocol):
    """Merges the deltas of one matrix; hashable, as it is static under jit."""

    def __call__(self, deltas: list[jax.Array], rank_tol: jax.Array) -> jax.Array:
        """`(in, out)` deltas and the smallest relative singular value that counts."""
        ...

    def fits(self, rank: int, models: int) -> bool:
        """Whether a matrix has singular values enough; if not, its deltas are averaged."""
        ...


def spectral_merge(
    name: str,
    method: Method,
    *,
    weights: Weights = None,
    rank_tol: float | None = None,
    scale: float | jax.Array = 1.0,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    """Adds to the base what `method` makes of the deltas of each matrix.

    Args:
      name: What errors call the transform.
      method: From the deltas of one matrix to the merged delta.
      weights: As in `tsv`.
      rank_tol: As in `tsv`.
      scale: As in `tsv`.
      names: What errors call the models.
      out_dtype: As in `mean`.
      rounding: As in `mean`.
      nonfloat: As in `mean`.

    Returns:
      The transform.
    """
    weights = check_weights(name, weights, normalize=True, absolute=True)
    if rank_tol is not None and not 0 <= rank_tol < 1:
        raise ValueError(f"{name}: rank_tol={rank_tol} must lie in [0, 1).")
    if not isinstance(scale, Tracer) and not np.isfinite(np.asarray(scale)).all():
        raise ValueError(f"{name}: scale={scale} must be finite.")
    check_names(name, names)
    output = Output.checked(name, out_dtype, rounding, nonfloat)

    def update(params: Params, context: Context) -> Params:
        everything, structure = flatten(params)
        flat = selected(everything, context)
        models = require_models(name, flat, context, names, delta=True)
        shares = np.ones(len(models)) if weights is None else weights
        per_model(name, "weights", shares, len(models))
        floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
        views = {
            path: view
            for path, view in matrix_views(
                name, floats, context.layout, named=context.named
            ).items()
            if method.fits(min(view.in_dim, view.out_dim), len(models))
        }

        def merge_leaf(path: Path, leaf: Any, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            key = None
            if output.rounds_randomly(leaf):
                key = path_key(context.require("key", name), path)
            compute, view = compute_dtype(leaf), views.get(path)
            return _merge_leaf(
                leaf,
                leaves,
                jnp.asarray(shares, compute),
                jnp.asarray(_tolerance(rank_tol, view, compute), compute),
                jnp.asarray(scale, compute),
                key,
                method=None if view is None else method,
                view=view,
                output=output,
                dtype=output.dtype_of(leaf),
            )

        new = merge_leaves(name, flat, models, context, output, names, merge_leaf)
        return unflatten(structure, everything | new)

    return stateless(update, name=name, scope="matrix" if output.rounding == "nearest" else "leaf")


def _tolerance(rank_tol: float | None, view: View | None, dtype: Any) -> float:
    """Relative size below which a singular value is rounding, which grows like the root of n."""
    if rank_tol is not None or view is None:
        return rank_tol or 0.0
    return 10 * float(jnp.finfo(dtype).eps) * math.sqrt(max(view.in_dim, view.out_dim))


@functools.partial(jax.jit, static_argnames=("method", "view", "output", "dtype"))
def _merge_leaf(
    base: jax.Array,
    models: list[jax.Array],
    weights: jax.Array,
    rank_tol: jax.Array,
    scale: jax.Array,
    key: jax.Array | None,
    *,
    method: Method | None,
    view: View | None,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    start = base.astype(weights.dtype)
    deltas = [w * (x.astype(weights.dtype) - start) for w, x in zip(weights, models, strict=True)]
    if method is None or view is None:
        merged = sum(deltas[1:], start=deltas[0]) / jnp.sum(jnp.abs(weights))
    else:
        matrices = [view.to_matrix(delta) for delta in deltas]
        with jax.default_matmul_precision("highest"):
            run = lambda parts: method(parts, rank_tol)  # noqa: E731
            merged = view.from_matrix(map_over_stack(run, matrices, matrices[0].shape[:-2]))
    stored = output.store(start + scale * merged, dtype, key)
    return stored, all_finite(stored)


def above(values: jax.Array, tolerance: jax.Array, largest: jax.Array) -> jax.Array:
    """Which singular values count, as numbers 0 and 1; none of a matrix of zeros."""
    return (values > tolerance * largest).astype(values.dtype)


def nearest_isometry(matrix: jax.Array, rank_tol: jax.Array) -> jax.Array:
    """The isometry nearest to a matrix on the space that it spans, and zero elsewhere.

    The polar factor P Qᵀ of P Σ Qᵀ is arbitrary where Σ vanishes; there nothing is kept.
    """
    left, values, right = svd(matrix)
    return (left * above(values, rank_tol, values[:1])[None]) @ right
