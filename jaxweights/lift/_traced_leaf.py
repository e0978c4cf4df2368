"""TracedLeaf: a leaf on its way through a jaxpr, and what became of its axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

# One axis of a value: which pieces of which original axes it consists of, as
# (original axis, piece, number of pieces). Joined axes have several entries.
Origin = tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class TracedLeaf:
    """A leaf, or a rearrangement or slice of one.

    Args:
      path: The leaf.
      origins: What each axis consists of.
      shape: Its shape by now.
      place: Tells which slice it is: equal for two leaves where the same matrices of both are
        meant.
    """

    path: str
    origins: tuple[Origin, ...]
    shape: tuple[int, ...]
    place: tuple[Any, ...] = ()

    @classmethod
    def whole(cls, path: str, shape: Sequence[int]) -> Self:
        """A leaf as it enters the program."""
        return cls(path, tuple(((axis, 0, 1),) for axis in range(len(shape))), tuple(shape))

    def original_axes(self, axes: Sequence[int]) -> tuple[int, ...] | None:
        """Original axes that the given axes make up, or None where one is cut in two."""
        pieces: dict[int, set[int]] = {}
        counts: dict[int, int] = {}
        for axis in axes:
            for original, piece, of in self.origins[axis]:
                pieces.setdefault(original, set()).add(piece)
                counts[original] = of
        if any(len(found) != counts[original] for original, found in pieces.items()):
            return None
        return tuple(sorted(pieces))

    def axes_met(self, own: Sequence[int], others: Sequence[int]) -> tuple[Any, ...]:
        """Axes of the activations in the order that the leaf's original axes give its matrix.

        Args:
          own: Some of the leaf's axes.
          others: The axes of the activations that they meet.

        Returns:
          The axes; with the leaf's path where one axis joins original ones in another order than
          theirs, so that no other leaf has equal ones.
        """
        pairs = sorted(zip(own, others, strict=True), key=lambda pair: self.origins[pair[0]])
        joined = [origin for axis, _ in pairs for origin in self.origins[axis]]
        unlike = () if joined == sorted(joined) else (self.path,)
        return (*(other for _, other in pairs), *unlike)

    def with_axes(self, axes: Sequence[int]) -> Self:
        """Some of the axes, in some order; the others have length 1."""
        return dataclasses.replace(
            self,
            origins=tuple(self.origins[a] for a in axes),
            shape=tuple(self.shape[a] for a in axes),
        )

    def one_step(self) -> Self:
        """What a loop over the first axis has of it in one step."""
        return dataclasses.replace(
            self, origins=self.origins[1:], shape=self.shape[1:], place=(*self.place, "step")
        )

    def layers(self, start: Any, stride: int, sizes: Sequence[int]) -> Self | None:
        """A range of layers, of these lengths; None for a cut through any other axis."""
        if tuple(sizes[1:]) != self.shape[1:]:
            return None
        where = (len(self.place), self.shape[0], start, stride, sizes[0])
        return dataclasses.replace(self, shape=tuple(sizes), place=(*self.place, where))

    def upside_down(self) -> Self:
        """The layers in reverse order."""
        return dataclasses.replace(self, place=(*self.place, "reversed"))

    def reshaped(self, new: Sequence[int]) -> Self | None:
        """Axes joined or split; None where pieces of two axes would be one."""
        origins: list[Origin] = []
        old_axis, new_axis = 0, 0
        while old_axis < len(self.shape) or new_axis < len(new):
            olds, news = [old_axis], [new_axis]
            old_axis, new_axis = old_axis + 1, new_axis + 1
            while (left := _size(self.shape, olds)) != (right := _size(new, news)):
                if left < right:
                    olds.append(old_axis)
                    old_axis += 1
                else:
                    news.append(new_axis)
                    new_axis += 1
                if old_axis > len(self.shape) or new_axis > len(new):
                    return None
            joined = tuple(e for a in olds if a < len(self.shape) for e in self.origins[a])
            pieces = sum(a < len(new) for a in news)
            if pieces == 1:
                origins.append(joined)
            elif len(joined) == 1 and joined[0][2] == 1:
                origins += [((joined[0][0], i, pieces),) for i in range(pieces)]
            elif not joined:
                origins += [()] * pieces
            else:
                return None
        return dataclasses.replace(self, origins=tuple(origins), shape=tuple(new))


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Entries along some axes, of which those behind the last have length 1."""
    return math.prod(shape[a] for a in axes if a < len(shape))
