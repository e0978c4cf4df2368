"""map_over_stack: a function of one matrix, over the matrices of a stack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax


def map_over_stack(
    fn: Callable[[Any], Any],
    operands: Any,
    stack: Sequence[int],
    mapping: Literal["vmap", "map"] = "map",
) -> Any:
    """Calls `fn` with the operands of each matrix of a stack of any rank.

    Args:
      fn: Takes the operands of one matrix, as one pytree.
      operands: A pytree of arrays `(*stack, ...)`.
      stack: Lengths of the stack axes; without any, `fn` is called once, with the operands.
      mapping: `"map"` for one matrix after another, in the memory of one, `"vmap"` for all at once.

    Returns:
      What `fn` returns, with the stack axes in front.

    Example:
      >>> matrices = jnp.arange(24.0).reshape(2, 3, 2, 2)
      >>> map_over_stack(jnp.trace, matrices, (2, 3)).tolist()
      [[3.0, 11.0, 19.0], [27.0, 35.0, 43.0]]
    """
    if not stack:
        return fn(operands)
    flat = jax.tree.map(lambda x: x.reshape(math.prod(stack), *x.shape[len(stack) :]), operands)
    results = jax.vmap(fn)(flat) if mapping == "vmap" else jax.lax.map(fn, flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), results)
