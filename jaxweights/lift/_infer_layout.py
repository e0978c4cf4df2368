"""infer_layout: the axes of every leaf, read off the model's trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxweights.core._layout import Layout
from jaxweights.core._paths import Flat, Params, Path, flatten, unflatten
from jaxweights.lift._compat import shape_of
from jaxweights.lift._uses import Use, find_uses
from jaxweights.weights._axes import Axes, Kind
from jaxweights.weights._weight import is_weight


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one trace of a model told.

    Args:
      layout: Axes of the leaves.
      uses: Every use of every leaf.
      owners: Pairs (path, owner) of leaves that provably read the same input as an earlier one.
    """

    layout: Layout
    uses: tuple[Use, ...]
    owners: tuple[tuple[Path, Path], ...]


def infer_layout(fn: Callable[..., Any], params: Params, *inputs: Any) -> Layout:
    """Reads off a model's trace which axes of each leaf are stacked, contracted and produced.

    An axis that activations are contracted with is an input axis; one that the product keeps is
    an output axis; batch axes of the product and axes that a scan or an index takes away are stack
    axes. Nothing is computed.

    Args:
      fn: The model, called as `fn(params, *inputs)`.
      params: Its parameters; arrays, abstract arrays or represented weights.
      *inputs: Example inputs; arrays or abstract arrays, anything else passes through.

    Returns:
      Axes of every leaf that the model multiplies with activations or looks rows up in. Leaves
      used in contradictory ways have an entry in `unclear` instead.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"heads": jnp.ones((16, 2, 8))}
      >>> model = lambda params, x: jnp.einsum("td,dhe->the", x, params["heads"])
      >>> infer_layout(model, params, jnp.ones((4, 16)))["heads"]
      Axes(inputs=(-3,), outputs=(-2, -1), kind='linear')
    """
    return trace_model(fn, params, inputs).layout


def trace_model(fn: Callable[..., Any], params: Params, inputs: Sequence[Any]) -> Trace:
    """Traces a model once and lists how it uses its leaves."""
    flat, structure = flatten(params)
    weights = {path: shape_of(leaf) for path, leaf in arrays_of(flat).items()}
    input_leaves, input_tree = jax.tree.flatten(tuple(inputs))
    traced = [i for i, x in enumerate(input_leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def run(leaves: list[Any], arrays: list[Any]) -> Any:
        filled = list(input_leaves)
        for i, x in zip(traced, arrays, strict=True):
            filled[i] = x
        params = unflatten(structure, flat | dict(zip(weights, leaves, strict=True)))
        out = fn(params, *jax.tree.unflatten(input_tree, filled))
        return [x for x in jax.tree.leaves(out) if hasattr(x, "dtype")]

    closed = jax.make_jaxpr(run)(
        list(weights.values()), [shape_of(input_leaves[i]) for i in traced]
    )
    paths: list[Path | None] = [*weights, *(None for _ in traced)]
    uses = find_uses(closed.jaxpr, closed.consts, paths)
    ranks = {path: len(getattr(leaf, "shape", ())) for path, leaf in flat.items()}
    return Trace(_layout_of(uses, ranks), tuple(uses), _owners(uses))


def arrays_of(flat: Mapping[Path, Any]) -> Flat:
    """The leaves that are traced; what else a module holds, such as functions, stays as it is."""
    return {p: leaf for p, leaf in flat.items() if is_weight(leaf) or hasattr(leaf, "dtype")}


def _layout_of(uses: Sequence[Use], ranks: dict[Path, int]) -> Layout:
    axes: dict[Path, Axes] = {}
    unclear: dict[Path, str] = {}
    for path, rank in ranks.items():
        mine = [use for use in uses if use.path == path]
        products = {(use.inputs, use.outputs) for use in mine if use.kind in ("dot", "conv")}
        lookups = [use for use in mine if use.kind == "lookup" and use.inputs]
        if len(products) > 1:
            unclear[path] = (
                "the model multiplies it in contradictory ways, with input axes "
                + " and ".join(str(inputs) for inputs, _ in sorted(products))
            )
        elif not products and any(len(use.inputs) > 1 for use in lookups):
            unclear[path] = (
                "the model picks entries of its first axis, which may be rows or matrices"
            )
        elif products or lookups:
            inputs, outputs = (
                products.pop() if products else (lookups[0].inputs, lookups[0].outputs)
            )
            kind: Kind = "embedding" if lookups else "linear"
            kind = "conv" if any(use.kind == "conv" for use in mine) else kind
            axes[path] = Axes(
                tuple(axis - rank for axis in inputs), tuple(axis - rank for axis in outputs), kind
            )
    return Layout(tuple(axes.items()), True, tuple(unclear.items()), seen=tuple(ranks))


def _owners(uses: Sequence[Use]) -> tuple[tuple[Path, Path], ...]:
    sources: dict[Path, list[Any]] = {}
    for use in uses:
        if use.kind in ("dot", "conv"):
            sources.setdefault(use.path, []).append((use.source, len(use.inputs)))
    first: dict[Any, Path] = {}
    owners = []
    for path, read in sources.items():
        owner = first.setdefault(tuple(read), path)
        if owner != path:
            owners.append((path, owner))
    return tuple(owners)
