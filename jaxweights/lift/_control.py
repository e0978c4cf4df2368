"""Rules for primitives that hold jaxprs: jit, remat, loops, branches, custom derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxweights.lift import _compat
from jaxweights.lift._walk import Named, Record, Walk, rule, stackable, unstack

Records = dict[str, Record]


@rule(_compat.JIT.name)
def _jit(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    if walk.observing:
        return walk.run(jaxpr, consts, values)
    if not _compat.is_plain_jit(eqn):
        return None

    def inner(*values: Any) -> list[Any]:
        return walk.run(jaxpr, consts, values)

    inner.__name__ = eqn.params["name"]
    return jax.jit(inner)(*values)


@rule(_compat.REMAT.name)
def _remat(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    jaxpr, consts = _compat.open_jaxpr(params["jaxpr"])
    if walk.observing:  # nothing is differentiated, so there is nothing to compute again
        return walk.run(jaxpr, consts, values)

    def inner(*values: Any) -> list[Any]:
        return walk.run(jaxpr, consts, values)

    saved = jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return saved(*values)


@rule(_compat.CUSTOM_JVP.name, _compat.CUSTOM_VJP.name)
def _custom_derivative(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    # The derivative rule belongs to dense operands. Only where nothing is differentiated may the
    # walk look inside.
    if not walk.observing:
        return None
    jaxpr, consts = _compat.custom_call_jaxpr(eqn)
    return walk.run(jaxpr, consts, values)


@rule(_compat.SCAN.name)
def _scan(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    jaxpr, jaxpr_consts = _compat.open_jaxpr(params["jaxpr"])
    parts = _compat.scan_parts(params)
    consts = values[: parts.consts]
    carry = [walk.dense(v, "scan") for v in values[parts.consts : parts.consts + parts.carry]]
    xs = [
        v if stackable(v) else walk.dense(v, "scan") for v in values[parts.consts + parts.carry :]
    ]
    # What the loop also uses whole, or twice, has records of the whole.
    paths = [v.path for v in (*consts, *xs) if isinstance(v, Named)]
    xs = [
        Named(v.weight.tracked(), v.path) if isinstance(v, Named) and paths.count(v.path) > 1 else v
        for v in xs
    ]
    # A weight that is sliced gives one record a step; one that is not, or whose records are of the
    # whole weight although it is a part, gives one for all steps.
    sliced = {x.path for x in xs if isinstance(x, Named) and not x.weight.is_part}

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any], Records]:
        with walk.frame() as records:
            outs = walk.run(jaxpr, jaxpr_consts, [*consts, *carry, *map(unstack, x)])
            outs = [walk.dense(out, "scan") for out in outs]
        return outs[: parts.carry], outs[parts.carry :], dict(records)

    shared: Records = {}
    if walk.observing:
        first = [jax.tree.map(lambda leaf: leaf[0], x) for x in xs]
        shared = _identities(walk, step, sliced, carry, first)

    def body(state: Any, x: list[Any]) -> tuple[Any, Any]:
        carry, shared = state
        carry, ys, records = step(carry, x)
        shared = _combine_into(walk, shared, records)
        return (carry, shared), (ys, {path: records[path] for path in records if path in sliced})

    (carry, shared), (ys, stacked) = jax.lax.scan(
        body,
        (carry, shared),
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    walk.record_all(shared)
    walk.record_all(stacked)
    return [*carry, *ys]


@rule(_compat.WHILE.name)
def _while(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any]:
    params = eqn.params
    cond_jaxpr, cond_jaxpr_consts = _compat.open_jaxpr(params["cond_jaxpr"])
    body_jaxpr, body_jaxpr_consts = _compat.open_jaxpr(params["body_jaxpr"])
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts = [walk.dense(v, "while") for v in values[:n_cond]]
    body_consts = values[n_cond : n_cond + n_body]
    carry = [walk.dense(v, "while") for v in values[n_cond + n_body :]]

    def step(carry: list[Any]) -> tuple[list[Any], Records]:
        with walk.frame() as records:
            outs = walk.run(body_jaxpr, body_jaxpr_consts, [*body_consts, *carry])
            outs = [walk.dense(out, "while") for out in outs]
        return outs, dict(records)

    shared: Records = {}
    if walk.observing:
        shared = _identities(walk, lambda carry: (None, None, step(carry)[1]), set(), carry)

    def body(state: Any) -> Any:
        carry, shared = state
        carry, records = step(carry)
        return carry, _combine_into(walk, shared, records)

    def condition(state: Any) -> Any:
        return walk.run(cond_jaxpr, cond_jaxpr_consts, [*cond_consts, *state[0]])[0]

    carry, shared = jax.lax.while_loop(condition, body, (carry, shared))
    walk.record_all(shared)
    return carry


@rule(_compat.COND.name)
def _cond(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any]:
    index, *operands = values

    def lifted(branch: Any) -> Any:
        jaxpr, consts = _compat.open_jaxpr(branch)

        def run(*operands: Any) -> tuple[list[Any], Records]:
            with walk.frame() as records:
                outs = walk.run(jaxpr, consts, operands)
                outs = [walk.dense(out, "cond") for out in outs]
            return outs, dict(records)

        return run

    branches = [lifted(branch) for branch in eqn.params["branches"]]
    if walk.observing:
        # Every branch must return the same records: those that it lacks, as identities.
        everything: Records = {}
        for branch in branches:
            everything |= jax.eval_shape(branch, *operands)[1]
        neutral = _neutral(walk, everything)

        def filled(branch: Any) -> Any:
            def run(*operands: Any) -> tuple[list[Any], Records]:
                outs, records = branch(*operands)
                return outs, neutral | records

            return run

        branches = [filled(branch) for branch in branches]
    outs, records = jax.lax.switch(walk.dense(index, "cond"), branches, *operands)
    walk.record_all(records)
    return outs


@rule(_compat.SHARD_MAP_NAME)
def _shard_map(walk: Walk, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    params = eqn.params
    jaxpr, consts = _compat.open_jaxpr(params["jaxpr"])
    mesh = params["mesh"]
    local_shapes = [var.aval.shape for var in jaxpr.invars]
    in_specs: list[Any] = []
    stack_specs: dict[str, PartitionSpec] = {}
    copies: dict[str, set[str]] = {}  # mesh axes along which a weight's inputs are the same
    operands = list(values)
    for i, (value, spec) in enumerate(zip(values, params["in_specs"], strict=True)):
        if isinstance(value, Named):
            specs = value.weight.partition(spec, mesh)
            if specs is None:
                operands[i] = walk.dense(value, "shard_map")
            else:
                stack = len(value.weight.stack_shape)
                stack_specs[value.path] = PartitionSpec(*spec[:stack])
                copies[value.path] = _mesh_axes(spec[stack:])
                spec = Named(specs, value.path)
        in_specs.append(spec)

    def inner(*operands: Any) -> tuple[list[Any], Records]:
        with walk.frame() as records:
            parts = [
                Named(value.weight.as_part(shape), value.path)
                if isinstance(value, Named)
                else value
                for value, shape in zip(operands, local_shapes, strict=True)
            ]
            outs = [walk.dense(out, "shard_map") for out in walk.run(jaxpr, consts, parts)]
        return outs, {
            path: _reduce_over_mesh(records.get(path, {}), _mesh_axes(spec), copies[path])
            for path, spec in stack_specs.items()
        }

    call = {
        "mesh": mesh,
        "in_specs": tuple(in_specs),
        "check_vma": params["check_vma"],
        "axis_names": set(params["newly_manual_axes"]),
    }
    out_specs = list(params["out_specs"])
    if not walk.observing:
        run = jax.shard_map(lambda *ops: inner(*ops)[0], out_specs=out_specs, **call)
        return run(*operands)
    if not params["check_vma"]:
        raise ValueError(
            "lift: a weight is used inside shard_map(check_vma=False), where it cannot be known "
            "over which mesh axes its inputs differ. Calibrate with check_vma=True."
        )
    outs, records = jax.shard_map(inner, out_specs=(out_specs, stack_specs), **call)(*operands)
    walk.record_all({path: record for path, record in records.items() if record})
    return outs


def _mesh_axes(spec: Any) -> set[str]:
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    return {name for part in parts for name in part if name is not None}


def _reduce_over_mesh(record: Record, stacked: set[str], copies: set[str]) -> Record:
    """One record of all devices: those along stack axes stay apart, copies count once."""

    def reduce(name: str, value: jax.Array) -> jax.Array:
        varying = _compat.varying_axes(value) - stacked
        same, apart = tuple(sorted(varying & copies)), tuple(sorted(varying - copies))
        value = jax.lax.pmax(value, same) if same else value
        if not apart:
            return value
        sums = {"min": jax.lax.pmin, "max": jax.lax.pmax}
        return sums.get(name, jax.lax.psum)(value, apart)

    return {name: reduce(name, value) for name, value in record.items()}


def _identities(walk: Walk, step: Any, sliced: set[str], *operands: Any) -> Records:
    """Neutral records for all weights that a loop's body uses without slicing them."""
    records = jax.eval_shape(lambda *ops: step(*ops)[2], *operands)
    return _neutral(walk, {path: r for path, r in records.items() if path not in sliced})


def _neutral(walk: Walk, records: Records) -> Records:
    assert walk.identity is not None
    return {path: walk.identity(record) for path, record in records.items()}


def _combine_into(walk: Walk, shared: Records, records: Records) -> Records:
    if not shared:
        return shared
    assert walk.combine is not None
    return {
        path: walk.combine(total, records[path]) if path in records else total
        for path, total in shared.items()
    }
