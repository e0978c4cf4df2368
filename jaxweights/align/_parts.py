"""Parts of axes, and which of them are bound to move together: a union-find over the axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Axis = tuple["Part", ...]  # slowest first; an axis of length 1 has no parts
Axes = tuple[Axis, ...]  # of one value


class Part:
    """An axis, or one of the factors of its length, of some value of a program.

    Parts that are bound move together. A part may fall into smaller ones, where the program
    reshapes it. It is fixed where something tells its entries apart.

    Attributes:
      size: Its length, above 1.
      fixed: Why its entries must stay, if they must.
      unproven: Why it could not be shown that they may move.
    """

    __slots__ = ("_link", "_parts", "fixed", "size", "unproven")

    def __init__(self, size: int, fixed: str | None = None) -> None:
        self.size, self.fixed = size, fixed
        self.unproven: str | None = None
        self._link: Part | None = None
        self._parts: Axis = ()

    def whole(self) -> Part:
        """The part that stands for all that this one is bound to."""
        part = self
        while part._link is not None:
            part = part._link
        if self is not part:
            self._link = part
        return part

    def pieces(self) -> Axis:
        """The smallest parts it consists of."""
        whole = self.whole()
        return tuple(x for part in whole._parts for x in part.pieces()) or (whole,)

    def cut(self, head: int) -> None:
        """Lets it fall into parts of lengths `head` and `size // head`."""
        whole = self.whole()
        whole._parts = (Part(head, whole.fixed), Part(whole.size // head, whole.fixed))
        for part in whole._parts:
            part.unproven = whole.unproven


def fresh(shape: Sequence[int], fixed: str | None = None) -> Axes:
    """Axes of a value that nothing is known about."""
    return tuple((Part(n, fixed),) if n > 1 else () for n in shape)


def pieces(axis: Iterable[Part]) -> list[Part]:
    """The smallest parts of an axis."""
    return [piece for part in axis for piece in part.pieces()]


def fix(axis: Iterable[Part], why: str) -> None:
    """Forbids the entries of an axis to move."""
    for piece in pieces(axis):
        piece.fixed = piece.fixed or why


def give_up(axis: Iterable[Part], why: str) -> None:
    """Forbids the entries of an axis to move, for want of a proof that they may."""
    for piece in pieces(axis):
        piece.unproven = piece.unproven or why


def bind(first: Axis, second: Axis) -> None:
    """Makes two axes of one length move together, as far as both fall into the same parts."""
    ours, theirs = pieces(first), pieces(second)
    while ours and theirs:
        a, b = ours[0].whole(), theirs[0].whole()
        if len(a.pieces()) > 1 or len(b.pieces()) > 1:  # cut since the list was made
            ours, theirs = [*a.pieces(), *ours[1:]], [*b.pieces(), *theirs[1:]]
        elif a is b or a.size == b.size:
            if a is not b:
                b._link = a
                a.fixed, a.unproven = a.fixed or b.fixed, a.unproven or b.unproven
            ours, theirs = ours[1:], theirs[1:]
        elif max(a.size, b.size) % min(a.size, b.size) == 0:
            (a if a.size > b.size else b).cut(min(a.size, b.size))
        else:
            why = f"it is split into {a.size} and into {b.size}, which do not divide one another"
            fix((*ours, *theirs), why)
            return


def split_axis(axis: Axis, head: int) -> tuple[Axis, Axis] | None:
    """The slower and the faster parts of an axis, `head` being the product of the first."""
    rest, front = pieces(axis), []
    while head > 1 and rest:
        part = rest.pop(0)
        if head % part.size == 0:
            front.append(part)
            head //= part.size
        elif part.size % head == 0:
            part.cut(head)
            rest = [*part.pieces(), *rest]
        else:
            return None
    return tuple(front), tuple(rest)


def regroup(axes: Axes, shape: Sequence[int]) -> Axes:
    """Axes after a reshape."""
    rest: Axis = tuple(piece for axis in axes for piece in pieces(axis))
    out = []
    for i, n in enumerate(shape):
        found = split_axis(rest, n)
        if found is None:
            fix(rest, f"it is reshaped to {tuple(shape)}, across the axes")
            return (*out, *fresh(shape[i:], "it stems from a reshape across axes"))
        out.append(found[0])
        rest = found[1]
    return tuple(out)


def length(axis: Axis) -> int:
    """Number of entries."""
    return math.prod(part.size for part in axis)
