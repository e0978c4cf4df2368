"""Trees of dicts, lists and tuples, built from leaves by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxweights.core._paths import Path
from jaxweights.weights._weight import is_weight

Key = str | int


class Placed(NamedTuple):
    """A leaf and the way to it."""

    keys: tuple[Key, ...]  # dict keys and places in lists
    kinds: tuple[type, ...]  # of the containers on the way
    leaf: Any

    @property
    def path(self) -> Path:
        """The path that `flatten` would give."""
        return "/".join(map(str, self.keys))


def placed_leaves(name: str, tree: Any) -> list[Placed]:
    """Lists the leaves of a tree of dicts, lists and tuples.

    Args:
      name: What errors call the function.
      tree: The tree.

    Returns:
      The leaves in tree order.

    Raises:
      TypeError: If a container is of another kind, of which no other can be made with other keys.
    """
    found = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight):
        keys: list[Key] = []
        kinds: list[type] = []
        node = tree
        for entry in key_path:
            kinds.append(type(node))
            if isinstance(node, Mapping) and isinstance(entry, jax.tree_util.DictKey):
                keys.append(entry.key)
            elif type(node) in (list, tuple) and isinstance(entry, jax.tree_util.SequenceKey):
                keys.append(entry.idx)
            else:
                where = "/".join(map(str, keys)) or "the root"
                raise TypeError(
                    f"{name}: {where!r}: is a {type(node).__name__}, whose entries cannot be "
                    "rearranged. Pass a tree of dicts and lists, such as flax's to_pure_dict gives."
                )
            node = node[keys[-1]]
        found.append(Placed(tuple(keys), tuple(kinds), leaf))
    return found


def build(leaves: list[Placed]) -> Any:
    """The tree in which every leaf is where it is placed; lists are in the order of places."""
    if len(leaves) == 1 and not leaves[0].keys:
        return leaves[0].leaf
    kind = leaves[0].kinds[0]
    inner: dict[Key, list[Placed]] = {}
    for keys, kinds, leaf in leaves:
        inner.setdefault(keys[0], []).append(Placed(keys[1:], kinds[1:], leaf))
    children = {key: build(part) for key, part in inner.items()}
    if issubclass(kind, Mapping):
        return kind(children)  # type: ignore[call-arg]
    return kind(children[key] for key in sorted(children))  # type: ignore[call-arg]
