"""every and between: at which steps of a training loop a transform acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core._context import Context
from jaxweights.core._paths import Params, fail, flatten
from jaxweights.core._transform import State, Transform
from jaxweights.weights._weight import is_weight

_ARRAYS = (jax.Array, np.ndarray, np.generic)


class ScheduleState(NamedTuple):
    """State of `every` and `between`."""

    count: jax.Array
    """Updates so far, int32 scalar."""
    inner: State
    """State of the transform."""


def every(k: int, tx: Transform) -> Transform:
    """Applies a transform at steps 0, k, 2k, ... and leaves the tree as it is at the others.

    The step is `context.step` where the caller gives it, and else the number of earlier updates,
    which the state counts; what is inside sees it as `context.step`, so that nested schedules
    and ramps go by one clock. Works eagerly and, through `lax.cond`, under `jit`.

    What a transform has set holds at its own steps only: in `to_optax`, the optimizer moves pruned
    entries away from zero until the next one. Leave `every` out for a mask that always holds.

    Args:
      k: Steps from one application to the next, at least 1.
      tx: A transform that keeps shapes, dtypes and representations; see `materialized`.

    Returns:
      The transform.

    Raises:
      ValueError: If `k` is less than 1; at an update, if `tx` changes what a leaf is.

    Example:
      >>> from jaxweights.core import Context, stateless
      >>> halve = stateless(lambda p, _: {"w": p["w"] / 2}, name="halve")
      >>> tx = every(2, halve)
      >>> params = {"w": jnp.array(8.0)}
      >>> state = tx.init(params)
      >>> for _ in range(4):  # acts at steps 0 and 2
      ...     params, state = tx.update(params, state, Context())
      >>> float(params["w"])
      2.0
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"core.every: k={k!r} must be a whole number of steps, at least 1.")
    return _scheduled("every", tx, lambda step: step % k == 0)


def between(first: int, last: int, tx: Transform) -> Transform:
    """Applies a transform at the steps from `first` to `last`, both included.

    `between(first, last, every(k, tx))` acts at the multiples of `k` in that range.

    Args:
      first: First step at which it acts; the first step of all is 0.
      last: Last step at which it acts.
      tx: As in `every`.

    Returns:
      The transform.

    Raises:
      ValueError: If `first` is negative or `last` is before it; at an update, as in `every`.

    Example:
      >>> from jaxweights.core import Context, stateless
      >>> halve = stateless(lambda p, _: {"w": p["w"] / 2}, name="halve")
      >>> tx = between(1, 2, halve)
      >>> params = {"w": jnp.array(8.0)}
      >>> state = tx.init(params)
      >>> for _ in range(9):
      ...     params, state = tx.update(params, state, Context())
      >>> float(params["w"])
      2.0
    """
    if not 0 <= first <= last:
        raise ValueError(
            f"core.between: first={first} and last={last} must satisfy 0 <= first <= last."
        )
    return _scheduled("between", tx, lambda step: (step >= first) & (step <= last))


def _scheduled(name: str, tx: Transform, is_due: Callable[[jax.Array], Any]) -> Transform:
    if not isinstance(tx, Transform):
        raise TypeError(f"core.{name}: {tx!r} is a {type(tx).__name__}, not a transform.")

    def init(params: Params) -> ScheduleState:
        return ScheduleState(jnp.zeros([], jnp.int32), tx.init(params))

    def update(
        params: Params, state: ScheduleState, context: Context
    ) -> tuple[Params, ScheduleState]:
        step = state.count if context.step is None else context.step
        context = dataclasses.replace(context, step=step)
        act = lambda params, inner: tx.update(params, inner, context)  # noqa: E731
        due = is_due(jnp.asarray(step))
        attempt = _Attempt(act, params, state.inner, f"core.{name}", tx.name)
        if isinstance(due, Tracer):
            params, inner = attempt.when(due)
        elif due:
            params, inner = attempt.now()
        else:
            inner = state.inner
            if not isinstance(state.count, Tracer) and state.count == 0:
                attempt.check()  # an error belongs to the first step, not to the thousandth
        return params, ScheduleState(state.count + 1, inner)

    return dataclasses.replace(tx, init=init, update=update, name=f"{name}({tx.name})")


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One update that may or may not be made, and must not change what a leaf is."""

    act: Callable[[Params, State], tuple[Params, State]]
    params: Params
    inner: State
    asker: str
    name: str

    def now(self) -> tuple[Params, State]:
        """Makes the update."""
        before = self.params, self.inner
        after = self.act(*before)
        refuse_changes(self.asker, self.name, before, after)
        return after

    def check(self) -> None:
        """Refuses it by shapes alone."""
        jax.eval_shape(self._taken, self._arrays())

    def when(self, due: jax.Array) -> tuple[Params, State]:
        """Makes it if `due`, which is traced."""
        # Our own refusal comes before `cond` compares the branches, as it is raised inside of one.
        return self._fill(jax.lax.cond(due, self._taken, lambda arrays: arrays, self._arrays()))

    def _arrays(self) -> list[jax.Array]:
        # Leaves that are no arrays cannot pass through a branch; they stay outside.
        leaves = jax.tree.leaves((self.params, self.inner))
        return [jnp.asarray(leaf) for leaf in leaves if isinstance(leaf, _ARRAYS)]

    def _fill(self, arrays: list[jax.Array]) -> tuple[Params, State]:
        left = iter(arrays)
        fill = lambda leaf: next(left) if isinstance(leaf, _ARRAYS) else leaf  # noqa: E731
        return jax.tree.map(fill, (self.params, self.inner))

    def _taken(self, arrays: list[jax.Array]) -> list[jax.Array]:
        params, inner = self._fill(arrays)
        attempt = dataclasses.replace(self, params=params, inner=inner)
        leaves = jax.tree.leaves(attempt.now())
        return [jnp.asarray(leaf) for leaf in leaves if isinstance(leaf, _ARRAYS)]


def refuse_changes(asker: str, name: str, before: Any, after: Any) -> None:
    """Raises where a pair (params, state) is of another type after an update than before."""
    old, new = flatten(before[0])[0], flatten(after[0])[0]
    problems = [
        f"{path!r}: {name} turns {_kind(old.get(path))} into {_kind(new.get(path))}. A transform "
        f"that runs at some steps only must keep what a leaf is. Use materialized({name}) to keep "
        "the values alone, or apply it once outside of the loop."
        for path in {**old, **new}
        if _type(old.get(path)) != _type(new.get(path))
    ]
    if not problems and _type(before) != _type(after):
        problems = [
            f"{name}: its state changes from {_type(before[1])} to {_type(after[1])}. Shapes and "
            "structure must stay the same from step to step."
        ]
    fail(asker, problems)


def _type(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    kinds = [(x.shape, x.dtype) if hasattr(x, "dtype") else type(x) for x in leaves]
    return treedef, tuple(kinds)


def _kind(leaf: Any) -> str:
    if leaf is None:
        return "nothing"
    if is_weight(leaf):
        return f"a {type(leaf).__name__} {tuple(leaf.shape)} {leaf.dtype}"
    if hasattr(leaf, "dtype"):
        return f"an array {tuple(leaf.shape)} {leaf.dtype}"
    return f"a {type(leaf).__name__}"
