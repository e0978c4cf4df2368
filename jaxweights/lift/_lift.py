"""lift: lets any JAX function take represented weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from jaxweights.lift import _compat, _control, _linear  # noqa: F401  (they register the rules)
from jaxweights.lift._walk import Named, OnMaterialize, Walk
from jaxweights.weights._weight import is_weight

F = TypeVar("F", bound=Callable[..., Any])


def lift(fn: F, *, on_materialize: OnMaterialize = "ok") -> F:
    """Lets a function of dense arrays take represented weights in their place.

    The function is traced with dense stand-ins and its jaxpr evaluated again: equations that no
    represented weight reaches run as they are, products with a represented weight use its own
    `dot`, and whatever has no rule gets the dense weight. So the result is always that of
    `fn` on materialised weights, up to rounding; the rules only make it cheap. Composes with `jit`,
    `grad`, `vmap`, `scan`, `checkpoint`, `shard_map`, inside and outside.

    Tracing happens at every call: put `jax.jit` around the lifted function.

    Args:
      fn: Any JAX function: `model.apply` of linen, a function of an NNX state, an Equinox module
        call, a bare function. Arguments that are no arrays pass through unchanged.
      on_materialize: What to do where a weight has to become dense: `"ok"` nothing, `"warn"` a
        warning, `"error"` a ValueError; both name the weight's path and the primitive.

    Returns:
      The lifted function. Its results are arrays, never represented weights.

    Raises:
      ValueError: If `on_materialize` is none of the three.

    Example:
      >>> import jax, jax.numpy as jnp, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> model = lambda params, x: x @ params["kernel"]
      >>> quantized = jw.apply(jw.quantize.round_to_nearest(bits=8), params)
      >>> jax.jit(jw.lift(model))(quantized, jnp.ones((2, 64))).shape
      (2, 8)
    """
    if on_materialize not in ("ok", "warn", "error"):
        raise ValueError(
            f"lift: on_materialize={on_materialize!r}. Choose 'ok', 'warn' or 'error'."
        )

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        return evaluate_lifted(fn, Walk(on_materialize=on_materialize), args, kwargs)

    return lifted  # type: ignore[return-value]


def evaluate_lifted(
    fn: Callable[..., Any], walk: Walk, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls `fn` on arguments that may hold represented weights, through a walk."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_weight)
    flat = [leaf for _, leaf in leaves]
    if not any(map(is_weight, flat)):
        return fn(*args, **kwargs)
    traced = [i for i, leaf in enumerate(flat) if is_weight(leaf) or _is_array(leaf)]
    outputs: list[Any] = []

    def dense_fn(*dense: Any) -> list[Any]:
        filled = list(flat)
        for i, x in zip(traced, dense, strict=True):
            filled[i] = x
        args, kwargs = jax.tree.unflatten(treedef, filled)
        out, out_tree = jax.tree.flatten(fn(*args, **kwargs))
        # Results that are no arrays (strings, configurations) go round the trace.
        arrays = [x for x in out if _is_arraylike(x)]
        outputs[:] = [out_tree, [None if _is_arraylike(x) else (x,) for x in out]]
        return arrays

    abstract = lambda x: (_compat.abstract_weight if is_weight(x) else _compat.abstract)(x)  # noqa: E731
    closed = jax.make_jaxpr(dense_fn)(*(abstract(flat[i]) for i in traced))
    values = [_named(leaves[i][0], flat[i]) for i in traced]
    results = iter(walk.run(closed.jaxpr, closed.consts, values))
    out_tree, static = outputs
    out = [walk.dense(next(results), "output") if x is None else x[0] for x in static]
    return jax.tree.unflatten(out_tree, out)


def _named(key_path: Any, leaf: Any) -> Any:
    if not is_weight(leaf):
        return leaf
    # key_path starts with the slot in (args, kwargs) and the argument's own position or name.
    return Named(leaf, jax.tree_util.keystr(key_path[2:], simple=True, separator="/"))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_arraylike(x: Any) -> bool:
    return _is_array(x) or isinstance(x, int | float | complex | bool)
