"""Moves tensors between a checkpoint and a tree, after checking that they fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxweights.core._paths import fail, flatten
from jaxweights.models._alike import in_one_form
from jaxweights.models._differences import checkpoint_differences, tree_differences
from jaxweights.models._names import NameMap
from jaxweights.weights._weight import is_weight


def read_tree(tensors: Mapping[str, Any], names: NameMap, *, asker: str) -> dict[str, Any]:
    """Stacks a checkpoint's tensors into a nested dict of NumPy arrays and represented weights.

    Args:
      tensors: By name; arrays, or anything with `shape` and `read()`. Read one at a time.
      names: The map.
      asker: Named in errors.

    Returns:
      The tree, with the represented weights that tensors were read as. A stacked leaf whose layers
      differ in dtype gets the narrowest that holds all.

    Raises:
      ValueError: If a tensor is missing, unexpected or has the wrong shape; all are listed.
    """
    stored = stored_names(tensors, names, asker)
    fail(asker, checkpoint_differences(lambda name: _shape(tensors[name]), stored, names))
    flat: dict[str, Any] = {}
    for rule in names.rules:
        if not rule.stacked:
            tensor = rule.from_checkpoint(_read(tensors[stored[rule.name]]))
            flat[rule.path] = tensor if is_weight(tensor) else np.array(tensor)
            continue
        parts = (rule.name.format(layer=layer) for layer in range(names.num_layers))
        read = (rule.from_checkpoint(_read(tensors[stored[part]])) for part in parts)
        flat[rule.path] = _stack(read, names.num_layers)
    if names.tied_head and names.tied_head[0] in stored:
        _check_tied(tensors[stored[names.tied_head[0]]], flat[names.tied_head[1]], names, asker)
    return nest(flat)


def write_tree(
    params: Any, names: NameMap, *, asker: str, represented: bool = False
) -> dict[str, Any]:
    """Takes the tree apart into a checkpoint's tensors: the inverse of `read_tree`, bit for bit.

    Args:
      params: The tree, of arrays.
      names: The map.
      asker: Named in errors.
      represented: Whether represented weights are taken apart too, into one for each layer.

    Returns:
      Tensors by name, contiguous, in the leaves' dtypes.

    Raises:
      TypeError: If a leaf is not an array; all such leaves are listed.
      ValueError: If a leaf is missing, unexpected or has the wrong shape; all are listed.
    """
    flat, _ = flatten(params)
    strange = [
        f"{path!r} is a {type(leaf).__name__}, not an array. Give `materialize(params)`, or write "
        "represented weights with the Orbax format."
        for path, leaf in flat.items()
        if not (isinstance(leaf, jax.Array | np.ndarray) or (represented and is_weight(leaf)))
    ]
    fail(asker, strange, TypeError)
    fail(asker, tree_differences(flat, names))
    tensors: dict[str, Any] = {}
    for rule in names.rules:
        leaf = flat[rule.path]
        leaf = jax.tree.map(np.asarray, leaf) if is_weight(leaf) else np.asarray(leaf)
        if not rule.stacked:
            tensors[names.written_name(rule.name)] = rule.to_checkpoint(leaf)
            continue
        for layer in range(names.num_layers):
            name = names.written_name(rule.name.format(layer=layer))
            one = jax.tree.map(lambda field, layer=layer: field[layer], leaf)
            tensors[name] = rule.to_checkpoint(one)
    return tensors


def check_tree(flat: Mapping[str, Any], names: NameMap, *, asker: str) -> None:
    """Refuses a flat tree that lacks a leaf, has one too many, or one of another shape."""
    fail(asker, tree_differences(flat, names))


def stored_names(tensors: Iterable[str], names: NameMap, asker: str) -> dict[str, str]:
    """Names in a checkpoint by the names of the map; refuses two for one tensor."""
    stored: dict[str, str] = {}
    for name in tensors:
        canonical = names.canonical(name)
        if canonical in stored:
            fail(
                asker,
                [
                    f"{name!r} and {stored[canonical]!r} are the same tensor with and without the "
                    f"prefix {names.prefix!r}. Keep one of them."
                ],
            )
        stored[canonical] = name
    return stored


def _shape(tensor: Any) -> tuple[int, ...]:
    return tensor.shape if hasattr(tensor, "shape") else _read(tensor).shape


def _read(tensor: Any) -> Any:
    tensor = tensor.read() if hasattr(tensor, "read") else tensor
    return tensor if is_weight(tensor) else np.asarray(tensor)


def _stack(layers: Iterator[Any], count: int) -> Any:
    """Copies layers into one array, allocated once; widens it if a later layer needs that."""
    first = next(layers)
    if is_weight(first):
        return _stack_weights([first, *layers])
    stacked = np.empty((count, *first.shape), first.dtype)
    stacked[0] = first
    for index, layer in enumerate(layers, start=1):
        if is_weight(layer):
            layer = np.asarray(layer.materialize())
        if layer.dtype != stacked.dtype:
            stacked = stacked.astype(_holding_both(stacked.dtype, layer.dtype))
        stacked[index] = layer
    return stacked


def _stack_weights(layers: list[Any]) -> Any:
    """One weight of all layers, or a dense array where no one representation holds them."""
    alike = in_one_form(layers)
    if alike is not None:
        return jax.tree.map(lambda *fields: np.stack(fields), *alike)
    dense = (np.asarray(layer.materialize() if is_weight(layer) else layer) for layer in layers)
    return _stack(dense, len(layers))


def _holding_both(a: np.dtype, b: np.dtype) -> np.dtype:
    """The narrowest float dtype that holds every value of two; NumPy's rules lack bfloat16."""
    for wide in (a, b, np.dtype(np.float32)):
        if np.can_cast(a, wide, "safe") and np.can_cast(b, wide, "safe"):
            return wide
    return np.dtype(np.float64)


def _check_tied(head: Any, table: Any, names: NameMap, asker: str) -> None:
    assert names.tied_head is not None
    head, table = (np.asarray(x.materialize()) if is_weight(x) else x for x in (_read(head), table))
    if head.shape != table.shape or not np.array_equal(head, table, equal_nan=True):
        fail(
            asker,
            [
                f"{names.tied_head[0]!r} differs from the embedding, but the config ties them. "
                "Set tie_embeddings=False (tie_word_embeddings in config.json)."
            ],
        )


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
