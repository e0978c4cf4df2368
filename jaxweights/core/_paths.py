"""Paths: the one name that a leaf has in patterns, statistics, errors, keys and checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxweights.weights._weight import is_weight

Path = str
Params = Any  # a pytree of arrays and represented weights
Flat = dict[Path, Any]  # itself a pytree, with the same paths as the tree it came from


@dataclasses.dataclass(frozen=True)
class Structure:
    """What `unflatten` needs to know of a tree.

    Args:
      treedef: Its structure, as JAX has it.
      paths: The paths of its leaves, in its order. A dict by path keeps this order only until `jit`
        or `jax.tree.map` sort it, which puts `layers/10` before `layers/2`.
    """

    treedef: Any
    paths: tuple[Path, ...]


def flatten(tree: Params) -> tuple[Flat, Structure]:
    """Lists the leaves of a tree by path; represented weights are leaves.

    Args:
      tree: Any pytree.

    Returns:
      A dict from path to leaf in tree order, and the structure that `unflatten` needs.

    Raises:
      ValueError: If two leaves would share one path.

    Example:
      >>> flatten({"mlp": {"kernel": 1.0}})[0]
      {'mlp/kernel': 1.0}
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)
    flat: Flat = {}
    for key_path, leaf in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if path in flat:
            raise ValueError(
                f"core.flatten: {path!r}: two leaves have this path. Paths join keys with '/'; "
                "rename a key that contains one."
            )
        flat[path] = leaf
    return flat, Structure(treedef, tuple(flat))


def unflatten(structure: Structure, flat: Mapping[Path, Any]) -> Params:
    """Rebuilds the tree that `flatten` took apart.

    Args:
      structure: What `flatten` gave.
      flat: Leaves by path, in any order; any values.

    Returns:
      The tree.

    Example:
      >>> flat, structure = flatten({"up": 1.0, "down": 2.0})
      >>> unflatten(structure, {path: 10 * leaf for path, leaf in flat.items()})
      {'down': 20.0, 'up': 10.0}
    """
    return jax.tree.unflatten(structure.treedef, [flat[path] for path in structure.paths])


def path_key(key: jax.Array, path: Path) -> jax.Array:
    """Derives a key of its own for every path, which adding other leaves does not change.

    Args:
      key: A `jax.random.key`.
      path: Of a leaf.

    Returns:
      A key: the same for the same path, whatever else the tree holds.

    Example:
      >>> key = jax.random.key(0)
      >>> noise = jax.random.normal(path_key(key, "mlp/kernel"), (64,))
      >>> bool((noise == jax.random.normal(path_key(key, "mlp/bias"), (64,))).any())
      False
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def matching(pattern: str, paths: Iterable[Path]) -> list[Path]:
    """Paths that a regular expression matches from start to end."""
    compiled = re.compile(pattern)
    return [path for path in paths if compiled.fullmatch(path)]


def check_pattern(asker: str, pattern: object) -> None:
    """Refuses a pattern that is no regular expression, before any tree is seen."""
    if not isinstance(pattern, str):
        raise TypeError(f"{asker}: pattern {pattern!r} must be a string, a regular expression.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{asker}: pattern {pattern!r} is not a regular expression: {error}. "
            "A path is matched from start to end; '.*/kernel' names every kernel."
        ) from error


def nearest(wanted: str, candidates: Iterable[str], count: int = 5) -> list[str]:
    """The candidates most like `wanted`, best first."""
    pool = list(candidates)
    close = difflib.get_close_matches(wanted, pool, n=count, cutoff=0.3)
    return close or pool[:count]


def no_match(pattern: str, paths: Iterable[Path]) -> str:
    """What to say of a pattern that matches no path from start to end, and what would match.

    Example:
      >>> no_match("up/kernel", ["mlp/up/kernel", "mlp/down/kernel"])
      "pattern 'up/kernel' matches no leaf. It must match a whole path; '.*up/kernel' would."
      >>> no_match("mlp/op/.*", ["mlp/up/kernel"])
      "pattern 'mlp/op/.*' matches no leaf. The nearest paths: ['mlp/up/kernel']."
    """
    pool = list(paths)
    for longer in (f".*{pattern}", f"{pattern}.*", f".*{pattern}.*"):
        if "|" not in pattern and matching(longer, pool):
            whole = f"It must match a whole path; {longer!r} would."
            return f"pattern {pattern!r} matches no leaf. {whole}"
    plain = re.sub(r"[.*]{2,}", "", pattern)
    return f"pattern {pattern!r} matches no leaf. The nearest paths: {nearest(plain, pool)}."


def fail(asker: str, problems: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Raises one error that lists every problem; does nothing when there is none."""
    lines = list(problems)
    if lines:
        raise error("\n".join(f"{asker}: {line}" for line in lines))
