"""Which entries of a tensor belong together, by their places in the file."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxweights.stream._sums import RUN


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which entries of a tensor form a vector: those of the middle one of three axes.

    Args:
      before: Length of the first axis.
      along: Length of the axis that vectors run along.
      behind: Length of the last axis.
    """

    before: int
    along: int
    behind: int

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: tuple[int, ...]) -> Grouping | None:
        """That of vectors along some axes of a shape; None where they do not lie side by side."""
        long = [(a in axes, n) for a, n in enumerate(shape) if n != 1]
        inside = [i for i, (reduced, _) in enumerate(long) if reduced]
        first, last = (inside[0], inside[-1] + 1) if inside else (len(long), len(long))
        lengths = [n for _, n in long]
        if 0 in shape or len(inside) < last - first:
            return None
        return cls(*map(math.prod, (lengths[:first], lengths[first:last], lengths[last:])))

    @property
    def vectors(self) -> int:
        """Number of vectors."""
        return self.before * self.behind

    @property
    def block(self) -> int:
        """Entries of the vectors that lie among each other."""
        return self.along * self.behind

    @property
    def fits(self) -> bool:
        """Whether such a block is summed in one run; a single vector is padded like any tensor."""
        return self.block <= RUN and self.vectors > 1

    @property
    def unit(self) -> int:
        """Entries that no slice divides."""
        if self.fits:
            return self.block
        if self.behind == 1:
            return 1
        rows = max(RUN // self.behind, 1)
        return self.behind << (rows.bit_length() - 1)

    def run(self, entries: int) -> int:
        """Entries of a slice that are summed in one run."""
        return min(RUN, entries) if self.unit == 1 and not self.fits else self.unit

    def blocks(self, start: int, entries: int) -> np.ndarray:
        """The block that each run of a slice belongs to, `(runs,)`."""
        run = self.run(entries)
        return (start + run * np.arange(entries // run)) // self.block
