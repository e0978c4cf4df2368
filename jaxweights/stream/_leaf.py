"""One tensor of a tree, what it is merged with, and which of its entries belong together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.merge._per_leaf import Group, group_axes
from jaxweights.merge._stacks import stack_axes
from jaxweights.stream._grouping import Grouping
from jaxweights.stream._jobs import Job, Operand


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a transform does one job for.

    Args:
      name: Path of the leaf, and name of the tensor that is written.
      dtype: Dtype that is written.
      operands: The leaf, then those of the models.
      layout: Axes of the leaf.
      seed: Randomness.
    """

    name: str
    dtype: np.dtype
    operands: tuple[Operand, ...]
    layout: LayoutLike = None
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.operands[0].shape

    @property
    def entries(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)

    def grouping(self, method: str, group: Group) -> Grouping | None:
        """What the vectors of a method are; None where they do not lie side by side."""
        leaf = self.operands[0]
        flat = {self.name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}
        found = resolve_layout(flat, self.layout)
        stacks = stack_axes(method, flat, found)
        return Grouping.of(leaf.shape, group_axes(flat, found, stacks, group)[self.name])

    def matrices(self, method: str) -> Grouping | None:
        """Its layers and experts, each of them one vector; None where they are not whole runs."""
        found = self.grouping(method, "leaf")
        return found if found is not None and found.behind == 1 else None

    def job(self, compute: Callable[..., Any], layers: Grouping, **more: Any) -> Job:
        """A job that writes it in slices, none of which crosses the end of a layer.

        Args:
          compute: As in `Job`.
          layers: From `matrices`.
          **more: Further settings of the job.
        """
        return Job(
            self.name,
            self.shape,
            self.dtype,
            self.operands,
            compute,
            entrywise=True,
            block=layers.block if layers.before > 1 else None,
            **more,
        )
