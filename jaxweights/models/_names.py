"""Two-way maps between a checkpoint's tensors and a parameter tree with stacked layers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jaxweights.core._paths import fail, flatten, nearest

Convention = Literal["huggingface", "gguf"]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where one kind of tensor lives in a checkpoint and in the tree, and how they differ.

    Attributes:
      path: Path in the tree; "layers/..." leaves are stacked over layers.
      name: Name in the checkpoint, with "{layer}" where there is one for each layer.
      shape: Shape in the tree, without the layer axis.
      transpose: Whether the checkpoint stores the matrix as (out, in).
      interleaved_heads: Heads whose output features GGUF stores as rotated pairs (0, d/2, 1,
        d/2 + 1, ...); 0 where the order is the tree's.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    interleaved_heads: int = 0

    @property
    def stacked(self) -> bool:
        """Whether the checkpoint has one tensor for each layer."""
        return "{layer}" in self.name

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return self.shape[::-1] if self.transpose else self.shape

    def from_checkpoint(self, tensor: np.ndarray) -> np.ndarray:
        """The tree's orientation and order of a checkpoint tensor; a view where possible."""
        if self.interleaved_heads:
            # (out, ...) -> (heads, pairs, 2, ...) -> halves behind each other
            split = tensor.reshape(self.interleaved_heads, -1, 2, *tensor.shape[1:])
            tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        return tensor.T if self.transpose else tensor

    def to_checkpoint(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `from_checkpoint`, contiguous."""
        tensor = leaf.T if self.transpose else leaf
        if self.interleaved_heads:
            split = tensor.reshape(self.interleaved_heads, 2, -1, *tensor.shape[1:])
            tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        return np.ascontiguousarray(tensor)


@dataclasses.dataclass(frozen=True)
class NameMap:
    """All rules of one model under one convention of names.

    Attributes:
      rules: One for each leaf of the tree.
      num_layers: Layers in the tree.
      prefix: What some checkpoints put before these names and others leave out.
      writes_prefix: Whether it is written.
      carried: Patterns of tensors that a checkpoint may hold and the model does not use.
      tied_head: Name under which some checkpoints repeat a tied embedding, or None.
      layer_pattern: Pattern whose first group is the layer in a tensor's name.
    """

    rules: tuple[TensorRule, ...]
    num_layers: int
    prefix: str = ""
    writes_prefix: bool = False
    carried: tuple[str, ...] = ()
    tied_head: tuple[str, str] | None = None
    layer_pattern: str = r"layers?\.(\d+)\."

    def expected(self) -> dict[str, tuple[TensorRule, int | None]]:
        """Rule and layer of every tensor that a checkpoint must hold."""
        found: dict[str, tuple[TensorRule, int | None]] = {}
        for rule in self.rules:
            if rule.stacked:
                for layer in range(self.num_layers):
                    found[rule.name.format(layer=layer)] = (rule, layer)
            else:
                found[rule.name] = (rule, None)
        return found

    def canonical(self, name: str) -> str:
        """The name without the prefix that some checkpoints write."""
        return name.removeprefix(self.prefix)

    def is_carried(self, canonical: str) -> bool:
        """Whether the model has no use for this tensor."""
        return any(re.fullmatch(pattern, canonical) for pattern in self.carried)

    def written_name(self, canonical: str) -> str:
        """The name under which a tensor is written."""
        unprefixed = canonical == "lm_head.weight" or not self.writes_prefix
        return canonical if unprefixed else self.prefix + canonical


def read_tree(tensors: Mapping[str, Any], names: NameMap, *, asker: str) -> dict[str, Any]:
    """Stacks a checkpoint's tensors into a nested dict of NumPy arrays.

    Args:
      tensors: By name; arrays, or anything with `shape` and `read()`. Read one at a time.
      names: The map.
      asker: Named in errors.

    Returns:
      The tree. A stacked leaf whose layers differ in dtype gets the narrowest that holds all.

    Raises:
      ValueError: If a tensor is missing, unexpected or has the wrong shape; all are listed.
    """
    stored = _by_canonical_name(tensors, names, asker)
    expected = names.expected()
    fail(asker, _differences(tensors, stored, expected, names))
    flat: dict[str, np.ndarray] = {}
    for rule in names.rules:
        if not rule.stacked:
            flat[rule.path] = np.array(rule.from_checkpoint(_read(tensors[stored[rule.name]])))
            continue
        parts = (rule.name.format(layer=layer) for layer in range(names.num_layers))
        read = (rule.from_checkpoint(_read(tensors[stored[part]])) for part in parts)
        flat[rule.path] = _stack(read, names.num_layers)
    if names.tied_head and names.tied_head[0] in stored:
        _check_tied(tensors[stored[names.tied_head[0]]], flat[names.tied_head[1]], names, asker)
    return _nest(flat)


def write_tree(params: Any, names: NameMap, *, asker: str) -> dict[str, np.ndarray]:
    """Takes the tree apart into a checkpoint's tensors: the inverse of `read_tree`, bit for bit.

    Args:
      params: The tree, of arrays.
      names: The map.
      asker: Named in errors.

    Returns:
      Tensors by name, contiguous, in the leaves' dtypes.

    Raises:
      TypeError: If a leaf is not an array; all such leaves are listed.
      ValueError: If a leaf is missing, unexpected or has the wrong shape; all are listed.
    """
    flat, _ = flatten(params)
    rules = {rule.path: rule for rule in names.rules}
    strange = [
        f"{path!r} is a {type(leaf).__name__}, not an array. Give `materialize(params)`, or write "
        "represented weights with the Orbax format."
        for path, leaf in flat.items()
        if not isinstance(leaf, jax.Array | np.ndarray)
    ]
    fail(asker, strange, TypeError)
    fail(asker, _tree_differences(flat, rules, names.num_layers))
    tensors: dict[str, np.ndarray] = {}
    for path, rule in rules.items():
        leaf = np.asarray(flat[path])
        if not rule.stacked:
            tensors[names.written_name(rule.name)] = rule.to_checkpoint(leaf)
            continue
        for layer in range(names.num_layers):
            name = names.written_name(rule.name.format(layer=layer))
            tensors[name] = rule.to_checkpoint(leaf[layer])
    return tensors


def tree_shapes(names: NameMap) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf by path."""
    return {
        rule.path: ((names.num_layers, *rule.shape) if rule.stacked else rule.shape)
        for rule in names.rules
    }


def check_tree(flat: Mapping[str, Any], names: NameMap, *, asker: str) -> None:
    """Refuses a flat tree that lacks a leaf, has one too many, or one of another shape."""
    rules = {rule.path: rule for rule in names.rules}
    fail(asker, _tree_differences(flat, rules, names.num_layers))


def _by_canonical_name(tensors: Iterable[str], names: NameMap, asker: str) -> dict[str, str]:
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


def _differences(
    tensors: Mapping[str, Any],
    stored: Mapping[str, str],
    expected: Mapping[str, tuple[TensorRule, int | None]],
    names: NameMap,
) -> Iterator[str]:
    """One line for everything that keeps the checkpoint from being this model."""
    tied = names.tied_head[0] if names.tied_head else None
    missing = [name for name in expected if name not in stored]
    unexpected = [
        name
        for name in stored
        if name not in expected and name != tied and not names.is_carried(name)
    ]
    absent_layers, missing = _whole_layers(missing, list(expected), names)
    extra_layers, unexpected = _whole_layers(unexpected, list(stored), names)
    for layer, count in absent_layers:
        yield f"layer {layer} is missing: none of its {count} tensors is there."
    written = {name: names.written_name(name) for name in expected}
    for name in missing:
        hint = _hint(written[name], [stored[other] for other in unexpected] or stored.values())
        yield f"{written[name]!r} is missing, shape {expected[name][0].checkpoint_shape}.{hint}"
    for layer, count in extra_layers:
        yield (
            f"layer {layer} is unexpected ({count} tensors): the config has "
            f"{names.num_layers} layers."
        )
    for name in unexpected:
        hint = _hint(stored[name], [written[other] for other in missing] or written.values())
        yield f"{stored[name]!r} is unexpected.{hint}"
    for name, (rule, _) in expected.items():
        if name in stored:
            shape = tuple(_shape(tensors[stored[name]]))
            if shape != rule.checkpoint_shape:
                yield f"{stored[name]!r} has shape {shape}, expected {rule.checkpoint_shape}."


def _whole_layers(
    chosen: list[str], everything: list[str], names: NameMap
) -> tuple[list[tuple[int, int]], list[str]]:
    """Sums up layers of which every tensor is among the chosen; returns them and the rest."""

    def by_layer(tensor_names):
        layers: dict[int, list[str]] = {}
        for name in tensor_names:
            if match := re.search(names.layer_pattern, name):
                layers.setdefault(int(match[1]), []).append(name)
        return layers

    total = by_layer(everything)
    whole = {
        layer: members
        for layer, members in by_layer(chosen).items()
        if len(members) == len(total[layer])
    }
    summed = {name for members in whole.values() for name in members}
    counts = [(layer, len(members)) for layer, members in sorted(whole.items())]
    return counts, [name for name in chosen if name not in summed]


def _tree_differences(
    flat: Mapping[str, Any], rules: Mapping[str, TensorRule], num_layers: int
) -> Iterator[str]:
    for path, rule in rules.items():
        shape = (num_layers, *rule.shape) if rule.stacked else rule.shape
        if path not in flat:
            candidates = [p for p in flat if p not in rules] or flat
            yield f"{path!r} is missing, shape {shape}.{_hint(path, candidates)}"
        elif tuple(flat[path].shape) != shape:
            yield f"{path!r} has shape {tuple(flat[path].shape)}, expected {shape}."
    for path in flat:
        if path not in rules:
            candidates = [p for p in rules if p not in flat] or rules
            yield f"{path!r} is unexpected.{_hint(path, candidates)}"


def _hint(name: str, candidates: Iterable[str]) -> str:
    close = nearest(name, candidates, count=2)
    return f" Nearest names: {', '.join(map(repr, close))}." if close else ""


def _shape(tensor: Any) -> tuple[int, ...]:
    return tensor.shape if hasattr(tensor, "shape") else _read(tensor).shape


def _read(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.read() if hasattr(tensor, "read") else tensor)


def _stack(layers: Iterator[np.ndarray], count: int) -> np.ndarray:
    """Copies layers into one array, allocated once; widens it if a later layer needs that."""
    first = next(layers)
    stacked = np.empty((count, *first.shape), first.dtype)
    stacked[0] = first
    for index, layer in enumerate(layers, start=1):
        if layer.dtype != stacked.dtype:
            stacked = stacked.astype(_holding_both(stacked.dtype, layer.dtype))
        stacked[index] = layer
    return stacked


def _holding_both(a: np.dtype, b: np.dtype) -> np.dtype:
    """The narrowest float dtype that holds every value of two; NumPy's rules lack bfloat16."""
    for wide in (a, b, np.dtype(np.float32)):
        if np.can_cast(a, wide, "safe") and np.can_cast(b, wide, "safe"):
            return wide
    return np.dtype(np.float64)


def _check_tied(head: Any, table: np.ndarray, names: NameMap, asker: str) -> None:
    assert names.tied_head is not None
    head = _read(head)
    if head.shape != table.shape or not np.array_equal(head, table):
        fail(
            asker,
            [
                f"{names.tied_head[0]!r} differs from the embedding, but the config ties them. "
                "Set tie_embeddings=False (tie_word_embeddings in config.json)."
            ],
        )


def _nest(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
