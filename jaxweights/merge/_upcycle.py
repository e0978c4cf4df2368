"""Upcycling: a mixture of experts whose experts are the MLPs of dense models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core._paths import Params, Path, check_pattern, fail, nearest
from jaxweights.core._stats import Stats
from jaxweights.merge._nested import Placed, build, placed_leaves
from jaxweights.weights._weight import is_weight

_NAME = "merge.upcycle"


def upcycle(
    base: Params,
    experts: Sequence[Params],
    *,
    mlps: str,
    routers: jax.Array | Mapping[Path, jax.Array],
    stacked: bool = True,
) -> Params:
    r"""Makes each MLP of a model a choice among those of several, with a router in front.

    All but the MLPs is the base's. Under the path of every MLP stand `experts`, whose leaves have
    an axis of experts (behind that of the layers, where these are stacked), and `router/kernel`
    `(in, experts)`. With `p = softmax(x @ router)` over the experts that are chosen for a token,
    the new MLP is :math:`\sum_e p_e\, \mathrm{mlp}_e(x)`; copies of one MLP give what it gave.

    Args:
      base: The model that gives attention, norms and embeddings; a tree of dicts.
      experts: The models whose MLPs become experts, in their order; the base may be among them.
      mlps: Pattern of the path of an MLP, such as `"layers/mlp"` or `r"layer_\d+/mlp"`.
      routers: `(layers, in, experts)` where layers are stacked, else `(in, experts)`; one for all
        MLPs, or by the path of each. `router_from_stats` makes them of prompts; random ones are for
        training on.
      stacked: Whether the first axis of an MLP's leaves counts layers.

    Returns:
      The tree, in the dtypes of the base.

    Raises:
      ValueError: If the pattern matches nothing, experts or routers do not fit, or a leaf of an MLP
        is represented; all leaves are named.
      TypeError: If a container on the way is no dict, list or tuple.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> mlp = {"up": {"kernel": jnp.ones((4, 2, 8))}, "down": {"kernel": jnp.ones((4, 8, 2))}}
      >>> model = {"embed": jnp.ones((5, 2)), "layers": {"mlp": mlp}}
      >>> mixture = jw.merge.upcycle(
      ...     model, [model, model, model], mlps="layers/mlp", routers=jnp.zeros((4, 2, 3))
      ... )
      >>> mixture["layers"]["mlp"]["experts"]["up"]["kernel"].shape
      (4, 3, 2, 8)

    Source: Komatsuzaki et al. 2022, arXiv:2212.05055; experts of several models as in mergekit-moe.
    """
    check_pattern(_NAME, mlps)
    if not experts:
        raise ValueError(f"{_NAME}: experts is empty. Pass at least one model.")
    trees = [placed_leaves(_NAME, tree) for tree in (base, *experts)]
    own, *others = [{leaf.path: leaf.leaf for leaf in tree} for tree in trees]
    prefix = re.compile(rf"(?:{mlps})(?=/)")
    inside = {leaf.path: m.group(0) for leaf in trees[0] if (m := prefix.match(leaf.path))}
    if not inside:
        close = nearest(mlps, {path.rpartition("/")[0] for path in own})
        raise ValueError(
            f"{_NAME}: mlps={mlps!r} matches the beginning of no path. Paths like it: "
            f"{', '.join(map(repr, close[:5]))}."
        )
    routers = _checked(routers, own, inside, len(experts), stacked)
    fail(_NAME, _unfit(own, others, inside, stacked))
    merged = [leaf for leaf in trees[0] if leaf.path not in inside]
    for leaf in trees[0]:
        if leaf.path not in inside:
            continue
        depth = inside[leaf.path].count("/") + 1
        dtype = leaf.leaf.dtype
        parts = [jnp.asarray(other[leaf.path], dtype) for other in others]
        joined = jnp.stack(parts, axis=int(stacked))
        merged.append(_moved(leaf, (*leaf.keys[:depth], "experts", *leaf.keys[depth:]), joined))
    for path, router in routers.items():
        first = next(leaf for leaf in trees[0] if inside.get(leaf.path) == path)
        keys = (*first.keys[: path.count("/") + 1], "router", "kernel")
        merged.append(_moved(first, keys, jnp.asarray(router, first.leaf.dtype)))
    return build(merged)


def router_from_stats(
    stats: Sequence[Stats], path: Path, *, negative: Sequence[Stats | None] | None = None
) -> jax.Array:
    """The router that sends a token to the expert whose prompts it resembles.

    The column of an expert is the mean of what its prompts feed into the MLP, less that of what it
    should not be used for, of unit length.

    Args:
      stats: For each expert, what `calibrate(fn, base, prompts, needs={path: {"sum", "count"}})`
        found on its prompts.
      path: A kernel that reads what the MLP reads, such as `layers/mlp/gate/kernel`.
      negative: The same of prompts that the expert should not be used for; None for those without.

    Returns:
      `(*stack, in, experts)`, float32.

    Raises:
      ValueError: If statistics are missing, or an expert's prompts leave nothing.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> params = {"gate": jnp.ones((2, 3))}
      >>> model, needs = lambda p, x: x @ p["gate"], {"gate": {"sum", "count"}}
      >>> prompts = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 2.0], [0.0, 4.0]])
      >>> seen = [jw.calibrate(model, params, [x], needs=needs) for x in prompts]
      >>> router_from_stats(seen, "gate")
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    Source: mergekit-moe's gates from hidden states.
    Differs: (1) from what the MLP itself reads, behind its norm; mergekit takes the residual stream
    before the layer. (2) The mean over all tokens of all prompts.
    """
    name = "merge.router_from_stats"
    if not stats:
        raise ValueError(f"{name}: stats is empty. Pass one Stats per expert.")
    against = [None] * len(stats) if negative is None else list(negative)
    if len(against) != len(stats):
        raise ValueError(
            f"{name}: negative has {len(against)} entries for {len(stats)} experts. Pass one per "
            "expert, or None."
        )
    columns, problems = [], []
    for i, (yes, no) in enumerate(zip(stats, against, strict=True)):
        lacking = [s for s in (yes, no) if s is not None and s.get(path, "sum") is None]
        if lacking:
            problems.append(f"{lacking[0].why_missing(path, 'sum')} This is expert {i}.")
            continue
        column = _mean_input(yes, path) - (0 if no is None else _mean_input(no, path))
        length = jnp.linalg.norm(column, axis=-1, keepdims=True)
        if not isinstance(length, Tracer) and not bool(jnp.all(length > 0)):
            problems.append(
                f"{path!r}: the prompts of expert {i} leave nothing. Give it other prompts than "
                "its negative ones."
            )
        columns.append(column / length)
    fail(name, problems)
    return jnp.stack(columns, axis=-1)


def _mean_input(stats: Stats, path: Path) -> jax.Array:
    count = jnp.maximum(jnp.asarray(stats.get(path, "count"), jnp.float32), 1)
    return jnp.asarray(stats.get(path, "sum"), jnp.float32) / count[..., None]


def _moved(leaf: Placed, keys: tuple[Any, ...], value: Any) -> Placed:
    """A leaf in other dicts, those on its way being of the kinds that there were."""
    kinds = [*leaf.kinds[: len(keys)], *[dict] * (len(keys) - len(leaf.kinds))]
    shared = next((i for i, (a, b) in enumerate(zip(keys, leaf.keys)) if a != b), len(keys))
    return Placed(keys, tuple([*kinds[: shared + 1], *[dict] * (len(keys) - shared - 1)]), value)


def _checked(
    routers: Any, own: Mapping[Path, Any], inside: Mapping[Path, Path], count: int, stacked: bool
) -> dict[Path, Any]:
    """One router for each MLP, each of a shape that can choose among its experts."""
    paths = list(dict.fromkeys(inside.values()))
    found: dict[Path, Any] = dict.fromkeys(paths, routers)
    if isinstance(routers, Mapping):
        found = dict(routers)
    if set(found) != set(paths):
        raise ValueError(
            f"{_NAME}: routers are given for {sorted(found)[:5]}, but the MLPs are "
            f"{paths[:5]}. Give one for each."
        )
    problems = []
    for path, router in found.items():
        leaf = next(own[p] for p, mlp in inside.items() if mlp == path)
        stack = np.shape(leaf)[: int(stacked)]
        shape = np.shape(router)
        if len(shape) != len(stack) + 2 or shape[:-2] != stack or shape[-1] != count:
            wanted = ", ".join([*map(str, stack), "in", str(count)])
            problems.append(f"{path!r}: its router has shape {shape}. It must be ({wanted}).")
    fail(_NAME, problems)
    return found


def _unfit(
    own: Mapping[Path, Any],
    others: Sequence[Mapping[Path, Any]],
    inside: Mapping[Path, Path],
    stacked: bool,
) -> list[str]:
    problems = []
    for path in inside:
        if is_weight(own[path]):
            problems.append(
                f"{path!r}: is represented. Pass jaxweights.materialize(model) of every model."
            )
            continue
        for i, other in enumerate(others):
            if path not in other:
                problems.append(
                    f"{path!r}: experts[{i}] lacks it. All experts must have the base's MLP."
                )
            elif is_weight(other[path]):
                problems.append(
                    f"{path!r}: is represented in experts[{i}]. Pass "
                    "jaxweights.materialize(model) of every model."
                )
            elif np.shape(other[path]) != np.shape(own[path]):
                problems.append(
                    f"{path!r}: is {np.shape(other[path])} in experts[{i}] but "
                    f"{np.shape(own[path])} in the base. Experts must have one shape."
                )
        if stacked and not np.ndim(own[path]):
            problems.append(
                f"{path!r}: is a scalar, without an axis of layers. Pass stacked=False."
            )
    return problems
