"""A model taken apart at the scan over its layers: what comes before and behind it, and a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxweights.calibrate._calibrate import Batch, _arguments
from jaxweights.core import Path, unflatten
from jaxweights.lift import _compat
from jaxweights.lift._infer_layout import arrays_of
from jaxweights.lift._walk import Named, Walk
from jaxweights.weights import is_weight

Leaves = Mapping[Path, Any]


@dataclasses.dataclass(frozen=True)
class Entrance:
    """Part of what a model does before its layers.

    Args:
      run: `(leaves, inputs) -> arrays`; of the leaves it looks at those in `reads`.
      reads: Paths of the leaves that it needs.
    """

    run: Callable[[Leaves, Sequence[Any]], list[Any]]
    reads: frozenset[Path]


@dataclasses.dataclass(frozen=True)
class Exit:
    """What a model does behind its layers.

    Args:
      run: `(leaves, inputs, carried) -> outputs`; of the leaves it looks at those in `reads`.
      reads: Paths of the leaves that it needs.
    """

    run: Callable[[Leaves, Sequence[Any], Sequence[Any]], list[Any]]
    reads: frozenset[Path]


@dataclasses.dataclass(frozen=True, eq=False)  # compiled programs tell models apart by identity
class ScannedModel:
    """A model of inputs of certain shapes, divided at the scan over its layers.

    Args:
      carry: What the first layer gets and changes: the embedded tokens.
      shared: What all layers get besides: constants, then the stacks that are no parameters.
      body: Jaxpr of one layer.
      body_consts: Its constants.
      parts: How the operands of the scan divide.
      length: Number of layers.
      stacks: Path of the parameter behind each stacked operand; None where it is not one.
      exit: What becomes of what the last layer gives; None where it needs more of the layers.
    """

    carry: Entrance
    shared: Entrance
    body: Any
    body_consts: list[Any]
    parts: _compat.ScanParts
    length: int
    stacks: tuple[Path | None, ...]
    exit: Exit | None = None

    @property
    def inside(self) -> tuple[Path, ...]:
        """Paths of the parameters that the layers hold."""
        return tuple(dict.fromkeys(path for path in self.stacks if path is not None))

    def run_layer(
        self, walk: Walk, block: Leaves, shared: Sequence[Any], carry: Sequence[Any], layer: Any
    ) -> list[Any]:
        """What a layer makes of the carried arrays.

        Args:
          walk: Evaluates its jaxpr.
          block: Its parameters, without the layers' axis.
          shared: From `shared.run`.
          carry: What the layer before it gave.
          layer: Its number.

        Returns:
          What the next layer gets.
        """
        others = iter(shared[self.parts.consts :])
        slices = [
            jax.lax.dynamic_index_in_dim(next(others), layer, keepdims=False)
            if path is None
            else Named(block[path], path)
            if is_weight(block[path])
            else block[path]
            for path in self.stacks
        ]
        operands = [*shared[: self.parts.consts], *carry, *slices]
        outs = walk.run(self.body, self.body_consts, operands)
        return [walk.dense(out, "scan") for out in outs[: self.parts.carry]]


def array_leaves(batch: Batch) -> list[Any]:
    """The arrays among a batch's inputs, as entrances take them."""
    return [x for x in jax.tree.leaves(_arguments(batch)) if hasattr(x, "dtype")]


def find_layers(
    fn: Callable[..., Any], flat: Mapping[Path, Any], structure: Any, batch: Batch
) -> ScannedModel:
    """Traces the model and divides it at the scan that slices the most parameters.

    Args:
      fn: The model.
      flat: Its parameters, concrete or abstract.
      structure: Of their tree.
      batch: Inputs, of which shapes count.

    Returns:
      The model in parts.

    Raises:
      ValueError: If it has no scan over its layers, or scans them in reverse.
    """
    inputs, input_tree = jax.tree.flatten(_arguments(batch))
    arrays = [i for i, x in enumerate(inputs) if hasattr(x, "dtype")]

    def run(leaves: list[Any], given: list[Any]) -> list[Any]:
        filled = list(inputs)
        for i, x in zip(arrays, given, strict=True):
            filled[i] = x
        tree = unflatten(structure, {**flat, **dict(zip(weights, leaves, strict=True))})
        out = fn(tree, *jax.tree.unflatten(input_tree, filled))
        return [x for x in jax.tree.leaves(out) if hasattr(x, "dtype")]

    weights = arrays_of(flat)
    leaves = [_compat.shape_of(x) for x in weights.values()]
    given = [_compat.shape_of(inputs[i]) for i in arrays]
    closed = jax.make_jaxpr(run)(leaves, given)
    closed = jax.make_jaxpr(lambda *xs: _inline(closed.jaxpr, closed.consts, xs))(*leaves, *given)
    jaxpr = closed.jaxpr
    path_of = dict(zip(jaxpr.invars, weights, strict=False))

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
    if eqn.params["reverse"]:
        raise ValueError("pipeline: block_by_block: the model scans its layers in reverse.")
    parts, found = _compat.scan_parts(eqn.params), stacks(eqn)
    front = parts.consts + parts.carry
    others = [var for var, path in zip(eqn.invars[front:], found, strict=True) if path is None]
    entrance = lambda wanted: _entrance(closed, at, wanted, path_of)  # noqa: E731
    body, body_consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    return ScannedModel(
        entrance(eqn.invars[parts.consts : front]),
        entrance([*eqn.invars[: parts.consts], *others]),
        body,
        body_consts,
        parts,
        eqn.params["length"],
        found,
        _exit(closed, at, parts.carry, path_of),
    )


def _entrance(closed: Any, at: int, wanted: Sequence[Any], path_of: Mapping[Any, Path]) -> Entrance:
    """The equations before number `at` that some operands of it depend on."""
    jaxpr = closed.jaxpr
    outs = [var for var in wanted if not isinstance(var, _compat.Literal)]
    eqns, needed = _behind(jaxpr.eqns[:at], outs)
    invars = [var for var in jaxpr.invars if var in needed or var not in path_of]
    head = jex.Jaxpr(
        jaxpr.constvars,
        invars,
        outs,
        eqns,
        debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    head_fn = jex.jaxpr_as_fun(jex.ClosedJaxpr(head, closed.consts))
    reads = [path_of[var] for var in invars if var in path_of]

    def run(leaves: Leaves, given: Sequence[Any]) -> list[Any]:
        # The trace is of dense leaves.
        dense = [leaves[path] for path in reads]
        dense = [leaf.materialize() if is_weight(leaf) else leaf for leaf in dense]
        values = iter(head_fn(*dense, *given))
        found = [var.val if isinstance(var, _compat.Literal) else next(values) for var in wanted]
        return [jnp.asarray(x) for x in found]

    return Entrance(run, frozenset(reads))


def _exit(closed: Any, at: int, carry: int, path_of: Mapping[Any, Path]) -> Exit | None:
    """The equations that the outputs depend on, but for those behind what the layers carried."""
    jaxpr = closed.jaxpr
    carried, others = jaxpr.eqns[at].outvars[:carry], jaxpr.eqns[at].outvars[carry:]
    outs = [var for var in jaxpr.outvars if not isinstance(var, _compat.Literal)]
    later, needed = _behind(jaxpr.eqns[at + 1 :], outs)
    if len(outs) < len(jaxpr.outvars) or any(var in needed for var in others):
        return None
    made = {var for var in needed if var not in carried}
    earlier, before = _behind(jaxpr.eqns[:at], made)
    needed |= before
    invars = [var for var in jaxpr.invars if var in needed or var not in path_of]
    tail = jex.Jaxpr(
        jaxpr.constvars,
        [*invars, *carried],
        outs,
        [*earlier, *later],
        debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    tail_fn = jex.jaxpr_as_fun(jex.ClosedJaxpr(tail, closed.consts))
    reads = [path_of[var] for var in invars if var in path_of]

    def run(leaves: Leaves, given: Sequence[Any], carried: Sequence[Any]) -> list[Any]:
        dense = [leaves[path] for path in reads]
        dense = [leaf.materialize() if is_weight(leaf) else leaf for leaf in dense]
        return list(tail_fn(*dense, *given, *carried))

    return Exit(run, frozenset(reads))


def _behind(eqns: Sequence[Any], outs: Collection[Any]) -> tuple[list[Any], set[Any]]:
    """The equations that some variables depend on, and all variables that they need."""
    needed, kept = set(outs), []
    for eqn in reversed(eqns):
        if any(var in needed for var in eqn.outvars):
            kept.append(eqn)
            needed |= {var for var in eqn.invars if not isinstance(var, _compat.Literal)}
    return kept[::-1], needed


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
