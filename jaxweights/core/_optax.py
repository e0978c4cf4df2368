"""to_optax: a transform as the last member of an optax chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.core._context import Context
from jaxweights.core._materialized import materialized
from jaxweights.core._paths import Params, flatten, unflatten
from jaxweights.core._schedule import refuse_changes
from jaxweights.core._stats import Stats
from jaxweights.core._transform import State, Transform

if TYPE_CHECKING:
    import optax


class ProjectionState(NamedTuple):
    """State of `to_optax`; a pytree of arrays, which Orbax saves like any optimizer state."""

    count: jax.Array
    """Updates so far, int32 scalar."""
    inner: State
    """State of the transform."""


def to_optax(
    tx: Transform,
    *,
    stats: Stats | None = None,
    models: Sequence[Params] | None = None,
    key: jax.Array | None = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformation:
    """Projects the parameters after each optimizer step: onto a mask, a grid, a rank.

    Put it last in an `optax.chain`. It replaces the updates by those that lead to
    `tx(params + updates)`: a parameter that `tx` sets to zero is exactly zero after
    `optax.apply_updates`, and one that it leaves alone gets exactly the optimizer's update. Only
    the values of `tx` count: what it represents is materialised.

    Args:
      tx: The transform; it sees the number of earlier updates as `context.step`, so that
        `every`, `between` and ramps can be inside.
      stats: As in `apply`.
      models: As in `apply`.
      key: As in `apply`; every update draws anew.
      layout: As in `apply`.

    Returns:
      The optax transformation. Its `update` must be given `params`.

    Raises:
      ValueError: At an update, without `params`, or if `tx` changes shapes, dtypes or the
        representation of a leaf that was represented before.

    Example:
      >>> import jax, optax
      >>> from jaxweights.core import stateless
      >>> positive = stateless(lambda p, _: jax.tree.map(jax.nn.relu, p), name="positive")
      >>> optimizer = optax.chain(optax.sgd(1.0), to_optax(positive))
      >>> params = {"w": jnp.array([1.0, 5.0])}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update({"w": jnp.array([3.0, 3.0])}, state, params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([0., 2.], dtype=float32)}
    """
    import optax

    if not isinstance(tx, Transform):
        raise TypeError(f"core.to_optax: {tx!r} is a {type(tx).__name__}, not a transform.")
    values_of = materialized(tx)
    flat_models = None if models is None else tuple(flatten(model)[0] for model in models)

    def init(params: Params) -> ProjectionState:
        return ProjectionState(jnp.zeros([], jnp.int32), tx.init(flatten(params)[0]))

    def update(
        updates: Params, state: Any, params: Params | None = None
    ) -> tuple[Params, ProjectionState]:
        if params is None:
            raise ValueError(
                "core.to_optax: params is missing: call optimizer.update(grads, state, params)."
            )
        stepped, structure = flatten(optax.apply_updates(params, updates))
        context = Context(
            stats=stats,
            models=flat_models,
            step=state.count,
            key=None if key is None else jax.random.fold_in(key, state.count),
            layout=resolve_layout(stepped, layout, stats),
        )
        projected, inner = values_of.update(stepped, state.inner, context)
        refuse_changes("core.to_optax", tx.name, (stepped, state.inner), (projected, inner))
        updates = jax.tree.map(
            _update_to,
            params,
            updates,
            unflatten(structure, stepped),
            unflatten(structure, projected),
        )
        return updates, ProjectionState(state.count + 1, inner)

    return optax.GradientTransformation(init, update)


def _update_to(
    param: jax.Array, update: jax.Array, stepped: jax.Array, projected: jax.Array
) -> jax.Array:
    """The update that leads to `projected`; exact where that is zero or nothing was changed."""
    dtype = np.promote_types(update.dtype, param.dtype)
    difference = projected.astype(dtype) - param.astype(dtype)
    return jnp.where(projected == stepped, update.astype(dtype), difference)
