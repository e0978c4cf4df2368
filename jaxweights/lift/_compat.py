"""Everything that differs between JAX releases, and nothing else.

Supported: JAX 0.10.2 to 0.12. A new release is taken in by making this file's functions true again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex
from jax.extend.core import primitives as prim

Jaxpr = Any  # jax.extend.core.Jaxpr or ClosedJaxpr
Eqn = Any  # jax.extend.core.JaxprEqn
Literal = jex.Literal

JIT = prim.jit_p
SCAN = prim.scan_p
WHILE = prim.while_p
COND = prim.cond_p
CUSTOM_JVP = prim.custom_jvp_call_p
CUSTOM_VJP = prim.custom_vjp_call_p


REMAT = prim.remat_p
# Some primitives have no public name; they are known by the one they carry.
SHARD_MAP_NAME = "shard_map"
RAGGED_DOT_NAME = "ragged_dot_general"
PVARY_NAME = "pvary"


def open_jaxpr(jaxpr: Jaxpr) -> tuple[Any, list[Any]]:
    """A sub-jaxpr and its constants: closed up to 0.10, open and without constants from 0.12."""
    if isinstance(jaxpr, jex.ClosedJaxpr):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


class ScanParts(NamedTuple):
    """How the operands of a scan divide."""

    consts: int
    carry: int


def scan_parts(params: dict[str, Any]) -> ScanParts:
    """Numbers of constants and carried values; 0.12 keeps them as trees in `ft_in`."""
    if "num_consts" in params:
        return ScanParts(params["num_consts"], params["num_carry"])
    consts, carry, _ = params["ft_in"].unpack()
    return ScanParts(len(consts), len(carry))


def custom_call_jaxpr(eqn: Eqn) -> tuple[Any, list[Any]]:
    """The primal computation of a `custom_jvp` or `custom_vjp` call."""
    return open_jaxpr(eqn.params["call_jaxpr"])


def varying_axes(tree: Any) -> frozenset[str]:
    """Mesh axes along which any array of a tree differs between devices, inside `shard_map`."""
    kinds = (_manual_axis_type(x) for x in jax.tree.leaves(tree))
    return frozenset().union(*(kind.varying for kind in kinds if kind is not None))


def _manual_axis_type(x: Any) -> Any:
    return (x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)).manual_axis_type


def pvary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """Declares inside `shard_map` that a value differs between devices along mesh axes."""
    new = tuple(sorted(set(axes) - varying_axes(x)))
    return jax.lax.pcast(x, new, to="varying") if new else x


def abstract(x: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    """The type of an array, with all that tracing tells types apart by."""
    kind = jax.typeof(x)
    return jax.ShapeDtypeStruct(
        kind.shape,
        kind.dtype,
        weak_type=kind.weak_type,
        manual_axis_type=kind.manual_axis_type,
        sharding=None if kind.sharding.mesh.empty else kind.sharding,
    )


def abstract_weight(weight: Any) -> jax.ShapeDtypeStruct:
    """The type of the dense weight: split over a mesh and differing as its parts do."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(weight)]
    meshes = [mesh for mesh in meshes if not mesh.empty]
    if not meshes:
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    if jax.sharding.AxisType.Explicit in meshes[0].axis_types:
        return jax.eval_shape(lambda: weight.materialize())
    replicated = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
    kind = jax.sharding.ManualAxisType(varying=varying_axes(weight))
    return jax.ShapeDtypeStruct(
        weight.shape, weight.dtype, sharding=replicated, manual_axis_type=kind
    )


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype alone, under which JAX takes a value: NumPy's 64 bits may become 32."""
    kind = jax.typeof(x) if isinstance(x, jax.Array | np.ndarray | np.generic) else x
    return jax.ShapeDtypeStruct(x.shape, kind.dtype)


def is_plain_jit(eqn: Eqn) -> bool:
    """Whether an inner `jit` states no shardings, layouts or compiler options of its own."""
    params = eqn.params
    shardings = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    layouts = (*params.get("in_layouts", ()), *params.get("out_layouts", ()))
    return all(type(s).__name__ == "UnspecifiedValue" for s in shardings) and not any(layouts)


def evaluate(eqn: Eqn, values: list[Any]) -> list[Any]:
    """Runs one equation as it is.

    It is bound as a jaxpr of this one equation, so that no primitive's own calling convention
    (custom derivatives, effects) has to be known here.
    """
    inputs: dict[Any, Any] = {}
    for var, value in zip(eqn.invars, values, strict=True):
        if not isinstance(var, Literal):
            inputs[var] = value
    info = _empty_debug_info()
    jaxpr = jex.Jaxpr((), list(inputs), eqn.outvars, [eqn], eqn.effects, debug_info=info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*inputs.values())


def _empty_debug_info() -> Any:
    global _DEBUG_INFO
    if _DEBUG_INFO is None:
        info = jax.make_jaxpr(lambda: ())().jaxpr.debug_info
        _DEBUG_INFO = info._replace(arg_names=None, result_paths=None)
    return _DEBUG_INFO


_DEBUG_INFO: Any = None
