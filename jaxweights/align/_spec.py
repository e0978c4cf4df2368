"""PermutationSpec: which axes of which leaves move together when hidden units are renumbered."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxweights.core._paths import Params, Path, fail, flatten, nearest
from jaxweights.weights._weight import is_weight

# None stays as it is; a name is permuted by it; a tuple is an axis that holds several, first the
# slowest, where a number stands for entries that stay.
AxisName = None | str | tuple[str | int, ...]
Permutations = Mapping[str, Any]  # name -> integers (*stack, size)

_LISTED = 8  # leaves that one complaint shows


class Factor(NamedTuple):
    """Part of an axis: its name, if it has one, and its length."""

    name: str | None
    size: int


@dataclasses.dataclass(frozen=True)
class PermutationSpec:
    """Names the axes of every leaf, so that axes of one name are permuted together.

    A network computes the same function after its hidden units are renumbered, if every leaf that
    writes or reads them is renumbered alike. Each such freedom is a permutation with a name.

    Args:
      axes: For every leaf one entry an axis: None for an axis that stays, the name of a
        permutation, the name of a stack, or a tuple where an axis holds several in a row (slowest
        first; a number stands for that many entries that stay): `("heads", 64)` is an axis of
        whole heads of 64 features.
      sizes: Length of every permutation.
      stacks: Length of every stack: an axis of layers or experts that is not permuted itself, but
        along which permutations may differ.
      over: The stacks, or other permutations, along which a permutation differs. Its array is then
        `(*over, size)`: that of `{"mlp": ("layers",)}` has one row a layer, while a permutation
        without an entry is shared by all layers.

    Raises:
      TypeError: If an axis is neither None, a name nor a tuple of these.
      ValueError: If a name is unknown or not used, a leaf carries a permutation twice (matching
        would not be linear), or lacks what a permutation of it differs along; all are listed.

    Example:
      >>> PermutationSpec(
      ...     {"up": (None, "hidden"), "bias": ("hidden",), "down": ("hidden", None)},
      ...     sizes={"hidden": 8},
      ... ).names
      ('hidden',)
    """

    axes: Mapping[Path, tuple[AxisName, ...]]
    sizes: Mapping[str, int]
    stacks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    over: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks everything that needs no leaf."""
        name = "align.PermutationSpec"
        for field in ("axes", "sizes", "stacks", "over"):
            object.__setattr__(self, field, dict(getattr(self, field)))
        object.__setattr__(self, "axes", {p: tuple(entry) for p, entry in self.axes.items()})
        object.__setattr__(
            self, "over", {p: tuple(above) for p, above in self.over.items() if above}
        )
        fail(name, _wrong_kinds(self), TypeError)
        fail(name, [*_wrong_names(self), *_wrong_leaves(self)])

    @classmethod
    def of(
        cls,
        params: Params,
        axes: Mapping[Path, tuple[AxisName, ...]],
        *,
        stacks: Sequence[str] = (),
        over: Mapping[str, tuple[str, ...]] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> PermutationSpec:
        """Reads the lengths off a tree.

        Args:
          params: Parameters; arrays or abstract arrays.
          axes: As in the class.
          stacks: Names that are stacks; all others are permutations.
          over: As in the class.
          sizes: Lengths that no axis of their own shows.

        Returns:
          The spec, checked against the tree.

        Example:
          >>> import jax.numpy as jnp
          >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
          >>> axes = {"up": (None, "hidden"), "down": ("hidden", None)}
          >>> PermutationSpec.of(params, axes).sizes
          {'hidden': 8}
        """
        flat = flatten(params)[0]
        found = dict(sizes or {})
        for path, entry in axes.items():
            shape = getattr(flat.get(path), "shape", ())
            for axis, length in zip(entry, shape, strict=False):
                if isinstance(axis, str):
                    found.setdefault(axis, int(length))
        for path, entry in axes.items():  # what is left of an axis when all but one are known
            shape = getattr(flat.get(path), "shape", ())
            for axis, length in zip(entry, shape, strict=False):
                _solve_folded(axis, int(length), found)
        spec = cls(
            axes,
            sizes={name: size for name, size in found.items() if name not in stacks},
            stacks={name: found[name] for name in stacks if name in found},
            over=over or {},
        )
        spec.check(params)
        return spec

    @property
    def names(self) -> tuple[str, ...]:
        """The permutations, those that others differ along before these."""
        ordered: list[str] = []

        def visit(name: str) -> None:
            for above in self.over.get(name, ()):
                visit(above)
            if name in self.sizes and name not in ordered:
                ordered.append(name)

        for name in self.sizes:
            visit(name)
        return tuple(ordered)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a permutation's array, `(*stack, size)`."""
        return (*(self.length(above) for above in self.over.get(name, ())), self.sizes[name])

    def length(self, name: str) -> int:
        """Length of a permutation or stack."""
        return self.sizes[name] if name in self.sizes else self.stacks[name]

    def identity(self) -> dict[str, np.ndarray]:
        """The permutations that change nothing, int32."""
        return {
            name: np.broadcast_to(np.arange(self.sizes[name], dtype=np.int32), self.shape_of(name))
            for name in self.names
        }

    def without(self, *names: str) -> PermutationSpec:
        """The spec in which some permutations are fixed.

        What differs along one of them still may: it becomes a stack.
        """
        fail("align.PermutationSpec.without", _unknown(self.sizes, names))
        sizes = {name: size for name, size in self.sizes.items() if name not in names}
        # Nothing differs along what has one entry.
        still = {name for entry in self.over.values() for name in entry if self.length(name) > 1}
        over = {
            name: tuple(x for x in entry if x in sizes or x in still)
            for name, entry in self.over.items()
            if name in sizes
        }
        above = {x for entry in over.values() for x in entry}
        stacks = {**self.stacks, **{name: self.sizes[name] for name in names if name in above}}

        def keep(axis: AxisName) -> AxisName:
            parts = axis if isinstance(axis, tuple) else (axis,)
            kept = [x if x in sizes or x in stacks else self._size(x) for x in parts if x]
            kept = [x for x in kept if x != 1]
            if all(isinstance(x, int) for x in kept):
                return None
            return kept[0] if len(kept) == 1 and isinstance(kept[0], str) else tuple(kept)

        axes = {path: tuple(map(keep, entry)) for path, entry in self.axes.items()}
        return PermutationSpec(axes, sizes, stacks, over)

    def check(self, params: Params, asker: str = "align.PermutationSpec") -> None:
        """Refuses a tree that the spec does not describe.

        Args:
          params: Parameters; arrays or abstract arrays.
          asker: What the error calls the caller.

        Raises:
          ValueError: Naming every leaf that is missing, not described, or of another shape.
        """
        flat = flatten(params)[0]
        fail(asker, [*_left_out(self, flat), *misfits(self, flat)])

    def factors(self, path: Path, shape: Sequence[int]) -> tuple[tuple[Factor, ...], ...]:
        """The parts of every axis of a leaf."""
        return tuple(
            tuple(
                Factor(part if isinstance(part, str) else None, self._size(part)) for part in axis
            )
            if isinstance(axis, tuple)
            else (Factor(axis, int(length)),)
            for axis, length in zip(self.axes[path], shape, strict=True)
        )

    def leaves_of(self, name: str) -> tuple[Path, ...]:
        """Leaves that a permutation moves."""
        return tuple(path for path, entry in self.axes.items() if name in _names_of(entry))

    def _size(self, part: str | int) -> int:
        return self.length(part) if isinstance(part, str) else part


def _names_of(entry: Sequence[AxisName]) -> list[str]:
    """All names on a leaf, as often as they occur."""
    parts = [part for axis in entry for part in (axis if isinstance(axis, tuple) else (axis,))]
    return [part for part in parts if isinstance(part, str)]


def _solve_folded(axis: AxisName, length: int, found: dict[str, int]) -> None:
    if not isinstance(axis, tuple):
        return
    unknown = [part for part in axis if isinstance(part, str) and part not in found]
    known = math.prod(found.get(x, 1) if isinstance(x, str) else x for x in axis)
    if len(unknown) == 1 and known and length % known == 0:
        found[unknown[0]] = length // known


def _wrong_kinds(spec: PermutationSpec) -> list[str]:
    return [
        f"{path!r}: axis {i} is {axis!r}. It must be None, a name, or a tuple of names and numbers."
        for path, entry in spec.axes.items()
        for i, axis in enumerate(entry)
        if not (axis is None or isinstance(axis, str))
        and not (
            isinstance(axis, tuple)
            and all(isinstance(x, str | int) and not isinstance(x, bool) for x in axis)
        )
    ]


def _unknown(known: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        f"{name!r} is no permutation of the spec. Its permutations are "
        f"{', '.join(map(repr, nearest(name, known))) or 'none'}."
        for name in names
        if name not in known
    ]


def _wrong_names(spec: PermutationSpec) -> list[str]:
    problems = [
        f"{name!r} has length {size!r}. A length is an integer of at least 1."
        for name, size in (*spec.sizes.items(), *spec.stacks.items())
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1
    ]
    both = [name for name in spec.sizes if name in spec.stacks]
    problems += [f"{name!r} is both in sizes and in stacks. Leave it in one." for name in both]
    used = {name for entry in spec.axes.values() for name in _names_of(entry)}
    problems += [
        f"{name!r} is on no leaf. Take it out of sizes and stacks, or name an axis after it."
        for name in (*spec.sizes, *spec.stacks)
        if name not in used
    ]
    known = {**spec.sizes, **spec.stacks}
    for name, above in spec.over.items():
        problems += _unknown(spec.sizes, [name])
        problems += [
            f"over: {name!r} differs along {other!r}, which is neither a permutation nor a stack."
            for other in above
            if other not in known
        ]
        if _reaches(spec.over, name, name, set()):
            problems.append(f"over: {name!r} differs along itself. Take the circle out.")
    return problems


def _reaches(over: Mapping[str, tuple[str, ...]], start: str, goal: str, seen: set[str]) -> bool:
    for name in over.get(start, ()):
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            if _reaches(over, name, goal, seen):
                return True
    return False


def _wrong_leaves(spec: PermutationSpec) -> list[str]:
    problems = []
    known = {**spec.sizes, **spec.stacks}
    for path, entry in spec.axes.items():
        names = _names_of(entry)
        unknown = sorted({name for name in names if name not in known})
        if unknown:
            problems.append(
                f"{path!r}: {', '.join(map(repr, unknown))} has no length. Add it to sizes, or to "
                "stacks if it is not permuted."
            )
        problems += [
            f"{path!r}: carries {name!r} on two axes, so its match is no linear assignment. Give "
            "the axes two permutations if the model allows it, or None both."
            for name in sorted(set(names))
            if names.count(name) > 1
        ]
        problems += [
            f"{path!r}: carries {name!r}, which differs along {above!r}, but has no axis {above!r}."
            for name in dict.fromkeys(names)
            for above in spec.over.get(name, ())
            if above not in names
        ]
    return problems


def _left_out(spec: PermutationSpec, flat: Mapping[Path, Any]) -> list[str]:
    """Leaves that only one of tree and spec has."""
    problems = []
    missing = [path for path in spec.axes if path not in flat]
    if missing:
        problems.append(f"the tree lacks {_some(missing)}, which the spec describes.")
    extra = [p for p, leaf in flat.items() if p not in spec.axes and getattr(leaf, "shape", ())]
    if extra:
        problems.append(
            f"the spec does not describe {_some(extra)}. Give each leaf one entry an axis; None "
            "stays as it is."
        )
    return problems


def misfits(spec: PermutationSpec, flat: Mapping[Path, Any]) -> list[str]:
    """What is wrong with leaves that the spec describes."""
    problems = []
    for path, leaf in flat.items():
        if path not in spec.axes:
            continue
        if is_weight(leaf):
            problems.append(
                f"{path!r}: is a {type(leaf).__name__}, and only dense weights are permuted. Pass "
                "jaxweights.materialize(params)."
            )
            continue
        shape, entry = tuple(getattr(leaf, "shape", ())), spec.axes[path]
        if len(shape) != len(entry):
            problems.append(
                f"{path!r}: has shape {shape}, but the spec describes {len(entry)} axes: {entry}."
            )
            continue
        for i, (axis, length) in enumerate(zip(entry, shape, strict=True)):
            parts = axis if isinstance(axis, tuple) else (axis,)
            wanted = math.prod(spec._size(part) for part in parts if part is not None)
            if axis is not None and wanted != length:
                problems.append(
                    f"{path!r}: axis {i} has length {length}, but {axis!r} has {wanted}."
                )
    return problems


def _some(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return f"{list(paths[:_LISTED])}{more}"
