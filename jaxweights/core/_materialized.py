"""materialized: a transform that changes values only."""

from __future__ import annotations

import dataclasses

from jaxweights.core._context import Context
from jaxweights.core._paths import Params, flatten, unflatten
from jaxweights.core._transform import State, Transform
from jaxweights.weights._weight import is_weight, materialize


def materialized(tx: Transform) -> Transform:
    """Keeps the values that a transform computes and not the representation it gives them.

    A leaf that was dense before is dense after: pruned weights become arrays with zeros,
    quantized weights arrays on a grid. So a transform may run again and again in a training loop.

    Args:
      tx: The transform.

    Returns:
      The transform that materialises what `tx` represents. Leaves that were represented before
      are left as `tx` returns them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxweights.core import apply, stateless, unflatten
      >>> from jaxweights.weights import Masked
      >>> mask_all = stateless(lambda p, _: {"w": Masked(p["w"], p["w"] > 1)}, name="mask_all")
      >>> apply(materialized(mask_all), {"w": jnp.array([1.0, 2.0])})
      {'w': Array([0., 2.], dtype=float32)}
    """

    def update(params: Params, state: State, context: Context) -> tuple[Params, State]:
        before, _ = flatten(params)
        new, state = tx.update(params, state, context)
        after, structure = flatten(new)
        for path, leaf in after.items():
            if is_weight(leaf) and not is_weight(before.get(path)):
                after[path] = materialize(leaf)
        return unflatten(structure, after), state

    return dataclasses.replace(tx, update=update, name=f"materialized({tx.name})")
