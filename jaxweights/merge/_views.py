"""Which leaves a merge treats as matrices, and how."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core._layout import Layout
from jaxweights.core._paths import Flat, Path
from jaxweights.merge._stacks import stack_axes
from jaxweights.weights._axes import View


def matrix_views(name: str, flat: Flat, layout: Layout, *, named: bool) -> dict[Path, View]:
    """Views of the leaves that are matrices; biases, norms and embedding tables have none.

    Args:
      name: What errors call the transform.
      flat: The floating leaves.
      layout: Axes of the matrices.
      named: Whether a rule named these leaves; then embedding tables are matrices too.

    Returns:
      Views by path.

    Raises:
      ValueError: If a leaf of rank 3 or more has axes neither in the layout nor by convention.
    """
    stack_axes(name, flat, layout)
    return {
        path: View.of(leaf.shape, layout[path])
        for path, leaf in flat.items()
        if path in layout and (named or layout[path].kind != "embedding") and leaf.size
    }


def map_matrices(fn: Any, operands: Any, ndim: int) -> Any:
    """Maps `fn` over the stack of operands `(*stack, ...)`, one matrix after another.

    Args:
      fn: Takes the operands of one matrix, as one pytree.
      operands: Arrays whose `ndim - 2` leading axes are the stack.
      ndim: Rank of a stacked matrix.

    Returns:
      What `fn` returns, with the stack in front.
    """
    stack = jax.tree.leaves(operands)[0].shape[: ndim - 2]
    if not stack:
        return fn(operands)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(stack) :]), operands)
    results = jax.lax.map(fn, flat)
    return jax.tree.map(lambda x: jnp.reshape(x, (*stack, *x.shape[1:])), results)
