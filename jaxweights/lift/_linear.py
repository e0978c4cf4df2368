"""Rules for primitives that contract, look up, slice or rearrange a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.lift import _compat
from jaxweights.lift._lookup import row_column
from jaxweights.lift._walk import Named, Walk, rule


@rule("dot_general")
def _dot_general(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    params = eqn.params
    left, right = values
    if params.get("out_sharding") is not None:
        return None
    if isinstance(left, Named) and isinstance(right, Named):
        left = walk.dense(left, "dot_general")
    (left_contract, right_contract), (left_batch, right_batch) = params["dimension_numbers"]
    weight_first = isinstance(left, Named)
    operands: tuple[Any, Any] = (left, right) if weight_first else (right, left)
    named, x = operands
    numbers = params["dimension_numbers"]
    if weight_first:
        numbers = ((right_contract, left_contract), (right_batch, left_batch))
    walk.observe(named, x, "dot", {"dimension_numbers": numbers})
    y = named.weight.dot(
        x,
        numbers,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    if y is None:
        return None
    if weight_first:
        # The weight's free axes come first when it stands on the left.
        batch = len(left_batch)
        x_free = x.ndim - batch - len(right_contract)
        y = jnp.moveaxis(y, range(batch, batch + x_free), range(y.ndim - x_free, y.ndim))
    return [y]


@rule(_compat.RAGGED_DOT_NAME)
def _ragged_dot(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    x, named, group_sizes = values
    params = eqn.params
    if not isinstance(named, Named) or isinstance(x, Named) or not _is_plain_ragged(params):
        return None
    x = jnp.asarray(x)
    walk.observe(named, x, "ragged_dot", {"group_sizes": group_sizes})
    y = named.weight.ragged_dot(
        x,
        group_sizes,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return None if y is None else [y]


def _is_plain_ragged(params: dict[str, Any]) -> bool:
    """Whether it is `lax.ragged_dot`: rows sorted by group, one matrix a group."""
    numbers = params["ragged_dot_dimension_numbers"]
    return (
        numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and params.get("group_offset") is None
    )


@rule("conv_general_dilated")
def _conv(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    x, named = values
    if isinstance(x, Named):
        return None
    walk.observe(named, x, "conv", dict(eqn.params))
    y = named.weight.conv(x, **eqn.params)
    return None if y is None else [y]


@rule("gather")
def _gather(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """Looks up entries of axis 0: an embedding's rows, or matrices of a stack."""
    del walk
    named, indices = values
    if not isinstance(named, Named) or isinstance(indices, Named):
        return None
    params, weight = eqn.params, named.weight
    numbers = params["dimension_numbers"]
    column = row_column(params, weight.shape)
    rows = indices.ndim - 1
    collapsed = tuple(numbers.collapsed_slice_dims)
    kept = range(rows, rows + weight.ndim - len(collapsed))
    if column is None or collapsed not in ((0,), ()) or tuple(numbers.offset_dims) != tuple(kept):
        return None
    positions, last = indices[..., column], weight.shape[0] - 1
    mode = params["mode"]
    fills = mode == jax.lax.GatherScatterMode.FILL_OR_DROP
    safe = jnp.clip(positions, 0, last)
    if weight.stack_shape and rows == 1 and collapsed and not fills:
        return named.become(weight.take_stack(safe))
    y = weight.take(safe)
    if y is None:
        return None
    if fills:
        fill = params["fill_value"]
        fill = jnp.nan if fill is None else fill
        inside = (positions >= 0) & (positions <= last)
        y = jnp.where(inside.reshape(*inside.shape, *[1] * (weight.ndim - 1)), y, fill)
    return [y.astype(weight.dtype).reshape(eqn.outvars[0].aval.shape)]


@rule("slice")
def _slice(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """A range of layers."""
    del walk
    (named,) = values
    starts = eqn.params["start_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    sizes = eqn.outvars[0].aval.shape
    if tuple(sizes[1:]) != tuple(named.weight.shape[1:]):
        return None
    return named.become(named.weight.slice_stack(starts[0], sizes[0], strides[0]))


@rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """A range of layers that starts at a traced index, or one row of a table."""
    del walk
    named, start = values[:2]
    sizes = eqn.params["slice_sizes"]
    # A slice as long as its axis starts at 0 whatever its index says.
    if isinstance(start, Named) or tuple(sizes[1:]) != tuple(named.weight.shape[1:]):
        return None
    layers = named.weight.slice_stack(start, sizes[0])
    if layers is None and sizes[0] == 1:
        row = named.weight.take(jnp.clip(start, 0, named.weight.shape[0] - 1)[None])
        return None if row is None else [row.astype(named.weight.dtype)]
    return named.become(layers)


@rule("rev")
def _rev(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """Layers in the opposite order."""
    del walk
    weight = values[0].weight.tracked()
    if tuple(eqn.params["dimensions"]) != (0,) or not weight.stack_shape:
        return None
    return values[0].become(jax.tree.map(lambda field: jnp.flip(field, axis=0), weight))


@rule("squeeze")
def _squeeze(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    del walk
    (named,) = values
    weight, dimensions = named.weight, tuple(eqn.params["dimensions"])
    if dimensions == (0,) and (squeezed := weight.squeeze_stack()) is not None:
        return named.become(squeezed)
    shape = [n for axis, n in enumerate(weight.shape) if axis not in dimensions]
    return named.become(weight.reshape(shape))


@rule("transpose")
def _transpose(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    del walk
    return values[0].become(values[0].weight.transpose(eqn.params["permutation"]))


@rule("reshape")
def _reshape(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    del walk
    if eqn.params["dimensions"] is not None:
        return None
    return values[0].become(values[0].weight.reshape(eqn.params["new_sizes"]))


@rule("convert_element_type")
def _astype(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    del walk
    new = eqn.params["new_dtype"]
    # Dtypes of 8 bits and fewer are cast to for the sake of rounding, which a weight does not do.
    if not jnp.issubdtype(new, jnp.floating) or jnp.finfo(new).bits < 16:
        return None
    return values[0].become(values[0].weight.astype(eqn.params["new_dtype"]))


@rule("stop_gradient")
def _stop_gradient(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    del walk, eqn
    return values[0].become(jax.tree.map(jax.lax.stop_gradient, values[0].weight))


@rule("optimization_barrier")
def _barrier(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any]:
    del walk, eqn
    return jax.lax.optimization_barrier(values)


@rule("copy", "copy_p", "name", "sharding_constraint")
def _unchanged(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any]:
    del walk, eqn
    return [values[0]]


@rule(_compat.PVARY_NAME)
def _pvary(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """Inside `shard_map`: a replicated weight meets activations that differ between devices."""
    del walk
    vary = lambda field: _compat.pvary(field, eqn.params["axes"])  # noqa: E731
    return values[0].become(jax.tree.map(vary, values[0].weight))
