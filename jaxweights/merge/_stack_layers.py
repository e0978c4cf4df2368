"""Layer stacking: a deeper or shallower model from ranges of layers of others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core._paths import Flat, Params, Path, check_pattern, fail, flatten, unflatten
from jaxweights.merge._layer_slices import (
    NAME,
    PREFIX_END,
    LayerSlice,
    check_range,
    checked_slices,
    leaf_factors,
    outer_leaves,
    require_fitting,
    require_layers,
    scaled,
)
from jaxweights.merge._nested import Placed, build, placed_leaves
from jaxweights.weights._weight import is_weight

# Names of final norms and heads, but not of what belongs to the embeddings.
_AFTER = (
    r"(?i)(?!.*(?<!un)embed).*\b(?:\w*(?:final|last)\w*|norm|ln_f|(?:lm_)?head|output(?:_norm)?"
    r"|unembed\w*|classifier|pooler)\b.*"
)


def stack_layers(
    slices: Sequence[LayerSlice | tuple[Any, ...]],
    *,
    layers: str,
    after: str = _AFTER,
    out_dtype: DTypeLike | None = None,
) -> Params:
    r"""Puts ranges of layers on top of each other, of one model or of several.

    Layers may be stacked on axis 0 of each leaf, as `scan` wants them, or be subtrees with a number
    in their names, which are counted anew. What lies before the layers (embeddings) comes from the
    first slice's model, what lies behind them (final norm, head) from the last's.

    A layer whose output projections are scaled by 0 adds nothing to the residual stream: inserted
    so, it leaves the model's function as it was, and can be trained from there.

    Args:
      slices: `(model, start, stop)` or `(model, start, stop, {pattern: factor})`, bottom first.
        Ranges may overlap, repeat, and leave gaps.
      layers: Pattern of the beginning of the layers' paths. With a group for the number, such as
        `r"decoder/layer_(\d+)"`, layers are subtrees; without one, such as `"decoder/layers"`,
        every leaf under it has all layers on axis 0.
      after: Pattern of the other leaves that come from the last slice; the default knows usual
        names of final norms and heads.
      out_dtype: Dtype of floating leaves; None keeps that of the models, which must then agree.

    Returns:
      A tree like the first slice's model, with as many layers as the slices have together.

    Raises:
      ValueError: If a range leaves its model, a pattern matches nothing, or layers do not fit
        together; all leaves are named.
      TypeError: If named layers lie in containers that are no dicts, lists or tuples.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> model = {"embed": jnp.ones((5, 2)), "layers": {"mlp": {"kernel": jnp.ones((4, 2, 2))}}}
      >>> slices = [(model, 0, 3), (model, 1, 4, {".*/kernel": 0.0})]
      >>> deeper = jw.merge.stack_layers(slices, layers="layers")
      >>> deeper["layers"]["mlp"]["kernel"][:, 0, 0]
      Array([1., 1., 1., 0., 0., 0.], dtype=float32)
      >>> named = {"layer_0": {"b": jnp.zeros(1)}, "layer_1": {"b": jnp.ones(1)}}
      >>> list(jw.merge.stack_layers([(named, 0, 2), (named, 1, 2)], layers=r"layer_(\d+)"))
      ['layer_0', 'layer_1', 'layer_2']

    Source: mergekit's `passthrough`; zeroed output projections as in LLaMA Pro, arXiv:2401.02415.
    """
    parts = checked_slices(slices)
    check_pattern(NAME, layers)
    check_pattern(NAME, after)
    groups = re.compile(layers).groups
    if groups > 1:
        raise ValueError(
            f"{NAME}: layers={layers!r} has {groups} groups. Put one, for the number; write "
            "(?:...) for others."
        )
    if out_dtype is not None and not jnp.issubdtype(out_dtype, jnp.floating):
        raise ValueError(f"{NAME}: out_dtype={out_dtype} is no floating dtype.")
    method = _stack_named if groups else _stack_scanned
    return method(parts, re.compile(f"(?:{layers}){PREFIX_END}"), after, out_dtype)


# --- layers on axis 0 ---------------------------------------------------------------------------


def _stack_scanned(
    parts: list[LayerSlice], prefix: re.Pattern[str], after: str, dtype: Any
) -> Params:
    flats = [flatten(part.model)[0] for part in parts]
    stacked = [[path for path in flat if prefix.match(path)] for flat in flats]
    require_layers(stacked, flats, prefix)
    counts = [_lengths(i, flats[i], paths) for i, paths in enumerate(stacked)]
    fail(NAME, filter(None, map(check_range, range(len(parts)), parts, counts)))
    layered = {i: {p: flats[i][p] for p in paths} for i, paths in enumerate(stacked)}
    shapes = {i: {p: np.shape(x)[1:] for p, x in flat.items()} for i, flat in layered.items()}
    require_fitting(layered, shapes, dtype)
    factors = [leaf_factors(i, part, layered[i]) for i, part in enumerate(parts)]
    merged = outer_leaves(flats, [set(paths) for paths in stacked], after, dtype)
    for path in stacked[0]:
        pieces = [
            scaled(flat[path][part.start : part.stop], factor.get(path, 1.0), dtype)
            for flat, part, factor in zip(flats, parts, factors, strict=True)
        ]
        merged[path] = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
    return unflatten(flatten(parts[0].model)[1], merged)


def _lengths(i: int, flat: Flat, paths: list[Path]) -> int:
    """Number of layers of one slice's model."""
    problems = [
        f"{path!r}: is a {type(flat[path]).__name__} in slices[{i}], and layers on axis 0 are cut "
        "from dense arrays. Pass jaxweights.materialize(model)."
        for path in paths
        if is_weight(flat[path])
    ]
    problems += [
        f"{path!r}: is a scalar in slices[{i}], so it has no axis of layers. Make the pattern "
        "`layers` leave it out."
        for path in paths
        if not np.shape(flat[path])
    ]
    fail(NAME, problems)
    lengths = {path: np.shape(flat[path])[0] for path in paths}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{NAME}: slices[{i}]: leaves under `layers` have different lengths on axis 0: "
            f"{dict(list(lengths.items())[:5])}. All must be stacked, one entry per layer."
        )
    return next(iter(lengths.values()))


# --- layers with numbers in their names ---------------------------------------------------------


def _stack_named(
    parts: list[LayerSlice], prefix: re.Pattern[str], after: str, dtype: Any
) -> Params:
    trees = [placed_leaves(NAME, part.model) for part in parts]
    flats = [{leaf.path: leaf.leaf for leaf in tree} for tree in trees]
    numbered = [_numbered(tree, prefix) for tree in trees]
    inside = [{leaf.path for layer in found.values() for leaf in layer} for found in numbered]
    require_layers([list(paths) for paths in inside], flats, prefix)
    counts = [_count(i, found) for i, found in enumerate(numbered)]
    fail(NAME, filter(None, map(check_range, range(len(parts)), parts, counts)))
    merged: list[Placed] = []
    outer = outer_leaves(flats, inside, after, dtype)
    merged += [leaf._replace(leaf=outer[leaf.path]) for leaf in trees[0] if leaf.path in outer]
    layered, depth = {}, 0
    for i, (part, layers) in enumerate(zip(parts, numbered, strict=True)):
        taken = {leaf.path: leaf.leaf for n in range(part.start, part.stop) for leaf in layers[n]}
        factor = leaf_factors(i, part, taken)
        for n in range(part.start, part.stop):
            layer = [_renumbered(leaf, prefix, depth) for leaf in layers[n]]
            layered[f"layer {n} of slices[{i}]"] = {
                _anonymous(leaf.path, prefix): leaf.leaf for leaf in layers[n]
            }
            merged += [
                new._replace(leaf=scaled(old.leaf, factor.get(old.path, 1.0), dtype))
                for new, old in zip(layer, layers[n], strict=True)
            ]
            depth += 1
    shapes = {i: {p: np.shape(x) for p, x in flat.items()} for i, flat in layered.items()}
    require_fitting(layered, shapes, dtype)
    return build(merged)


def _numbered(tree: list[Placed], prefix: re.Pattern[str]) -> dict[int, list[Placed]]:
    found: dict[int, list[Placed]] = {}
    for leaf in tree:
        match = prefix.match(leaf.path)
        if match is None:
            continue
        if not match.group(1).isdecimal():
            raise ValueError(
                f"{NAME}: {leaf.path!r}: the group of `layers` takes {match.group(1)!r}, which is "
                r"no number. Write it as (\d+)."
            )
        found.setdefault(int(match.group(1)), []).append(leaf)
    return found


def _count(i: int, found: dict[int, list[Placed]]) -> int:
    if sorted(found) != list(range(len(found))):
        raise ValueError(
            f"{NAME}: slices[{i}]: its layers are numbered {sorted(found)}. They must be numbered "
            "from 0 without gaps."
        )
    return len(found)


def _anonymous(path: Path, prefix: re.Pattern[str]) -> Path:
    match = prefix.match(path)
    assert match is not None
    return f"{path[: match.start(1)]}*{path[match.end(1) :]}"


def _renumbered(leaf: Placed, prefix: re.Pattern[str], number: int) -> Placed:
    """The leaf with another number in the key that holds the group."""
    match = prefix.match(leaf.path)
    assert match is not None
    first, last = match.span(1)
    keys, begin = list(leaf.keys), 0
    for j, key in enumerate(keys):
        text = str(key)
        if begin <= first and last <= begin + len(text):
            changed = f"{text[: first - begin]}{number}{text[last - begin :]}"
            keys[j] = changed if isinstance(key, str) else int(changed)
            break
        begin += len(text) + 1
    return leaf._replace(keys=tuple(keys))
