"""Probe: a weight that shows what it is multiplied with; and the statistics of that."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core import Statistic
from jaxweights.core._stats import combine
from jaxweights.lift import _compat
from jaxweights.lift._walk import Named
from jaxweights.weights import InputChange, View, Weight
from jaxweights.weights._matrix_weight import activations_as_rows, matrix_parts
from jaxweights.weights._weight import static, weight_dataclass

HIGHEST = jax.lax.Precision.HIGHEST
Record = dict[Statistic, jax.Array]


@weight_dataclass
class Probe(Weight):
    """Stands for a weight during calibration and computes like it.

    Args:
      base: The weight, dense or represented.
      index: Where in the flattened leading stack of the whole weight each matrix of a part
        lies, int32 of the part's leading stack axes; None for the whole.
      view: Its axes.
      wanted: Statistics to collect.
      part_of: Leading stack axes of the whole weight; empty for the whole.
    """

    base: Any
    index: Any
    view: View = static()
    wanted: frozenset[Statistic] = static()
    part_of: tuple[int, ...] = static(default=())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:  # type: ignore[override]
        """Dtype of the weight."""
        return self.base.dtype

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading stack axes that a scan may slice."""
        if isinstance(self.base, Weight):
            return self.base.stack_shape
        axes = self.view.stack_axes(self.ndim)
        return tuple(self.shape[axis] for i, axis in enumerate(axes) if i == axis)

    @property
    def is_part(self) -> bool:
        """Whether its records are of the whole weight, though it is a part of it."""
        return bool(self.part_of)

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return self.base.materialize() if isinstance(self.base, Weight) else self.base

    def astype(self, dtype: DTypeLike) -> Weight | None:
        """The probe of the weight in another dtype."""
        return self._with(self.base.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """The probe of the permuted weight."""
        view = self.view.transposed(self.ndim, permutation)
        if view is None or (
            self.is_part and tuple(permutation[: self.index.ndim]) != tuple(range(self.index.ndim))
        ):
            return None
        represented = isinstance(self.base, Weight)
        base = (
            self.base.transpose(permutation)
            if represented
            else jnp.transpose(self.base, permutation)
        )
        return self._with(base, view)

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """The probe of the reshaped weight, where its matrices stay the same."""
        view = self.view.reshaped(self.shape, shape)
        if view is None:
            return Weight.reshape_stack(self.tracked(), shape)
        return self._with(self.base.reshape(shape), view)

    def slice_stack(self, start: Any, size: int, stride: int = 1) -> Weight | None:
        """The probe of some layers, which remembers where they lie."""
        return Weight.slice_stack(self.tracked(), start, size, stride)

    def take_stack(self, indices: jax.Array) -> Weight | None:
        """The probe of chosen layers, which remembers where they lie."""
        return Weight.take_stack(self.tracked(), indices)

    def tracked(self) -> Probe:
        """The probe as a part that is the whole stack."""
        if self.is_part or not self.stack_shape:
            return self
        stack = self.stack_shape
        index = jnp.arange(math.prod(stack), dtype=jnp.int32).reshape(stack)
        return dataclasses.replace(self, index=index, part_of=stack)

    def partition(self, spec: Any, mesh: Any) -> Probe | None:
        """Splits the weight, whose inputs every device must see whole."""
        parts = matrix_parts(self.view, self.ndim, spec)
        if parts is not None and parts[-2] is not None:
            raise ValueError(
                f"calibrate: a weight {self.shape} has its input axis split by shard_map, as "
                f"{spec}: no device sees its whole inputs. Calibrate the model under jit with "
                "sharded arrays instead."
            )
        base = self.base.partition(spec, mesh) if isinstance(self.base, Weight) else spec
        if parts is None or base is None or self.is_part:
            return None
        return dataclasses.replace(self, base=base)

    def dot(self, x: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array | None:
        """The weight's own product."""
        if isinstance(self.base, Weight):
            return self.base.dot(x, dimension_numbers, **options)
        return jax.lax.dot_general(x, self.base, dimension_numbers, **options)

    def take(self, indices: jax.Array) -> jax.Array | None:
        """The weight's own rows."""
        if isinstance(self.base, Weight):
            return self.base.take(indices)
        return jnp.take(self.base, indices, axis=0, mode="clip")

    def _with(self, base: Any, view: View | None = None) -> Probe | None:
        if base is None:
            return None
        return dataclasses.replace(self, base=base, view=view or self.view)


def observe(
    named: Named,
    x: jax.Array,
    kind: str,
    params: dict[str, Any],
    *,
    mask: Any,
    reference: Callable[[str], jax.Array] | None = None,
) -> Any:
    """Statistics of one product of activations with a probed weight.

    Args:
      named: The weight.
      x: Activations.
      kind: `"dot"`, `"ragged_dot"` or `"conv"`.
      params: Parameters of the product.
      mask: True where a token counts, over the leading free axes of the activations; or None.
      reference: Gives the rows of the same product in another model, by path, for `cross_gram`.

    Returns:
      The record, or None where the weight is no probe or this is not the product of its layout.
    """
    probe = named.weight
    if not isinstance(probe, Probe):
        return None
    paired = None
    if reference is not None and "cross_gram" in probe.wanted:
        paired = functools.partial(reference, named.path)
    if kind == "ragged_dot":
        for change in input_changes(probe.base):
            x = change.changed_ragged(x, params["group_sizes"])
        if mask is not None:
            raise ValueError(
                f"calibrate: {named.path!r}: its tokens are sorted by expert, so the mask "
                f"{mask.shape} does not tell which are padding. {_NO_MASK}"
            )
        return place(probe, ragged_statistics(x, params["group_sizes"], probe))
    if kind == "conv":
        rows, windows = patches_as_rows(named.path, x, probe, params)
        rows = changed_rows(probe.base, rows)
        weights = token_weights(named.path, windows, mask)
        return place(probe, statistics(rows, weights, probe.wanted, paired))
    found = activations_as_rows(probe.view, probe.ndim, x, params["dimension_numbers"])
    if found is None or found.transposed:
        return None
    found = found._replace(x=changed_rows(probe.base, found.x))
    stacked = found.x.ndim > 2
    weights = token_weights(named.path, found.free_shape, mask)
    if stacked:
        # Dispatching experts leaves empty slots at zero: a row of zeros is no token.
        filled = jnp.any(found.x != 0, axis=-1)
        weights = filled if weights is None else filled & weights
    record = statistics(found.x, weights, probe.wanted, paired)
    # Matrices of a stack that all see the same activations have the same statistics.
    own = len(found.x.shape) - 2
    stack = tuple(probe.shape[axis] for axis in probe.view.stack_axes(probe.ndim))
    record = {
        name: jnp.broadcast_to(value, (*stack, *value.shape[own:]))
        for name, value in record.items()
    }
    return place(probe, record)


def input_changes(weight: Any) -> list[InputChange]:
    """What inputs go through before the innermost base meets them, in this order."""
    found = []
    while isinstance(weight, InputChange):
        found.append(weight)
        weight = weight.base
    return found


def changed_rows(weight: Any, rows: jax.Array) -> jax.Array:
    """Rows `(*stack, tokens, in)` as the innermost base meets them."""
    for change in input_changes(weight):
        rows = change.change(rows)
    return rows


def statistics(
    rows: jax.Array,
    keep: jax.Array | None,
    wanted: frozenset[Statistic],
    paired: Callable[[], jax.Array] | None = None,
) -> Record:
    """Statistics of activations `(*stack, tokens, in)`.

    Args:
      rows: Activations.
      keep: Which rows count, `(*stack, tokens)` bool, or None for all.
      wanted: Names of statistics.
      paired: Gives the rows of the same tokens in a reference model, for `cross_gram`.

    Returns:
      The wanted statistics and `count`, summed in float32.
    """
    x = rows.astype(jnp.float32)
    if keep is None:
        count = jnp.full(x.shape[:-2], x.shape[-2], jnp.int32)
    else:
        keep = jnp.broadcast_to(keep, x.shape[:-1])
        count = jnp.sum(keep, axis=-1, dtype=jnp.int32)
        x = jnp.where(keep[..., None], x, 0)
    # Though it is one number on all devices of a `shard_map`, it counts what differs between them.
    record: Record = {"count": _compat.pvary(count, _compat.varying_axes(x))}
    if "sum" in wanted:
        record["sum"] = jnp.sum(x, axis=-2)
    if "abs_sum" in wanted:
        record["abs_sum"] = jnp.sum(jnp.abs(x), axis=-2)
    if "gram" in wanted:
        # The squares are its diagonal, so `second_moment` is read off it.
        record["gram"] = jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision=HIGHEST)
    elif "second_moment" in wanted:
        record["second_moment"] = jnp.sum(jnp.square(x), axis=-2)
    if paired is not None:
        other = paired().astype(jnp.float32)
        other = other if keep is None else jnp.where(keep[..., None], other, 0)
        record["cross_gram"] = jnp.matmul(jnp.swapaxes(x, -1, -2), other, precision=HIGHEST)
    for name, extreme, beyond in (("min", jnp.min, jnp.inf), ("max", jnp.max, -jnp.inf)):
        if name in wanted:
            shown = x if keep is None else jnp.where(keep[..., None], x, beyond)
            record[name] = extreme(shown, axis=-2, initial=beyond)
    return record


def ragged_statistics(x: jax.Array, group_sizes: jax.Array, probe: Probe) -> Record:
    """Statistics per expert of activations sorted by expert, as `lax.ragged_dot` takes them."""
    ends = jnp.cumsum(group_sizes)
    position = jnp.arange(x.shape[0])

    def one(bounds: tuple[jax.Array, jax.Array]) -> Record:
        start, end = bounds
        return statistics(x, (position >= start) & (position < end), probe.wanted)

    return jax.lax.map(one, (ends - group_sizes, ends))


def patches_as_rows(
    path: str, x: jax.Array, probe: Probe, params: dict[str, Any]
) -> tuple[jax.Array, tuple[int, ...]]:
    """The windows that a convolution multiplies with its kernel, as rows, and their axes.

    Returns:
      Rows `(windows, in)`, with feature groups `(groups, windows, in)`; and the axes of `windows`.
    """
    if params["batch_group_count"] != 1:
        raise ValueError(
            f"calibrate: {path!r}: this convolution has {params['batch_group_count']} batch "
            "groups, so each output sees some examples only. Statistics need a convolution of all "
            "examples with the whole kernel; leave this weight out with `partition`."
        )
    groups = params["feature_group_count"]
    numbers = params["dimension_numbers"]
    _, channel_axis, *spatial_axes = numbers.rhs_spec
    spatial = tuple(probe.shape[axis] for axis in spatial_axes)
    patches = jax.lax.conv_general_dilated_patches(
        x,
        spatial,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            numbers.lhs_spec, tuple(range(len(numbers.rhs_spec))), numbers.out_spec
        ),
        precision=HIGHEST,
    )
    batch_axis, channels, *positions = numbers.out_spec
    patches = jnp.transpose(patches, (batch_axis, *positions, channels))
    windows = tuple(patches.shape[:-1])
    # Patches are laid out (channel, *window), channels by group; the kernel's inputs in the order
    # of its view.
    count = math.prod(windows)
    patches = patches.reshape(count, groups, probe.shape[channel_axis], *spatial)
    held = [channel_axis, *spatial_axes]
    order = [2 + held.index(axis % probe.ndim) for axis in probe.view.axes.inputs]
    rows = jnp.transpose(patches, (1, 0, *order))
    apart = () if groups == 1 else (groups,)
    return rows.reshape(*apart, count, probe.view.in_dim), windows


_NO_MASK = "Remove padding from the batches and pass no mask, or leave this weight out."


def token_weights(
    path: str, free_shape: tuple[int, ...], mask: jax.Array | None
) -> jax.Array | None:
    """Which rows a padding mask keeps, for activations whose free axes have this shape."""
    if mask is None:
        return None
    if free_shape[: mask.ndim] == mask.shape:
        kept, rest = mask, free_shape[mask.ndim :]
    elif free_shape[:1] == (mask.size,):  # tokens of all examples in one axis
        kept, rest = mask.reshape(-1), free_shape[1:]
    elif math.prod(free_shape) == mask.shape[0] and free_shape[0] == mask.shape[0]:
        kept, rest = jnp.any(mask.reshape(mask.shape[0], -1), axis=1), free_shape[1:]  # pooled
    else:
        raise ValueError(
            f"calibrate: {path!r}: its activations have free axes {free_shape}, so the mask "
            f"{mask.shape} does not tell which are padding. Give the mask the leading axes of the "
            f"tokens. {_NO_MASK}"
        )
    return jnp.broadcast_to(kept.reshape(*kept.shape, *[1] * len(rest)), free_shape).reshape(-1)


def place(probe: Probe, record: Record) -> Record:
    """Puts the statistics of a part where they belong in the whole stack."""
    if not probe.is_part:
        return record
    count, index = math.prod(probe.part_of), probe.index

    def put(name: Statistic, value: jax.Array) -> jax.Array:
        rest = value.shape[index.ndim :]
        whole = neutral(name, value, (count, *rest))
        if not index.ndim:
            whole = jax.lax.dynamic_update_index_in_dim(whole, value, index, axis=0)
        else:  # a matrix may have been chosen more than once
            at = whole.at[index.reshape(-1)]
            method = {"min": at.min, "max": at.max}.get(name, at.add)
            whole = method(value.reshape(-1, *rest), mode="promise_in_bounds")
        return whole.reshape(*probe.part_of, *rest)

    return {name: put(name, value) for name, value in record.items()}


def neutral(name: Statistic, like: Any, shape: tuple[int, ...] | None = None) -> jax.Array:
    """The statistic of no data, like another one."""
    fill = {"min": np.inf, "max": -np.inf}.get(name, 0)
    value = jnp.full(like.shape if shape is None else shape, fill, like.dtype)
    return _compat.pvary(value, _compat.varying_axes(like))


def neutral_record(like: Record) -> Record:
    """The statistics of no data, in the shapes of a record."""
    return {name: neutral(name, value) for name, value in like.items()}


def combine_records(first: Record, second: Record) -> Record:
    """The statistics of two uses, or of two batches, together."""
    return {name: combine(name, value, second[name]) for name, value in first.items()}
