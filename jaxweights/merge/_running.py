"""Averages kept while models go by: in a training loop, or over checkpoints on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, fail, flatten, unflatten
from jaxweights.merge._models import compute_dtype


class RunningState(NamedTuple):
    """State of a running average; a pytree of arrays, which Orbax saves like any other."""

    average: Flat
    """Average so far of every floating leaf by path, float32 (float64 for float64 leaves)."""
    seen: jax.Array
    """Weight, or number of models, so far; float32 scalar."""


class Running(NamedTuple):
    """A running average: three pure functions, which run under `jit` and on sharded trees."""

    init: Callable[[Params], RunningState]
    """`init(params)`: the state before the first update, of which `params` gives the shapes."""
    update: Callable[..., RunningState]
    """`update(state, params)`: takes one more model in."""
    value: Callable[[RunningState, Params], Params]
    """`value(state, like)`: the average, in the dtypes of `like`, which gives all other leaves."""


def running_mean() -> Running:
    r"""Averages models one after another, in the memory of two.

    :math:`m \leftarrow m + (w / W)(\theta - m)` with W the sum of all weights so far; equal models
    stay exact, however many there are.

    Returns:
      The average; its `update(state, params, weight=1.0)` takes a positive weight.

    Example:
      >>> import jax.numpy as jnp
      >>> mean = running_mean()
      >>> state = mean.init({"bias": jnp.zeros(1)})
      >>> for x in (1.0, 2.0, 6.0):
      ...     state = mean.update(state, {"bias": jnp.array([x])})
      >>> mean.value(state, {"bias": jnp.zeros(1)})["bias"]
      Array([3.], dtype=float32)
    """

    def update(
        state: RunningState, params: Params, weight: float | jax.Array = 1.0
    ) -> RunningState:
        weight = jnp.asarray(weight, jnp.float32)
        seen = state.seen + weight
        rate = lambda dtype: weight.astype(dtype) / seen.astype(dtype)  # noqa: E731
        return RunningState(_moved(state, params, rate), seen)

    return Running(lambda params: _start(params, zero=True), update, _value)


def running_ema(*, decay: float, debias: bool = True) -> Running:
    r"""Averages the models of a run, the latest most, as training goes by.

    :math:`e_t = d\, e_{t-1} + (1 - d)\, \theta_t`. Debiased, :math:`e_t / (1 - d^t)` is kept, by
    :math:`m \leftarrow m + \frac{1 - d}{1 - d^t}(\theta_t - m)`, which leaves a constant exact.

    Args:
      decay: d, in [0, 1), 0.999 for example.
      debias: Whether :math:`e_0 = 0`; otherwise it is what `init` was given.

    Returns:
      The average. Call `update(state, params)` after every optimizer step.

    Raises:
      ValueError: If `decay` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> ema = running_ema(decay=0.5, debias=False)
      >>> state = ema.update(ema.init({"bias": jnp.zeros(1)}), {"bias": jnp.array([4.0])})
      >>> ema.value(state, {"bias": jnp.zeros(1)})["bias"]
      Array([2.], dtype=float32)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"merge.running_ema: decay={decay} must lie in [0, 1).")
    log_decay = math.log(decay) if decay else -math.inf

    def update(state: RunningState, params: Params) -> RunningState:
        seen = state.seen + 1

        def rate(dtype: Any) -> jax.Array:
            # expm1, because 1 - d^t of a d near 1 has few digits; the first rate is exactly 1.
            log = jnp.asarray(log_decay, dtype)
            return jnp.expm1(log) / (jnp.expm1(seen.astype(dtype) * log) if debias else -1)

        return RunningState(_moved(state, params, rate), seen)

    return Running(lambda params: _start(params, zero=debias), update, _value)


def average(models: Iterable[Params], *, running: Running | None = None) -> Params:
    """Averages models that are loaded one after another, never holding more than two.

    Args:
      models: The models, such as a generator that loads checkpoints.
      running: How; None takes `running_mean`.

    Returns:
      The average, in the dtypes of the first model, which gives all leaves that are not floating.

    Raises:
      ValueError: If there is no model, or one does not fit the first.

    Example:
      >>> import jax.numpy as jnp
      >>> average({"bias": jnp.array([x])} for x in (1.0, 2.0, 6.0))["bias"]
      Array([3.], dtype=float32)
    """
    running = running or running_mean()
    state, first = None, None
    for i, model in enumerate(models):
        if state is None:
            first, state = model, running.init(model)
        check_like("merge.average", f"model {i}", model, first)
        state = running.update(state, model)
    if state is None or first is None:
        raise ValueError("merge.average: there is no model. Pass at least one.")
    return running.value(state, first)


def check_like(name: str, which: str, model: Params, first: Params) -> None:
    """Refuses a model whose floating leaves are not those of the first."""
    ours, theirs = ({p: x for p, x in flatten(t)[0].items() if is_float(x)} for t in (first, model))
    lacking, unknown = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    problems = [f"{which} lacks {sorted(lacking)[:5]}, which the first has."] if lacking else []
    problems += [f"{which} has {sorted(unknown)[:5]}, which the first lacks."] if unknown else []
    problems += [
        f"{path!r}: is {np.shape(theirs[path])} in {which} but {np.shape(leaf)} in the first. All "
        "models must share shapes."
        for path, leaf in ours.items()
        if path in theirs and np.shape(theirs[path]) != np.shape(leaf)
    ]
    fail(name, problems)


def _start(params: Params, *, zero: bool) -> RunningState:
    floats = {path: leaf for path, leaf in flatten(params)[0].items() if is_float(leaf)}
    start = jnp.zeros_like if zero else (lambda x, dtype: jnp.array(x, dtype))
    average = {path: start(leaf, dtype=compute_dtype(leaf)) for path, leaf in floats.items()}
    return RunningState(average, jnp.zeros((), jnp.float32))


def _moved(state: RunningState, params: Params, rate: Callable[[Any], jax.Array]) -> Flat:
    flat = flatten(params)[0]
    lacking = [path for path in state.average if path not in flat]
    if lacking:
        raise ValueError(
            f"merge.running: the model lacks {lacking[:5]}, which the average has. Pass models of "
            "one structure."
        )
    return {
        path: old + rate(old.dtype) * (flat[path].astype(old.dtype) - old)
        for path, old in state.average.items()
    }


def _value(state: RunningState, like: Params) -> Params:
    flat, structure = flatten(like)
    cast = {path: x.astype(flat[path].dtype) for path, x in state.average.items()}
    return unflatten(structure, flat | cast)
