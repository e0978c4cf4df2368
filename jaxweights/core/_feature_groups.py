"""FeatureGroups: the kernel of a grouped convolution as a stack of matrices, one for each group."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core._stats import Statistic, Stats
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._weight import is_weight


@dataclasses.dataclass(frozen=True)
class FeatureGroups:
    """How the outputs of a kernel fall into groups that read inputs of their own.

    Of `G` groups, `g` reads the channels from `g * I / G` on and writes the outputs from
    `g * out / G` on: its matrix is `(in, out / G)`. With the first output axis split in two, the
    kernel is a leaf like any other, whose groups are one more stack axis.

    Args:
      shape: Shape of the kernel.
      whole: Its view.
      count: Groups, which divide the first output axis.
    """

    shape: tuple[int, ...]
    whole: View
    count: int

    @classmethod
    def of(cls, stats: Stats | None, path: str, leaf: Any, view: View) -> FeatureGroups | None:
        """The groups that statistics are of; None where all outputs share one input."""
        if stats is None:
            return None
        shape = tuple(leaf.shape)
        count = stats.feature_groups(path, tuple(shape[a] for a in view.stack_axes(len(shape))))
        if count == 1 or not count or view.axes.kind != "conv" or view.out_shape[0] % count:
            return None
        return cls(shape, view, count)

    def unfit(self, path: str, leaf: Any) -> str | None:
        """What is wrong with a leaf that is to be split, if anything."""
        inner = leaf.base if isinstance(leaf, Masked) else leaf
        if not is_weight(inner):
            return None
        return (
            f"{path!r}: is a {type(inner).__name__}, which cannot be taken apart into its "
            f"{self.count} feature groups, each with statistics of its own. Apply this to the "
            "dense weight, or leave this one out with `partition`."
        )

    @property
    def split_shape(self) -> tuple[int, ...]:
        """Shape of the kernel with an axis of groups in front of its first output axis."""
        axis = self._axis
        each = self.shape[axis] // self.count
        return (*self.shape[:axis], self.count, each, *self.shape[axis + 1 :])

    @property
    def view(self) -> View:
        """View of the split kernel."""
        first = self.whole.axes.outputs[0]
        move = lambda axes: tuple(a if a >= first else a - 1 for a in axes)  # noqa: E731
        axes = dataclasses.replace(
            self.whole.axes,
            inputs=move(self.whole.axes.inputs),
            outputs=move(self.whole.axes.outputs),
        )
        return View.of(self.split_shape, axes)

    def split(self, leaf: Any) -> Any:
        """The kernel, an array or a mask over one, with its groups as a stack axis."""
        if isinstance(leaf, Masked):
            return Masked(self.split(leaf.base), self.split(leaf.mask))
        return leaf.reshape(self.split_shape)

    def statistic(self, value: jax.Array) -> jax.Array:
        """A statistic `(*stack, groups, ...)` with its axes in the order of the split kernel."""
        return jnp.moveaxis(value, self._groups_axis, self._place)

    def pooled(self, name: Statistic, value: jax.Array) -> jax.Array:
        """An extreme of the inputs of all groups, `(*stack, in)`."""
        return {"min": jnp.min, "max": jnp.max}[name](value, axis=self._groups_axis)

    def join(self, leaf: Any) -> Any:
        """The kernel of what `split` gave, dense or `Scaled` with fields of rows and columns."""
        if isinstance(leaf, Masked):
            return Masked(self.join(leaf.base), self.join(leaf.mask))
        if not is_weight(leaf):
            return leaf.reshape(self.shape)
        return dataclasses.replace(jax.tree.map(self._join_columns, leaf), view=self.whole)

    @property
    def _groups_axis(self) -> int:
        """Where statistics have the axis of groups: behind the stack of the kernel."""
        return len(self.shape) - self.whole.axes.named

    @property
    def _axis(self) -> int:
        return self.whole.axes.outputs[0] % len(self.shape)

    @property
    def _place(self) -> int:
        """Which of the stack axes of the split kernel is that of the groups."""
        return self.view.stack_axes(len(self.shape) + 1).index(self._axis)

    def _join_columns(self, field: jax.Array) -> jax.Array:
        """`(*stack, rows, groups * columns)` of a field `(*stack and groups, rows, columns)`."""
        moved = jnp.moveaxis(field, self._place, -2)
        return moved.reshape(*moved.shape[:-2], moved.shape[-2] * moved.shape[-1])


def columns_like_gram(matrix: jax.Array, gram: jax.Array) -> jax.Array:
    """A matrix as its Gram matrices see it.

    Args:
      matrix: `(*stack, in, out)`.
      gram: `(*stack, in, in)`, or `(*stack, groups, in, in)` of feature groups.

    Returns:
      The matrix, or its columns by group, `(*stack, groups, in, out / groups)`.
    """
    if gram.ndim == matrix.ndim:
        return matrix
    groups = gram.shape[-3]
    *stack, rows, columns = matrix.shape
    return jnp.moveaxis(matrix.reshape(*stack, rows, groups, columns // groups), -2, -3)
