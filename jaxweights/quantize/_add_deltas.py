"""add_deltas: task vectors and adapters merged into weights that stay quantized."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core._feature_groups import columns_like_gram
from jaxweights.core._host import on_host
from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, nearest, unflatten
from jaxweights.core._stats import Stats
from jaxweights.core._targets import stack_sizes
from jaxweights.quantize._calibrated import places_of
from jaxweights.quantize._output_error import output_error
from jaxweights.quantize._requantize import (
    Requantized,
    before_change,
    requantize,
    view_of,
    why_not_requantizable,
    why_not_rescalable,
)
from jaxweights.quantize._settings import check_damping, check_flags, check_numbers, is_word
from jaxweights.weights._axes import View
from jaxweights.weights._input_changes import InputChange
from jaxweights.weights._weight import is_weight, materialize

_NAME = "quantize.add_deltas"

Rounding = Literal["nearest", "gptq"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "gptq")


class MergeLoss(NamedTuple):
    """What rounding did to one merged delta; scalars, float32."""

    delta_rms: jax.Array
    """Root mean square of the delta."""
    survived: jax.Array
    """1 - ‖(merged - base) - delta‖ / ‖delta‖ with the base in the merged weight's dtype: 1 is all
    of it, 0 is none of it; 1 for a delta of zeros. On an integer grid single entries are off by up
    to half a step, so that this may be negative where the outputs are still right."""
    output_survived: jax.Array | None = None
    """The same of the layer's outputs, 1 - √(tr(DᵀHD) / tr(ΔᵀHΔ)), where Gram matrices H of its
    inputs were given; of a stack, all matrices together."""
    clipped: jax.Array | None = None
    """Share of the entries beyond the range of their group, where the grid was kept."""


def add_deltas(
    params: Params,
    deltas: Params,
    *,
    coefficient: float = 1.0,
    rounding: Rounding = "nearest",
    stats: Stats | None = None,
    damping: float = 0.01,
    rescale: bool = False,
) -> tuple[Params, dict[Path, MergeLoss]]:
    r"""Adds task vectors to weights; those that are quantized stay so, on the grid that they have.

    Each becomes :math:`Q(W + c \Delta)`: dequantized, added to in float32, and rounded to its own
    scales, zero points and groups again, be they of this library or of a GPTQ or AWQ file. A delta
    that is small beside a step moves few codes when every entry is rounded to nearest; with
    `rounding="gptq"` and the Gram matrices of the inputs the outputs follow it, because each
    entry's error is made up for by later ones. May be jitted.

    Args:
      params: Tree of weights.
      deltas: Tree with deltas at some or all paths of `params`: arrays, or represented weights such
        as the `delta` of a `LowRank`. None stands for no delta.
      coefficient: c.
      rounding: "nearest", or "gptq", which reads the statistics "gram" and "count" of every
        quantized weight that gets a delta.
      stats: Statistics from `calibrate`; with "nearest" they only make the report fuller.
      damping: As in `gptq`.
      rescale: As in `requantize`.

    Returns:
      The tree, and for the path of each delta its `MergeLoss`.

    Raises:
      ValueError: If deltas and weights do not fit together, a statistic is missing, or no token
        reached a matrix; all are named.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> quantized = jw.apply(jw.quantize.round_to_nearest(bits=8), params)
      >>> merged, report = jw.quantize.add_deltas(quantized, {"kernel": jnp.full((64, 32), 0.1)})
      >>> type(merged["kernel"]).__name__, round(float(report["kernel"].survived), 1)
      ('Quantized', 0.9)
    """
    flat, structure = flatten(params)
    added = {path: delta for path, delta in flatten(deltas)[0].items() if delta is not None}
    check_rounding(_NAME, rounding)
    check_numbers(_NAME, coefficient=coefficient)
    check_damping(_NAME, damping)
    check_flags(_NAME, rescale=rescale)
    problems = [_unfit(path, delta, flat) for path, delta in added.items()]
    problems += [
        f"{path!r}: {reason}"
        for path in added
        if rescale
        and path in flat
        and is_weight(flat[path])
        and why_not_requantizable(flat[path]) is None
        and (reason := why_not_rescalable(flat[path]))
    ]
    problems += [
        why_no_gram(path, flat[path], stats)
        for path in added
        if rounding == "gptq" and path in flat and is_weight(flat[path])
    ]
    fail(_NAME, filter(None, problems))
    new, report, failures = dict(flat), {}, []
    for path, delta in added.items():
        change = materialize(delta).astype(jnp.float32) * coefficient
        gram = None if stats is None else stats.get(path, "gram")
        if not is_weight(flat[path]):
            total = flat[path].astype(jnp.float32) + change
            new[path] = total.astype(flat[path].dtype)
            view = _dense_view(path, flat[path], stats)
            gram = gram if view is not None else None
            report[path] = loss_of(flat[path], new[path], change, gram, view)
            continue
        new[path], report[path], problem = requantized_sum(
            path, flat[path], change, gram, rounding=rounding, damping=damping, rescale=rescale
        )
        failures.append(problem)
    fail(_NAME, filter(None, failures))
    return unflatten(structure, new), report


def requantized_sum(
    path: Path,
    weight: Any,
    change: jax.Array,
    gram: jax.Array | None,
    *,
    rounding: Rounding,
    damping: float = 0.01,
    rescale: bool = False,
    before: Any = None,
    argument: str = "rounding",
) -> tuple[Any, MergeLoss, str | None]:
    """A quantized weight plus a change on the weight's own grid, the loss, and what went wrong.

    Args:
      path: What the problem calls the leaf.
      weight: A weight that `requantize` takes.
      change: Dense, of the shape of the weight, float32.
      gram: `(*stack, in, in)` or None; read by rounding="gptq" and by the report.
      rounding: As in `add_deltas`.
      damping: As in `add_deltas`.
      rescale: As in `add_deltas`.
      before: What the change is added to, where that is not the value of `weight`.
      argument: What the user calls `rounding`.

    Returns:
      The weight, its loss, and a sentence or None.
    """
    used = gram if rounding == "gptq" else None
    before = weight if before is None else before
    total = _widest(before) + change
    result: Requantized = requantize(weight, total, used, damping=damping, rescale=rescale)
    loss = loss_of(before, result.weight, change, gram, view_of(weight))
    problem = None
    if used is not None and not isinstance(result.damping, Tracer):
        failed = np.isnan(on_host(result.damping))
        if failed.any():
            problem = (
                f"{path!r}: its Gram matrix is not positive definite even with damping=1, "
                f"or not finite{places_of(failed)}. Calibrate again, or pass {argument}='nearest'."
            )
    return result.weight, loss._replace(clipped=result.clipped), problem


def loss_of(
    base: Any, merged: Any, change: jax.Array, gram: jax.Array | None, view: View | None
) -> MergeLoss:
    """What became of a change, read off the weights before and after."""
    lost = _widest(merged) - _widest(base) - change
    norm = jnp.sqrt(jnp.sum(jnp.square(change)))
    ratio = jnp.sqrt(jnp.sum(jnp.square(lost))) / jnp.where(norm > 0, norm, 1)
    survived = jnp.where(norm > 0, 1 - ratio, 1).astype(jnp.float32)
    loss = MergeLoss((norm / max(change.size, 1) ** 0.5).astype(jnp.float32), survived)
    if gram is None or view is None:
        return loss
    seen = lambda x: before_change(base, x) if isinstance(base, InputChange) else x  # noqa: E731
    energy = lambda x: _stack_energy(view.to_matrix(seen(x)), gram)  # noqa: E731
    total = energy(change)
    share = jnp.sqrt(energy(lost) / jnp.where(total > 0, total, 1))
    return loss._replace(output_survived=jnp.where(total > 0, 1 - share, 1))


def check_rounding(asker: str, rounding: str, *, argument: str = "rounding") -> None:
    """Refuses an unknown way of rounding."""
    if not is_word(rounding, ROUNDINGS):
        raise ValueError(
            f"{asker}: {argument}={rounding!r} is unknown. Choose one of {', '.join(ROUNDINGS)}."
        )


def why_no_gram(
    path: Path, weight: Any, stats: Stats | None, *, argument: str = "rounding"
) -> str | None:
    """Why a quantized weight cannot be rounded with statistics; None if it can."""
    if stats is None:
        return (
            f"{path!r}: {argument}='gptq' reads Gram matrices. Pass stats=calibrate(fn, params, "
            "batches, needs={path: frozenset({'gram', 'count'})}), or "
            f"{argument}='nearest'."
        )
    gram, count = stats.get(path, "gram"), stats.get(path, "count")
    if gram is None:
        return stats.why_missing(path, "gram")
    view = view_of(weight) if why_not_requantizable(weight) is None else None
    own = () if view is None else stack_sizes(weight, view)
    if view is not None and (problem := stats.why_grouped(path, own)):
        return problem
    if view is not None and gram.shape[-1] != view.in_dim:
        return (
            f"{path!r}: the statistic 'gram' has shape {tuple(gram.shape)}, but the weight has "
            f"{view.in_dim} inputs. These statistics belong to another model; calibrate this one."
        )
    if count is None or isinstance(count, Tracer | jax.ShapeDtypeStruct):
        return None
    empty = on_host(count) == 0
    if not empty.any():
        return None
    return (
        f"{path!r}: no calibration token reached it{places_of(empty)}. Calibrate on more data, or "
        f"pass {argument}='nearest'."
    )


def _unfit(path: Path, delta: Any, flat: Flat) -> str | None:
    if path not in flat:
        return (
            f"{path!r}: is no leaf of params. The nearest paths: {nearest(path, flat)}. Deltas go "
            "by the paths of the weights that they are added to."
        )
    weight = flat[path]
    if tuple(jnp.shape(delta)) != tuple(jnp.shape(weight)):
        return (
            f"{path!r}: the delta has shape {tuple(jnp.shape(delta))}, but the weight "
            f"{tuple(jnp.shape(weight))}. They must be equal."
        )
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        return f"{path!r}: is {weight.dtype}, not floating. Leave it out of the deltas."
    if is_weight(weight) and (reason := why_not_requantizable(weight)):
        return f"{path!r}: {reason}"
    return None


def _dense_view(path: Path, leaf: Any, stats: Stats | None) -> View | None:
    axes = None if stats is None else stats.layout.get(path)
    return None if axes is None else View.of(leaf.shape, axes)


def _stack_energy(matrix: jax.Array, gram: jax.Array) -> jax.Array:
    matrix = columns_like_gram(matrix, gram)
    energy = lambda one: output_error(one[0], jnp.zeros_like(one[0]), one[1])  # noqa: E731
    return jnp.sum(map_over_stack(energy, (matrix, gram), matrix.shape[:-2]))


def _widest(weight: Any) -> jax.Array:
    """The dense weight in float32, unrounded where its representation allows that."""
    cast = weight.astype(jnp.float32)
    return materialize(weight if cast is None else cast).astype(jnp.float32)
