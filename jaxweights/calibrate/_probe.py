"""Probe: a weight that shows what it is multiplied with; and the statistics of that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxweights.core import Statistic
from jaxweights.core._stats import combine
from jaxweights.lift import Named
from jaxweights.weights import View, Weight
from jaxweights.weights._weight import (
    activations_as_rows,
    matrix_parts,
    static,
    weight_dataclass,
)

HIGHEST = jax.lax.Precision.HIGHEST
Record = dict[Statistic, jax.Array]


@weight_dataclass
class Probe(Weight):
    """Stands for a weight during calibration and computes like it.

    Args:
      base: The weight, dense or represented.
      start: Where on the leading stack axis an indexed part lies, int32 scalar; None for the whole.
      view: Its axes.
      wanted: Statistics to collect.
      part_of: Length of the leading stack axis that `start` counts on; 0 for the whole.
      squeezed: Whether the indexed part has lost its stack axis.
    """

    base: Any
    start: Any
    view: View = static()
    wanted: frozenset[Statistic] = static()
    part_of: int = static(0)
    squeezed: bool = static(False)

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
        if self.part_of:  # `start` would be sliced with them
            return ()
        if isinstance(self.base, Weight):
            return self.base.stack_shape
        axes = self.view.stack_axes(self.ndim)
        return tuple(self.shape[axis] for i, axis in enumerate(axes) if i == axis)

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return self.base.materialize() if isinstance(self.base, Weight) else self.base

    def astype(self, dtype: DTypeLike) -> Weight | None:
        """The probe of the weight in another dtype."""
        return self._with(self.base.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """The probe of the permuted weight."""
        view = self.view.transposed(self.ndim, permutation)
        if view is None:
            return None
        dense = isinstance(self.base, Weight)
        base = self.base.transpose(permutation) if dense else jnp.transpose(self.base, permutation)
        return self._with(base, view)

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """The probe of the reshaped weight, where its matrix stays the same."""
        view = self.view.reshaped(self.shape, shape)
        return None if view is None else self._with(self.base.reshape(shape), view)

    def slice_stack(self, start: Any, size: int, stride: int = 1) -> Weight | None:
        """The probe of some layers, which remembers where they lie."""
        if not self.stack_shape or stride != 1:
            return None
        length = self.shape[0]
        if isinstance(self.base, Weight):
            base = self.base.slice_stack(start, size)
        else:
            base = jax.lax.dynamic_slice_in_dim(self.base, start, size, axis=0)
        if base is None:
            return None
        start = jnp.asarray(start, jnp.int32)
        return dataclasses.replace(self, base=base, start=start, part_of=length)

    def squeeze_stack(self) -> Weight | None:
        """The probe of a single layer."""
        if not self.part_of or self.squeezed:
            return None
        base = self.base.squeeze_stack() if isinstance(self.base, Weight) else self.base[0]
        return None if base is None else dataclasses.replace(self, base=base, squeezed=True)

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
        if parts is None or base is None:
            return None
        return dataclasses.replace(
            self, base=base, start=None if self.start is None else PartitionSpec()
        )

    def as_part(self, shape: tuple[int, ...]) -> Probe:
        """Tells a represented base the shape of the part."""
        base = self.base.as_part(shape) if isinstance(self.base, Weight) else self.base
        return dataclasses.replace(self, base=base, view=View.of(shape, self.view.axes))

    def unstacked(self) -> Weight:
        """One slice of a scan."""
        return self._with(self.base.unstacked()) if isinstance(self.base, Weight) else self

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


def observe(named: Named, x: jax.Array, kind: str, params: dict[str, Any], mask: Any) -> Any:
    """Statistics of one product of activations with a probed weight.

    Args:
      named: The weight.
      x: Activations.
      kind: `"dot"`, `"ragged_dot"` or `"conv"`.
      params: Parameters of the product.
      mask: True where a token counts, over the leading free axes of the activations; or None.

    Returns:
      The record, or None where the weight is no probe or this is not the product of its layout.
    """
    probe = named.weight
    if not isinstance(probe, Probe):
        return None
    if kind == "ragged_dot":
        return place(probe, ragged_statistics(x, params["group_sizes"], probe))
    if kind == "conv":
        rows = patches_as_rows(named.path, x, probe, params)
        return place(probe, statistics(rows, None, probe.wanted))
    found = activations_as_rows(probe.view, probe.ndim, x, params["dimension_numbers"])
    if found is None or found.transposed:
        return None
    stacked = found.x.ndim > 2
    weights = token_weights(named.path, found.free_shape, mask, stacked)
    if stacked:
        # Dispatching experts leaves empty slots at zero: a row of zeros is no token.
        filled = jnp.any(found.x != 0, axis=-1)
        weights = filled if weights is None else filled & weights
    record = statistics(found.x, weights, probe.wanted)
    # Matrices of a stack that all see the same activations have the same statistics.
    own = len(found.x.shape) - 2
    stack = tuple(probe.shape[axis] for axis in probe.view.stack_axes(probe.ndim))
    record = {
        name: jnp.broadcast_to(value, (*stack, *value.shape[own:]))
        for name, value in record.items()
    }
    return place(probe, record)


def statistics(rows: jax.Array, keep: jax.Array | None, wanted: frozenset[Statistic]) -> Record:
    """Statistics of activations `(*stack, tokens, in)`.

    Args:
      rows: Activations.
      keep: Which rows count, `(*stack, tokens)` bool, or None for all.
      wanted: Names of statistics.

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
    record: Record = {"count": count}
    if "sum" in wanted:
        record["sum"] = jnp.sum(x, axis=-2)
    if "gram" in wanted:
        # The squares are its diagonal, so `second_moment` is read off it.
        record["gram"] = jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision=HIGHEST)
    elif "second_moment" in wanted:
        record["second_moment"] = jnp.sum(jnp.square(x), axis=-2)
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


def patches_as_rows(path: str, x: jax.Array, probe: Probe, params: dict[str, Any]) -> jax.Array:
    """The windows that a convolution multiplies with its kernel, `(windows, in)`."""
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise ValueError(
            f"calibrate: {path!r}: this convolution has {params['feature_group_count']} feature "
            "groups, so its outputs do not share one input. Statistics need an ungrouped "
            "convolution; leave this weight out with `partition`."
        )
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
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    # Patches are laid out (channel, *window); the kernel's inputs in the order of its view.
    patches = patches.reshape(-1, probe.shape[channel_axis], *spatial)
    held = [channel_axis, *spatial_axes]
    order = [1 + held.index(axis % probe.ndim) for axis in probe.view.axes.inputs]
    return jnp.transpose(patches, (0, *order)).reshape(patches.shape[0], -1)


def token_weights(
    path: str, free_shape: tuple[int, ...], mask: jax.Array | None, stacked: bool
) -> jax.Array | None:
    """Which rows a padding mask keeps, for activations whose free axes have this shape."""
    if mask is None:
        return None
    tokens = math.prod(free_shape)
    if free_shape[: mask.ndim] == mask.shape:
        rest = free_shape[mask.ndim :]
        return jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * len(rest)), free_shape).reshape(-1)
    if tokens == mask.size:
        return mask.reshape(-1)
    if free_shape[:1] == mask.shape[:1]:  # pooled: one row an example
        kept = jnp.any(mask.reshape(mask.shape[0], -1), axis=1)
        return jnp.broadcast_to(kept.reshape(-1, *[1] * (len(free_shape) - 1)), free_shape).reshape(
            -1
        )
    if stacked:  # dispatched to experts: empty slots show themselves
        return None
    raise ValueError(
        f"calibrate: {path!r}: its activations have free axes {free_shape}, so the mask "
        f"{mask.shape} does not tell which are padding. Give the mask the leading axes of the "
        "tokens, or remove padding from the batches and pass no mask."
    )


def place(probe: Probe, record: Record) -> Record:
    """Puts the statistics of indexed layers where they belong in the whole stack."""
    if not probe.part_of:
        return record

    def put(name: Statistic, value: jax.Array) -> jax.Array:
        value = value[None] if probe.squeezed else value
        whole = neutral(name, jax.ShapeDtypeStruct((probe.part_of, *value.shape[1:]), value.dtype))
        return jax.lax.dynamic_update_slice_in_dim(whole, value, probe.start, axis=0)

    return {name: put(name, value) for name, value in record.items()}


def neutral(name: Statistic, like: Any) -> jax.Array:
    """The statistic of no data."""
    fill = {"min": np.inf, "max": -np.inf}.get(name, 0)
    return jnp.full(like.shape, fill, like.dtype)


def neutral_record(like: Record) -> Record:
    """The statistics of no data, in the shapes of a record."""
    return {name: neutral(name, value) for name, value in like.items()}


def combine_records(first: Record, second: Record) -> Record:
    """The statistics of two uses, or of two batches, together."""
    return {name: combine(name, value, second[name]) for name, value in first.items()}
