"""Allocation: a candidate for every leaf, and what all of them take and lose."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from jaxweights.core._partition import partition_by
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform


@dataclasses.dataclass(frozen=True)
class LeafChoice:
    """What one leaf gets.

    Attributes:
      path: Its path.
      choice: Name of the candidate.
      bytes: What the leaf then takes.
      error: What the leaf then adds to the error.
      options: Of every candidate that fits the leaf, its bytes and error.
      unfit: Of every candidate that does not, the reason.
    """

    path: Path
    choice: str
    bytes: int
    error: float
    options: dict[str, tuple[int, float]]
    unfit: dict[str, str]


@dataclasses.dataclass(frozen=True)
class FrontPoint:
    """One allocation of the front: for every leaf a candidate, and what they sum to.

    Args:
      bytes: Of the leaves together, as they are stored.
      error: Sum of the leaves' errors.
      choices: Name of the candidate by path of the leaf.
    """

    bytes: int
    error: float
    choices: dict[Path, str]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A choice for every leaf. Prints as a table.

    Attributes:
      leaves: What each leaf gets.
      budget: The bytes that were allowed.
      bytes: What all leaves take together.
      error: What they sum to.
      bound: No choice within the budget errs less than this.
      front: The allocations that are best for some price of a byte: the lower convex hull of all,
        from the fewest bytes to the least error.
      uniform: Of every candidate that fits all leaves, the bytes and error of giving it to all.
      candidates: The transforms by name.
    """

    leaves: tuple[LeafChoice, ...]
    budget: int
    bytes: int
    error: float
    bound: float
    front: tuple[FrontPoint, ...]
    uniform: dict[str, tuple[int, float]]
    candidates: Mapping[str, Transform] = dataclasses.field(repr=False)

    @property
    def choices(self) -> dict[Path, str]:
        """Names of candidates by path: what is to be stored."""
        return {leaf.path: leaf.choice for leaf in self.leaves}

    @property
    def gap(self) -> float:
        """How far the error may be above the least possible one, relative to it."""
        return (self.error - self.bound) / self.error if self.error > 0 else 0.0

    @property
    def transform(self) -> Transform:
        """The allocation as one transform."""
        return partition_by(self.choices, self.candidates)

    def to_json(self, indent: int | None = None) -> str:
        """JSON of everything but the transforms; `partition_by` needs its `choices` alone."""
        content = {
            "choices": self.choices,
            "budget": self.budget,
            "bytes": self.bytes,
            "error": self.error,
            "bound": self.bound,
            "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves],
            "front": [dataclasses.asdict(point) for point in self.front],
            "uniform": self.uniform,
        }
        return json.dumps(content, indent=indent)

    def __str__(self) -> str:
        """An aligned table with a total."""
        rows = [(x.path, x.choice, str(x.bytes), f"{x.error:.4g}") for x in self.leaves]
        total = ("total", f"of {self.budget} bytes", str(self.bytes), f"{self.error:.4g}")
        table = [("path", "choice", "bytes", "error"), *rows, total]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = [
            "  ".join(
                cell.rjust(width) if column > 1 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        rule = "-" * (sum(widths) + 6)
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
