"""How the networks of `qat.py` train: data, methods, one compiled loop and the score."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import images
import jax
import jax.numpy as jnp
import optax

import jaxweights as jw

Q = jw.quantize
START = time.perf_counter()
BATCH = 64
Logits = Callable[[Any, jax.Array], jax.Array]
Params = Any


class Split(NamedTuple):
    """Images `(n, 784)` in [-1, 1] and labels `(n,)`."""

    x: jax.Array
    y: jax.Array


@functools.cache
def digits() -> tuple[Split, Split, Split]:
    """For training, to choose by, and for the test."""
    x, y = images.digits()
    bounds = (0, 7500, 8000, len(y))
    return tuple(
        Split(jnp.asarray(x[a:b]), jnp.asarray(y[a:b], jnp.int32))
        for a, b in itertools.pairwise(bounds)
    )  # type: ignore[return-value]


def loss_of(params: Params, logits: Logits, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


class Method(NamedTuple):
    """How one row trains, and what it keeps."""

    start: Callable[[Params], Params]  # from float parameters to what is trained
    logits: Logits  # of what is trained
    stored: Callable[[Params], Params]  # what is kept
    around: Callable[[Any], Any] = lambda optimizer: chain(optimizer, scale_by_speed())


@functools.cache
def training(method: Method, steps: int, watch: Callable[[Any], Any] = lambda state: ()) -> Any:
    """Compiles `(params, key, rate, data) -> (params, optimizer's state, what was watched)`.

    AdamW with a cosine from `rate` to 0; `watch` sees the optimizer's state after every step.
    """
    adam = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4))
    optimizer = method.around(adam)

    @jax.jit
    def run(params: Params, key: jax.Array, rate: jax.Array, data: Split) -> Any:
        def step(carry: Any, at: Any) -> tuple[Any, Any]:
            (params, state), (key, i) = carry, at
            rows = jax.random.randint(key, (BATCH,), 0, len(data.y))
            grads = jax.grad(loss_of)(params, method.logits, data.x[rows], data.y[rows])
            speed = -rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
            updates, state = optimizer.update(grads, state, params, speed=speed)
            return (optax.apply_updates(params, updates), state), watch(state)

        start = (params, optimizer.init(params))
        (params, state), seen = jax.lax.scan(
            step, start, (jax.random.split(key, steps), jnp.arange(steps))
        )
        return params, state, seen

    return run


def scale_by_speed() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the extra argument `speed`."""

    def update(updates: Any, state: Any, params: Any = None, *, speed: Any, **_: Any) -> Any:
        del params
        return jax.tree.map(lambda u: speed * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def chain(*parts: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(*(optax.with_extra_args_support(part) for part in parts))


@functools.cache
def scoring(method: Method, logits: Logits) -> Callable[[Params, Split], jax.Array]:
    """Compiles the share of labels that what is kept gets right."""
    lifted = jw.lift(logits)

    @jax.jit
    def score(params: Params, data: Split) -> jax.Array:
        found = jnp.argmax(lifted(method.stored(params), data.x), axis=-1)
        return jnp.mean(found == data.y)

    return score


def straight(tx: jw.Transform, logits: Logits, layout: Any = None) -> Method:
    """Any transform, straight-through."""
    lifted = jw.lift(logits)
    return Method(
        start=lambda params: params,
        logits=lambda params, x: lifted(Q.fake_quant(params, tx, layout=layout), x),
        stored=lambda params: jw.apply(tx, params, layout=layout),
    )


def learned(bits: int, logits: Logits, layout: Any = None) -> Method:
    """Steps that are trained, one for each output."""
    tx = Q.lsq(bits=bits, group_size=None)
    return Method(
        start=lambda params: jw.apply(tx, params, layout=layout),
        logits=jw.lift(logits),
        stored=Q.settle,
    )


def annealed(method: Method, quantizer: Any, layout: Any = None, *then: Any) -> Method:
    """Freezes all but the weights near thresholds, before and after the optimizer."""
    freeze = Q.confidence_annealing(quantizer, boundary=0.005, layout=layout)
    return method._replace(around=lambda o: chain(freeze, o, scale_by_speed(), freeze, *then))
