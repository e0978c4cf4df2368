"""LoRA's training step beside the full gradient, and a lifted dense model beside the plain one.

Eight scanned layers of 1024 x 1024 and 512 tokens, float32, as in the usual comparison on a CPU.
Every variant is run once a round, in turn, so that a disturbance meets all of them.

Run: python benchmarks/bench_lora.py [rounds]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights import adapt, core
from jaxweights.lift import lift
from jaxweights.weights import Axes, materialize

LAYERS, WIDTH, TOKENS, RANK = 8, 1024, 512, 16
REST = 0.3  # seconds between runs: BLAS threads spin on after a product


def model(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """A scanned stack of layers."""
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]


def by_hand(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The same stack with the factors written into the model."""

    def layer(h: jax.Array, w: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        kernel, down, up = w
        return jnp.tanh(h @ kernel + (h @ down) @ up), None

    return jax.lax.scan(layer, x, (params["layers"], params["down"], params["up"]))[0]


def variants() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions to compile, with their arguments."""
    x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
    dense = {"layers": jax.random.normal(jax.random.key(1), (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5}
    adapted = core.apply(adapt.lora(rank=RANK), dense, layout={"layers": Axes()})
    trainable, frozen = core.split(adapted, adapt.factors)
    factors = {name: trainable[f"layers/{name}"] for name in ("down", "up")}

    def loss(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda params, x: jnp.sum(fn(params, x) ** 2)

    def lora(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.grad(lambda t, f, x: loss(fn)(core.combine(t, f), x))

    return {
        "forward, plain": (model, (dense, x)),
        "forward, lifted dense": (lift(model), (dense, x)),
        "gradient of all weights, plain": (jax.grad(loss(model)), (dense, x)),
        "gradient of all weights, lifted": (jax.grad(loss(lift(model))), (dense, x)),
        "gradient of LoRA factors, lifted": (lora(lift(model)), (trainable, frozen, x)),
        "gradient of LoRA factors, by hand": (
            jax.grad(lambda t, p, x: loss(by_hand)(p | t, x)),
            (factors, dense, x),
        ),
        "gradient of LoRA factors, materialised": (
            lora(lambda params, x: model(materialize(params), x)),
            (trainable, frozen, x),
        ),
    }


def main() -> None:
    """Prints the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    programs = {
        name: (jax.jit(fn).lower(*args).compile(), args) for name, (fn, args) in variants().items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds + 1):
        for name, (program, args) in programs.items():
            time.sleep(REST)
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{'':40} {'median s':>9} {'fastest s':>10} {'temporaries MB':>15}")
    for name, (program, _) in programs.items():
        memory = program.memory_analysis()
        megabytes = memory.temp_size_in_bytes / 1e6 if memory is not None else float("nan")
        print(f"{name:40} {medians[name]:>9.3f} {min(seconds[name]):>10.3f} {megabytes:>15.1f}")
    plain, lifted = medians["forward, plain"], medians["forward, lifted dense"]
    full = medians["gradient of all weights, plain"]
    lora = medians["gradient of LoRA factors, lifted"]
    print(f"lifted dense / plain, forward: {lifted / plain:.2f}")
    print(f"full gradient / LoRA step:     {full / lora:.2f}")


if __name__ == "__main__":
    main()
