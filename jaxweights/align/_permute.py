"""Permuting trees, and the group of permutations: composition and inverses."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxweights.align._spec import Factor, Permutations, PermutationSpec, _unknown
from jaxweights.core._paths import Params, Path, fail, flatten, unflatten


class Step(NamedTuple):
    """One gather: along an axis of the expanded leaf, differing along other axes of it."""

    axis: int
    over: tuple[int, ...]


class Moves(NamedTuple):
    """How a leaf is permuted; the same for all leaves that look alike, so they share a program.

    Attributes:
      shape: Shape in which every named part of an axis is an axis of its own.
      steps: Gathers in order: what others differ along comes first.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...]


def apply_permutation(spec: PermutationSpec, params: Params, permutations: Permutations) -> Params:
    """Renumbers the hidden units of a model, which leaves its function as it is.

    Every axis is gathered: entry `i` of the result is entry `permutation[i]` of the input.

    Args:
      spec: Names the axes.
      params: Parameters.
      permutations: Integers `(*stack, size)` by name; what is not listed stays. Arrays that are
        traced under `jit` are taken as they come.

    Returns:
      The tree with its leaves permuted; dtypes stay.

    Raises:
      ValueError: If the tree does not fit the spec, or a permutation is unknown or none.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": jnp.array([[1., 2.]]), "down": jnp.array([[3.], [4.]])}
      >>> axes = {"up": (None, "hidden"), "down": ("hidden", None)}
      >>> spec = PermutationSpec.of(params, axes)
      >>> apply_permutation(spec, params, {"hidden": [1, 0]})["up"]
      Array([[2., 1.]], dtype=float32)

    Source: Ainsworth et al. 2022, Git Re-Basin, arXiv:2209.04836.
    """
    name = "align.apply_permutation"
    spec.check(params, name)
    found = check_permutations(name, spec, permutations)
    flat, structure = flatten(params)
    return unflatten(structure, permute_flat(spec, flat, found))


def permute_flat(
    spec: PermutationSpec, flat: Mapping[Path, Any], permutations: Permutations
) -> dict[Path, Any]:
    """As `apply_permutation`, of a flat tree and permutations that are known to fit."""
    new = dict(flat)
    for path, leaf in flat.items():
        if path not in spec.axes:
            continue
        factors = [f for axis in spec.factors(path, leaf.shape) for f in axis]
        moves, order = moves_of(spec, factors, permutations)
        indices = [permutations[name] for name in order]
        if moves.steps and on_host(leaf, *indices):
            new[path] = jax.device_put(_take_host(np.asarray(leaf), moves, indices), _device(leaf))
        elif moves.steps:
            new[path] = _permute_jit(leaf, indices, moves=moves)
    return new


def on_host(leaf: Any, *others: Any) -> bool:
    """Whether NumPy reads a leaf in place: it then spares a program for every shape."""
    if any(isinstance(x, jax.core.Tracer) for x in (leaf, *others)):
        return False
    if not isinstance(leaf, jax.Array):
        return jax.default_backend() == "cpu"
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _device(leaf: Any) -> Any:
    # An array that was free to go anywhere stays so: programs are compiled for one or the other.
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def moves_of(
    spec: PermutationSpec, factors: list[Factor], names: Permutations
) -> tuple[Moves, list[str]]:
    """How an array with these parts is permuted, and by which permutations in turn."""
    place = {factor.name: i for i, factor in enumerate(factors) if factor.name is not None}
    order = [name for name in spec.names if name in place and name in names]
    steps = tuple(
        Step(place[name], tuple(place[above] for above in spec.over.get(name, ())))
        for name in order
    )
    return Moves(tuple(factor.size for factor in factors), steps), order


def permute_leaf(leaf: jax.Array, indices: Sequence[Any], moves: Moves) -> jax.Array:
    """One leaf, gathered step by step."""
    parts = leaf.reshape(moves.shape)
    for step, index in zip(moves.steps, indices, strict=True):
        index = jnp.asarray(index)
        if not step.over:
            parts = jnp.take(parts, index, axis=step.axis, mode="clip")
        else:
            aligned = _aligned(index, step, parts.ndim)
            parts = jnp.take_along_axis(parts, aligned, axis=step.axis, mode="clip")
    return parts.reshape(leaf.shape)


_permute_jit = functools.partial(jax.jit, static_argnames="moves")(permute_leaf)


def _aligned(index: Any, step: Step, ndim: int) -> Any:
    """The index with its axes where those of the leaf are, and ones between."""
    places = (*step.over, step.axis)
    order = sorted(range(len(places)), key=lambda i: places[i])
    shape = [1] * ndim
    for place, length in zip(places, index.shape, strict=True):
        shape[place] = length
    return index.transpose(order).reshape(shape)


def compose(
    spec: PermutationSpec, first: Permutations, second: Permutations
) -> dict[str, np.ndarray]:
    """The permutations that do what `first` and then `second` do.

    Args:
      spec: Names the axes.
      first: Permutations; what is not listed stays.
      second: As `first`.

    Returns:
      All permutations of the spec, int32.

    Example:
      >>> spec = PermutationSpec({"bias": ("hidden",)}, sizes={"hidden": 3})
      >>> compose(spec, {"hidden": [1, 2, 0]}, {"hidden": [1, 0, 2]})["hidden"].tolist()
      [2, 1, 0]
    """
    name = "align.compose"
    old = spec.identity() | check_permutations(name, spec, first)
    return follow(spec, old, check_permutations(name, spec, second))


def follow(
    spec: PermutationSpec, first: dict[str, np.ndarray], then: Permutations
) -> dict[str, np.ndarray]:
    """As `compose`, of permutations that are known to fit."""
    moved = {
        name for name in first if name in then or set(spec.over.get(name, ())).intersection(then)
    }
    return {
        name: _follow(spec, name, array, then) if name in moved else array
        for name, array in first.items()
    }


def _follow(spec: PermutationSpec, name: str, index: np.ndarray, then: Permutations) -> np.ndarray:
    """One permutation after others were applied behind it."""
    names = (*spec.over.get(name, ()), name)
    factors = [Factor(n, spec.length(n)) for n in names]
    moves, order = moves_of(spec, factors, then)
    return _take_host(np.asarray(index), moves, [then[name] for name in order])


def _take_host(array: np.ndarray, moves: Moves, indices: Sequence[Any]) -> np.ndarray:
    """As `permute_leaf`, by NumPy."""
    parts = array.reshape(moves.shape)
    for step, index in zip(moves.steps, map(np.asarray, indices), strict=True):
        if not step.over:
            parts = np.take(parts, index, axis=step.axis)
        else:
            parts = np.take_along_axis(parts, _aligned(index, step, parts.ndim), axis=step.axis)
    return parts.reshape(array.shape)


def invert(spec: PermutationSpec, permutations: Permutations) -> dict[str, np.ndarray]:
    """The permutations that undo others.

    Args:
      spec: Names the axes.
      permutations: What to undo; what is not listed stays.

    Returns:
      All permutations of the spec, int32.

    Example:
      >>> spec = PermutationSpec({"bias": ("hidden",)}, sizes={"hidden": 3})
      >>> invert(spec, {"hidden": [1, 2, 0]})["hidden"].tolist()
      [2, 0, 1]
    """
    given = spec.identity() | check_permutations("align.invert", spec, permutations)
    inverse: dict[str, np.ndarray] = {}
    for name in spec.names:  # those that others differ along come first
        above = {other: inverse[other] for other in spec.over.get(name, ()) if other in inverse}
        moved = _follow(spec, name, given[name], above)
        inverse[name] = np.argsort(moved, axis=-1).astype(np.int32)
    return {name: inverse[name] for name in given}


def check_permutations(name: str, spec: PermutationSpec, permutations: Permutations) -> dict:
    """Arrays of permutations, after everything wrong with them was reported at once."""
    problems = _unknown(spec.sizes, list(permutations))
    found: dict[str, Any] = {}
    for key, value in permutations.items():
        if key not in spec.sizes:
            continue
        shape, wanted = np.shape(value), spec.shape_of(key)
        found[key] = value
        if shape != wanted:
            problems.append(f"{key!r}: has shape {shape}. The spec asks for {wanted}.")
        elif not isinstance(value, jax.core.Tracer):
            found[key] = np.asarray(value)
            if not np.issubdtype(found[key].dtype, np.integer):
                problems.append(f"{key!r}: has dtype {found[key].dtype}. Indices are integers.")
            elif not (np.sort(found[key], axis=-1) == np.arange(wanted[-1])).all():
                problems.append(
                    f"{key!r}: is no permutation: some of 0 to {wanted[-1] - 1} occur twice, "
                    "others never."
                )
            else:
                found[key] = found[key].astype(np.int32)
    fail(name, problems)
    return found
