"""Which axes of a leaf form the matrix that a method works on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

Kind = Literal["linear", "embedding", "conv"]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names the input and the output axes of a leaf; every other axis is a stack axis.

    A method sees one `(in, out)` matrix, where `y = x @ matrix`: the input axes, flattened in the
    order given, are contracted with activations, the output axes are what the product produces.
    Stack axes (layers, experts) hold independent matrices. Axes are counted from the end, so
    that they keep their meaning when `scan` or `vmap` takes leading axes away.

    An embedding table `(vocab, dim)` counts as a matrix whose rows are outputs, `inputs=(-1,)`,
    `outputs=(-2,)`: so it reads when a tied head contracts it, and so its rows are grouped.

    Args:
      inputs: Input axes, negative.
      outputs: Output axes, negative.
      kind: How the model uses the leaf.

    Raises:
      ValueError: If an axis is not negative, repeated, or one side is empty.

    Example:
      >>> Axes(inputs=(-3,), outputs=(-2, -1))  # an attention kernel (d, heads, head_dim)
      Axes(inputs=(-3,), outputs=(-2, -1), kind='linear')
    """

    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        named = (*self.inputs, *self.outputs)
        if not self.inputs or not self.outputs or len(set(named)) < len(named):
            raise ValueError(
                f"Axes: inputs={self.inputs} and outputs={self.outputs} must be two non-empty, "
                "disjoint sets of axes."
            )
        if any(axis >= 0 for axis in named):
            raise ValueError(
                f"Axes: inputs={self.inputs}, outputs={self.outputs} must be counted from the end "
                "(negative). For a leaf of rank 3, axis 0 is -3."
            )

    @property
    def named(self) -> int:
        """Number of axes that are not stack axes."""
        return len(self.inputs) + len(self.outputs)


OUTPUTS_FIRST = Axes(inputs=(-1,), outputs=(-2,))
CONV_HWIO = Axes(inputs=(-4, -3, -2), outputs=(-1,), kind="conv")
CONV_OIHW = Axes(inputs=(-3, -2, -1), outputs=(-4,), kind="conv")
EMBEDDING = Axes(inputs=(-1,), outputs=(-2,), kind="embedding")


@dataclasses.dataclass(frozen=True)
class View:
    """Relates a leaf of any layout to its canonical `(*stack, in, out)` matrix.

    Holds no stack sizes, so one view serves the whole stack and each of its slices.

    Args:
      axes: Which axes are inputs and outputs.
      in_shape: Lengths of the input axes, in the order of `axes.inputs`.
      out_shape: Lengths of the output axes, in the order of `axes.outputs`.
    """

    axes: Axes
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], axes: Axes = Axes()) -> View:
        """Builds the view of a leaf of the given shape."""
        needed = -min((*axes.inputs, *axes.outputs))
        if needed > len(shape):
            raise ValueError(
                f"View: shape {tuple(shape)} has rank {len(shape)}, but {axes} names axis "
                f"{-needed}. State axes that the leaf has."
            )
        pick = lambda named: tuple(shape[a] for a in named)  # noqa: E731
        return cls(axes, pick(axes.inputs), pick(axes.outputs))

    @property
    def in_dim(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.in_shape)

    @property
    def out_dim(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.out_shape)

    @property
    def is_plain(self) -> bool:
        """Whether the leaf already is `(*stack, in, out)`."""
        return self.axes.inputs == (-2,) and self.axes.outputs == (-1,)

    def stack_axes(self, ndim: int) -> tuple[int, ...]:
        """Stack axes of a leaf of rank `ndim`, non-negative and ascending."""
        named = {a % ndim for a in (*self.axes.inputs, *self.axes.outputs)}
        return tuple(a for a in range(ndim) if a not in named)

    def shape(self, stack: Sequence[int]) -> tuple[int, ...]:
        """Logical shape of a leaf with the given stack sizes."""
        ndim = len(stack) + self.axes.named
        shape = [0] * ndim
        for axis, length in zip(self.axes.inputs, self.in_shape, strict=True):
            shape[axis] = length
        for axis, length in zip(self.axes.outputs, self.out_shape, strict=True):
            shape[axis] = length
        for axis, length in zip(self.stack_axes(ndim), stack, strict=True):
            shape[axis] = length
        return tuple(shape)

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """Rearranges a leaf into `(*stack, in, out)`."""
        if self.is_plain:
            return leaf
        ndim = leaf.ndim
        stack = self.stack_axes(ndim)
        order = (*stack, *(a % ndim for a in (*self.axes.inputs, *self.axes.outputs)))
        sizes = tuple(leaf.shape[a] for a in stack)
        return jnp.transpose(leaf, order).reshape(*sizes, self.in_dim, self.out_dim)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Puts a `(*stack, in, out)` matrix back into the leaf's own layout."""
        if self.is_plain:
            return matrix
        stack = matrix.shape[:-2]
        ndim = len(stack) + self.axes.named
        order = (
            *self.stack_axes(ndim),
            *(a % ndim for a in (*self.axes.inputs, *self.axes.outputs)),
        )
        inverse = sorted(range(ndim), key=order.__getitem__)
        return jnp.transpose(matrix.reshape(*stack, *self.in_shape, *self.out_shape), inverse)

    def transposed(self, ndim: int, permutation: Sequence[int]) -> View | None:
        """View after `jnp.transpose(leaf, permutation)`; None if the stack axes change order."""
        position = {old: new for new, old in enumerate(permutation)}
        moved_stack = [position[a] for a in self.stack_axes(ndim)]
        if moved_stack != sorted(moved_stack):
            return None
        move = lambda named: tuple(position[a % ndim] - ndim for a in named)  # noqa: E731
        axes = dataclasses.replace(
            self.axes, inputs=move(self.axes.inputs), outputs=move(self.axes.outputs)
        )
        return dataclasses.replace(self, axes=axes)

    def reshaped(self, shape: Sequence[int], new_shape: Sequence[int]) -> View | None:
        """View after `leaf.reshape(new_shape)`, or None where the matrix would change.

        Exact where stack, input and output axes are contiguous blocks whose products the new
        shape keeps: splitting or joining heads, for example.
        """
        ndim = len(shape)
        inputs = tuple(a % ndim for a in self.axes.inputs)
        outputs = tuple(a % ndim for a in self.axes.outputs)
        stack = self.stack_axes(ndim)
        for first, second in ((inputs, outputs), (outputs, inputs)):
            if (*stack, *first, *second) == tuple(range(ndim)):
                break
        else:
            return None
        stack_shape = tuple(shape[a] for a in stack)
        if tuple(new_shape[: len(stack)]) != stack_shape:
            return None
        rest = tuple(new_shape[len(stack) :])
        split = _split_at_product(rest, math.prod(shape[a] for a in first))
        if split is None or split == 0 or split == len(rest):
            return None
        # Counted from the end, so that the stack may shrink later.
        head = tuple(range(-len(rest), -len(rest) + split))
        tail = tuple(range(-len(rest) + split, 0))
        new_in, new_out = (head, tail) if first is inputs else (tail, head)
        axes = dataclasses.replace(self.axes, inputs=new_in, outputs=new_out)
        return View.of(new_shape, axes)


def _split_at_product(shape: Sequence[int], product: int) -> int | None:
    """Number of leading entries of `shape` whose product is `product`, as few as possible."""
    total = 1
    for i, length in enumerate(shape):
        if total == product:
            return i
        total *= length
    return len(shape) if total == product else None


def tiles(parts: int, length: int) -> bool:
    """Whether an axis falls into `parts` equal parts; into none only where it is empty."""
    return length % parts == 0 if parts else length == 0
