"""What a leaf's approximation costs, in the measures between which `allocate` chooses."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxweights.core._context import Context
from jaxweights.core._feature_groups import columns_like_gram
from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.core._paths import Path
from jaxweights.quantize._output_error import output_error
from jaxweights.weights._axes import View
from jaxweights.weights._weight import materialize

Measure = Literal["relative", "output", "fisher", "weight"]

READS: dict[str, frozenset[str]] = {
    "relative": frozenset({"gram", "count"}),
    "output": frozenset({"gram", "count"}),
    "fisher": frozenset({"grad_sq"}),
    "weight": frozenset(),
}


def missing_statistics(trials: Mapping[Path, Any], measure: str, context: Context) -> list[str]:
    """What a measure would read of these leaves and was not collected."""
    if not READS[measure]:
        return []
    stats = context.stats
    if stats is None:
        return [
            f"measure={measure!r} reads statistics, and none are given. Pass stats=calibrate(fn, "
            f"params, batches, needs=allocation_needs(params, candidates, measure={measure!r})), "
            "or measure='weight', which reads no data."
        ]
    name = "grad_sq" if measure == "fisher" else "gram"
    missing = [stats.why_missing(path, name) for path in trials if stats.get(path, name) is None]
    if measure == "fisher":  # of the leaf's own shape, whatever its axes are
        return missing
    axes = {path: context.layout[path].inputs for path in trials if path in context.layout}
    others = (stats.why_other_axes(path, inputs) for path, inputs in axes.items())
    return [*missing, *(problem for problem in others if problem is not None)]


def error_of(leaf: jax.Array, path: Path, measure: str, context: Context) -> Any:
    """A function of a leaf's approximation: the error by the chosen measure."""
    stats: Any = context.stats
    if measure == "weight":
        return functools.partial(_weight_error, leaf)
    if measure == "fisher":
        examples = stats.get(path, "examples")
        per = 1.0 if examples is None else 1.0 / max(float(examples), 1.0)
        return functools.partial(_fisher_error, leaf, stats.get(path, "grad_sq") * per)
    view = View.of(leaf.shape, context.layout[path])
    gram, count = stats.get(path, "gram"), stats.get(path, "count")
    per_token = gram / jnp.maximum(count, 1).astype(jnp.float32)[..., None, None]
    return functools.partial(
        _output_error, leaf, per_token, view=view, relative=measure == "relative"
    )


@jax.jit
def _weight_error(leaf: jax.Array, new: Any) -> jax.Array:
    old, new = (materialize(x).astype(jnp.float32) for x in (leaf, new))
    total = jnp.sum(jnp.square(old))
    return jnp.sum(jnp.square(new - old)) / jnp.where(total > 0, total, 1)


@jax.jit
def _fisher_error(leaf: jax.Array, squares: jax.Array, new: Any) -> jax.Array:
    change = materialize(new).astype(jnp.float32) - leaf.astype(jnp.float32)
    return jnp.sum(jnp.square(change) * squares.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("view", "relative"))
def _output_error(
    leaf: jax.Array, gram: jax.Array, new: Any, *, view: View, relative: bool
) -> jax.Array:
    """Summed over the matrices of a stack, the share of each or the error itself."""
    old, dense = (view.to_matrix(materialize(x)) for x in (leaf, new))

    def one(given: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        # The outputs of all feature groups are those of one matrix.
        old, new, gram = given
        old, new = (columns_like_gram(x, gram) for x in (old, new))
        return output_error(old, new, gram, relative=relative)

    return jnp.sum(map_over_stack(one, (old, dense.astype(jnp.float32), gram), old.shape[:-2]))
