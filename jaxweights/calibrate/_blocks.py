"""Layer after layer: a scanned model taken apart, one layer's statistics in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxweights.calibrate._calibrate import (
    Batch,
    Mask,
    Progress,
    _arguments,
    _assign,
    _merged_layout,
    calibrate,
    refuse_incomplete,
)
from jaxweights.calibrate._probe import Probe, combine_records, neutral_record, observe
from jaxweights.core import Context, Layout, Params, Path, Stats, Transform, flatten, unflatten
from jaxweights.core._apply import LayoutLike
from jaxweights.lift import _compat
from jaxweights.lift._infer_layout import trace_model
from jaxweights.lift._walk import Named, Walk
from jaxweights.weights import View, is_weight


@dataclasses.dataclass(frozen=True)
class ScannedModel:
    """A model, divided at the scan over its layers.

    Args:
      before: `(leaves, inputs) -> operands of the scan` (constants, carried values, stacks).
      body: Jaxpr of one layer.
      body_consts: Its constants.
      parts: How the operands divide.
      length: Number of layers.
      stacks: Path of the parameter behind each stacked operand; None where it is not one.
    """

    before: Callable[[list[Any], list[Any]], list[Any]]
    body: Any
    body_consts: list[Any]
    parts: _compat.ScanParts
    length: int
    stacks: tuple[Path | None, ...]


def transform_blocks(
    fn: Callable[..., Any],
    params: Params,
    batches: Sequence[Batch],
    tx: Transform,
    *,
    layout: LayoutLike,
    mask: Mask | None,
    key: jax.Array | None,
    progress: Progress | None,
) -> Params:
    """Transforms a scanned model layer by layer, then what lies outside its layers.

    Every layer is calibrated on the activations that the transformed layers before it give.
    """
    flat, treedef = flatten(params)
    trace = trace_model(fn, params, _arguments(batches[0]))
    axes = _merged_layout(trace.layout, layout, list(flat))
    model = _find_layers(fn, flat, treedef, batches[0])
    inside = {path for path in model.stacks if path is not None}
    needs = tx.needs(params)
    block_needs = {path: names for path, names in needs.items() if path in inside}
    first = {path: jax.tree.map(lambda x: x[0], flat[path]) for path in inside}
    wanted, owners = _assign(block_needs, first, axes, dict(trace.owners))

    before = jax.jit(model.before)
    states = [before(list(flat.values()), _array_leaves(batch)) for batch in batches]
    masks = [None if mask is None else jnp.asarray(mask(batch), bool) for batch in batches]
    n_front = model.parts.consts + model.parts.carry

    @jax.jit
    def collect(block: dict[Path, Any], state: list[Any], layer: jax.Array, keep: Any) -> Any:
        probed = {
            path: Probe(leaf, None, View.of(leaf.shape, axes[path]), wanted[path])
            if path in wanted
            else leaf
            for path, leaf in block.items()
        }
        walk = Walk(
            observer=lambda *product: observe(*product, mask=keep),
            combine=combine_records,
            identity=neutral_record,
        )
        _run_layer(walk, model, probed, state, layer)
        refuse_incomplete(walk, wanted)
        return dict(walk.records)

    @jax.jit
    def advance(block: dict[Path, Any], state: list[Any], layer: jax.Array) -> list[Any]:
        outs = _run_layer(Walk(), model, block, state, layer)
        carry = outs[: model.parts.carry]
        return [*state[: model.parts.consts], *carry, *state[n_front:]]

    blocks = []
    for layer in range(model.length):
        index = jnp.asarray(layer, jnp.int32)
        block = {path: jax.tree.map(lambda x: x[layer], flat[path]) for path in inside}  # noqa: B023
        total: Any = None
        for state, keep in zip(states, masks, strict=True):
            records = collect(block, state, index, keep)
            if total is None:
                total = records
            else:
                total = {p: combine_records(total[p], record) for p, record in records.items()}
        stats = Stats(total or {}, tuple(owners.items()), axes)
        layer_key = None if key is None else jax.random.fold_in(key, layer)
        block = _apply_inside(tx, flat | block, inside, stats, axes, layer_key)
        states = [advance(block, state, index) for state in states]
        blocks.append(block)
        if progress is not None:
            progress("layers", layer + 1, model.length)

    flat |= {
        path: jax.tree.map(lambda *parts: jnp.stack(parts), *(block[path] for block in blocks))
        for path in inside
    }
    outside = set(flat) - inside
    rest = {path: names for path, names in needs.items() if path in outside and path in axes}
    stats = Stats({}, (), axes)
    if rest:
        new_params = unflatten(treedef, flat)
        stats = calibrate(fn, new_params, batches, needs=rest, layout=axes, mask=mask)
    flat |= _apply_inside(tx, flat, outside, stats, axes, key)
    return unflatten(treedef, flat)


def _apply_inside(
    tx: Transform,
    flat: dict[Path, Any],
    inside: set[Path],
    stats: Stats,
    layout: Layout,
    key: jax.Array | None,
) -> dict[Path, Any]:
    """Applies a transform to some leaves; its rules see the names of all."""
    context = Context(stats=stats, key=key, layout=layout, only=frozenset(inside))
    new, _ = tx.update(flat, tx.init(flat), context)
    return {path: new[path] for path in inside}


def _run_layer(
    walk: Walk, model: ScannedModel, block: dict[Path, Any], state: list[Any], layer: jax.Array
) -> list[Any]:
    n_front = model.parts.consts + model.parts.carry
    slices = [
        block[path]
        if path is not None
        else jax.lax.dynamic_index_in_dim(operand, layer, keepdims=False)
        for operand, path in zip(state[n_front:], model.stacks, strict=True)
    ]
    named = [
        Named(x, path) if path is not None and is_weight(x) else x
        for x, path in zip(slices, model.stacks, strict=True)
    ]
    outs = walk.run(model.body, model.body_consts, [*state[:n_front], *named])
    return [walk.dense(out, "scan") for out in outs]


def _array_leaves(batch: Batch) -> list[Any]:
    return [x for x in jax.tree.leaves(_arguments(batch)) if hasattr(x, "dtype")]


def _find_layers(
    fn: Callable[..., Any], flat: dict[Path, Any], treedef: Any, batch: Batch
) -> ScannedModel:
    """Traces the model and divides it at the scan that slices the most parameters."""
    inputs, input_tree = jax.tree.flatten(_arguments(batch))
    arrays = [i for i, x in enumerate(inputs) if hasattr(x, "dtype")]

    def run(leaves: list[Any], given: list[Any]) -> list[Any]:
        filled = list(inputs)
        for i, x in zip(arrays, given, strict=True):
            filled[i] = x
        tree = unflatten(treedef, dict(zip(flat, leaves, strict=True)))
        out = fn(tree, *jax.tree.unflatten(input_tree, filled))
        return [x for x in jax.tree.leaves(out) if hasattr(x, "dtype")]

    leaves = [_compat.shape_of(x) for x in flat.values()]
    given = [_compat.shape_of(inputs[i]) for i in arrays]
    closed = jax.make_jaxpr(run)(leaves, given)
    closed = jax.make_jaxpr(lambda *xs: _inline(closed.jaxpr, closed.consts, xs))(*leaves, *given)
    jaxpr = closed.jaxpr
    path_of = dict(zip(jaxpr.invars, flat, strict=False))

    def stacks(eqn: Any) -> tuple[Path | None, ...]:
        parts = _compat.scan_parts(eqn.params)
        operands = eqn.invars[parts.consts + parts.carry :]
        return tuple(
            None if isinstance(var, _compat.Literal) else path_of.get(var) for var in operands
        )

    scans = [
        (sum(path is not None for path in stacks(eqn)), i)
        for i, eqn in enumerate(jaxpr.eqns)
        if eqn.primitive is _compat.SCAN
    ]
    if not scans or max(scans)[0] == 0:
        raise ValueError(
            "pipeline: block_by_block needs a model that scans over its stacked layers, with the "
            "parameters as they are; this one has no such scan. Stack the layers, or use "
            "block_by_block=False."
        )
    at = max(scans)[1]
    eqn = jaxpr.eqns[at]
    operands = [var for var in eqn.invars if not isinstance(var, _compat.Literal)]
    head = jex.Jaxpr(
        jaxpr.constvars,
        jaxpr.invars,
        operands,
        jaxpr.eqns[:at],
        debug_info=jaxpr.debug_info._replace(result_paths=None),
    )
    head_fn = jex.jaxpr_as_fun(jex.ClosedJaxpr(head, closed.consts))

    def before(leaves: list[Any], given: list[Any]) -> list[Any]:
        # The trace is of dense leaves; the stacks that the scan slices are not read here.
        dense = [leaf.materialize() if is_weight(leaf) else leaf for leaf in leaves]
        values = iter(head_fn(*dense, *given))
        out = [var.val if isinstance(var, _compat.Literal) else next(values) for var in eqn.invars]
        parts = _compat.scan_parts(eqn.params)
        front = parts.consts + parts.carry
        # The stacks of parameters themselves are dropped: layers are taken from the tree.
        kept = [
            jnp.zeros((eqn.params["length"], 0)) if path is not None else x
            for x, path in zip(out[front:], stacks(eqn), strict=True)
        ]
        return [*map(jnp.asarray, out[:front]), *kept]

    body, body_consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    if eqn.params["reverse"]:
        raise ValueError("pipeline: block_by_block: the model scans its layers in reverse.")
    return ScannedModel(
        before,
        body,
        body_consts,
        _compat.scan_parts(eqn.params),
        eqn.params["length"],
        stacks(eqn),
    )


def _inline(jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with the bodies of inner `jit`s in place of their calls."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, _compat.Literal) else env[var]

    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        if eqn.primitive is _compat.JIT:
            inner, inner_consts = _compat.open_jaxpr(eqn.params["jaxpr"])
            outs = _inline(inner, inner_consts, operands)
        else:
            outs = _compat.evaluate(eqn, operands)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]
