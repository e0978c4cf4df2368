"""split and combine: what `jax.grad` and the optimizer see, and everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._paths import (
    Flat,
    Params,
    Path,
    check_pattern,
    fail,
    flatten,
    matching,
    nearest,
    no_match,
)
from jaxweights.weights._weight import is_weight

Trainable = dict[Path, jax.Array]
Filter = str | Callable[[Path, Any], bool | Collection[str]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What `split` leaves behind: a pytree whose only leaves are arrays.

    Args:
      arrays: Arrays that are not trained, by path; fields of represented weights have the path of
        their leaf in front.
      static: Pairs of path and value for leaves that are no arrays: Python numbers, functions.
      order: For every leaf of the whole tree in order, the path that its value is stored under:
        its own, or that of the leaf it is tied to.
      treedef: Structure of the whole tree.
    """

    arrays: dict[Path, jax.Array]
    static: tuple[tuple[Path, Any], ...] = dataclasses.field(metadata={"static": True})
    order: tuple[Path, ...] = dataclasses.field(metadata={"static": True})
    treedef: Any = dataclasses.field(metadata={"static": True})

    @property
    def paths(self) -> list[Path]:
        """Paths that the trainable part must have."""
        held = {*self.arrays, *(path for path, _ in self.static)}
        return [path for path in dict.fromkeys(self.order) if path not in held]


def split(params: Params, select: Filter) -> tuple[Trainable, Frozen]:
    """Takes the arrays to train out of a tree.

    Differentiate with respect to the first result only, and no gradient of a frozen weight is ever
    computed:

        def loss(trainable, frozen, batch):
            return loss_fn(lift(model)(combine(trainable, frozen), batch))
        grads = jax.jit(jax.grad(loss))(trainable, frozen, batch)

    A matrix that stands at several paths as one array (a tied head) is held once, so that its
    gradient is the sum over all of its uses and its buffer can be donated.

    Args:
      params: Any pytree: dicts, flax state, dataclass modules, with represented weights in it.
      select: What to train. A regular expression for the whole path of an array, or of a leaf,
        which means every floating array of it. Or a function of path and leaf that returns a
        bool, or, for a represented weight, the names of its fields; `adapt.factors` is one.

    Returns:
      trainable: A plain dict from path to floating array, for `jax.grad`, optax and Orbax.
        Integer and bool arrays are never in it.
      frozen: The rest, a pytree that can be an argument of jitted functions.

    Raises:
      TypeError: If `select` is neither a pattern nor a function.
      ValueError: If it selects nothing, names a field that is not a floating array, or selects
        only one of two tied leaves.

    Example:
      >>> params = {"body": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.zeros((2, 1))}}
      >>> trainable, frozen = split(params, "head/.*")
      >>> list(trainable)
      ['head/kernel']
      >>> jax.tree.structure(combine(trainable, frozen)) == jax.tree.structure(params)
      True
    """
    if isinstance(select, str):
        check_pattern("core.split", select)
    elif not callable(select):
        raise TypeError(
            f"core.split: select={select!r} is a {type(select).__name__}. Pass a regular "
            "expression or a function of path and leaf, such as adapt.factors."
        )
    leaves, _ = flatten(params)
    values, treedef = _flatten_fields(params)
    chosen = _chosen(select, leaves, values)
    stored_under = _ties(values)
    fail("core.split", _torn_ties(stored_under, chosen))
    kept = [path for path in values if stored_under[path] == path]
    trainable = {path: values[path] for path in kept if path in chosen}
    arrays = {path: values[path] for path in kept if path not in chosen and _is_array(values[path])}
    static = tuple((path, values[path]) for path in kept if not _is_array(values[path]))
    return trainable, Frozen(arrays, static, tuple(stored_under[p] for p in values), treedef)


def combine(trainable: Mapping[Path, Any], frozen: Frozen) -> Params:
    """Puts a tree together again: the exact inverse of `split`.

    Args:
      trainable: The first result of `split`, or one with other values.
      frozen: The second result of `split`.

    Returns:
      The tree.

    Raises:
      ValueError: If `trainable` lacks a path or has one that was not split off.

    Example:
      >>> params = {"kernel": jnp.ones((2, 2)), "steps": 3}
      >>> combine(*split(params, "kernel"))["steps"]
      3
    """
    wanted = frozen.paths
    problems = [
        f"{path!r}: is missing. Pass every array that `split` returned as trainable."
        for path in wanted
        if path not in trainable
    ]
    problems += [
        f"{path!r}: was not split off. Trainable are {nearest(path, wanted)}."
        for path in trainable
        if path not in wanted
    ]
    fail("core.combine", problems)
    values = {**frozen.arrays, **dict(frozen.static), **trainable}
    return jax.tree.unflatten(frozen.treedef, [values[path] for path in frozen.order])


def _flatten_fields(params: Params) -> tuple[Flat, Any]:
    """As `flatten`, but into represented weights."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    named = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]
    flat = dict(named)
    if len(flat) < len(named):
        twice = next(path for i, (path, _) in enumerate(named) if path in dict(named[:i]))
        raise ValueError(
            f"core.split: {twice!r}: two arrays have this path. Paths join keys with '/'; rename a "
            "key that contains one."
        )
    return flat, treedef


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_trainable(value: Any) -> bool:
    return _is_array(value) and jnp.issubdtype(value.dtype, jnp.inexact)


def _chosen(select: Filter, leaves: Flat, values: Flat) -> set[Path]:
    fields = {path: _fields(path, leaf, values) for path, leaf in leaves.items()}
    if isinstance(select, str):
        named = set(matching(select, values))
        for path in matching(select, leaves):
            named |= set(fields[path])
        advice = no_match(select, values)
    else:
        named, problems = _ask(select, leaves, fields, values)
        fail("core.split", problems)
        advice = (
            f"{getattr(select, '__name__', 'the function')} selects nothing of "
            f"{list(leaves)[:5]}. Select at least one array; adapt.factors needs leaves that "
            "adapt.lora made."
        )
    chosen = {path for path in named if _is_trainable(values[path])}
    if named and not chosen:
        odd = sorted(named)[0]
        kind = getattr(values[odd], "dtype", type(values[odd]).__name__)
        advice = f"{odd!r}: is {kind}, and so is all that was selected. Only floats can be trained."
    fail("core.split", [] if chosen else [advice])
    return chosen


def _ask(
    select: Callable[[Path, Any], bool | Collection[str]],
    leaves: Flat,
    fields: dict[Path, list[Path]],
    values: Flat,
) -> tuple[set[Path], list[str]]:
    named: set[Path] = set()
    problems = []
    for path, leaf in leaves.items():
        answer = select(path, leaf)
        if isinstance(answer, bool | np.bool_):
            named |= set(fields[path]) if answer else set()
            continue
        for name in answer:
            field = _field(path, name)
            if field in values and _is_trainable(values[field]):
                named.add(field)
            else:
                problems.append(f"{path!r}: has no floating field {name!r}. It has {fields[path]}.")
    return named, problems


def _fields(path: Path, leaf: Any, values: Flat) -> list[Path]:
    """Paths of the arrays of a leaf."""
    if not is_weight(leaf):
        return [path]
    return [field for field in values if field.startswith(_field(path, ""))]


def _field(path: Path, name: str) -> Path:
    """Path of a field; a tree that is one weight has the path ''."""
    return f"{path}/{name}" if path else name


def _ties(values: Flat) -> dict[Path, Path]:
    """Maps every path to the first that holds the same matrix."""
    first: dict[int, Path] = {}
    # Vectors are shared by accident, such as one array of zeros for two biases; matrices are not.
    return {
        path: first.setdefault(id(value), path) if _is_array(value) and value.ndim > 1 else path
        for path, value in values.items()
    }


def _torn_ties(stored_under: dict[Path, Path], chosen: set[Path]) -> list[str]:
    return [
        f"{path!r}: is the same array as {first!r}, but only one of them is selected. Select both "
        "or neither; `jnp.copy` unties them."
        for path, first in stored_under.items()
        if (path in chosen) != (first in chosen)
    ]
