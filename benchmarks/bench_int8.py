"""Products with a matrix in 32-bit floats, in 8 bits, and in 8 bits with rounded activations.

    python benchmarks/bench_int8.py  # a minute on two cores
    python benchmarks/bench_int8.py --size 2048 --tokens 1 64

Rows of one table take turns, and the least of several rounds counts. `error` is the relative error
of the result in norm, for normal weights and activations. Where torch is installed, its float
product and its dynamic int8 linear layer run in the same rounds, with as many threads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxweights as jw

ROUNDS = 10


def candidates(weight: jax.Array, x: jax.Array) -> dict[str, Callable[[], Any]]:
    """Functions that run one product and wait for it, by name."""
    model = lambda params, x: x @ params["w"]  # noqa: E731
    step = jnp.max(jnp.abs(x)).reshape(1, 1) / 127
    int8 = jw.apply(jw.quantize.round_to_nearest(bits=8), {"w": weight})
    dynamic = jw.apply(jw.quantize.int8_dynamic(), {"w": weight})
    static = {"w": jw.weights.QuantizedProduct.of(int8["w"], step)}
    floats = jw.apply(jw.quantize.fp8_dynamic(), {"w": weight})
    run = jax.jit(jw.lift(model))
    found: dict[str, Callable[[], Any]] = {
        "float32": lambda: jax.block_until_ready(run({"w": weight}, x)),
        "int8 weights only": lambda: jax.block_until_ready(run(int8, x)),
        "int8_dynamic": lambda: jax.block_until_ready(run(dynamic, x)),
        "int8_static": lambda: jax.block_until_ready(run(static, x)),
        "fp8_dynamic": lambda: jax.block_until_ready(run(floats, x)),
    }
    return found | torch_candidates(np.asarray(weight), np.asarray(x))


def torch_candidates(weight: np.ndarray, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same of torch; nothing where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    import warnings

    linear = torch.nn.Linear(*weight.shape, bias=False)
    linear.weight.data = torch.tensor(np.ascontiguousarray(weight.T))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its successor
        int8 = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(linear),
            {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig},
        )
    tokens = torch.tensor(x)

    def run(module: Any) -> Any:
        with torch.inference_mode():
            return module(tokens)

    return {"torch float32": lambda: run(linear), "torch dynamic int8": lambda: run(int8)}


def measure(size: int, tokens: int) -> list[tuple[str, float, float]]:
    """Name, milliseconds and relative error of each candidate."""
    keys = jax.random.split(jax.random.key(tokens))
    weight = jax.random.normal(keys[0], (size, size))
    x = jax.random.normal(keys[1], (tokens, size))
    runs = candidates(weight, x)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    norm = np.linalg.norm(exact)
    errors = {name: np.linalg.norm(np.asarray(run()) - exact) / norm for name, run in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return [(name, 1e3 * best[name], errors[name]) for name in runs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256])
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    load = os.getloadavg()[0]
    print(
        f"{options.size} x {options.size} on {os.cpu_count()} cores ({device}), load {load:.1f}\n"
    )
    print(f"{'tokens':>6}  {'product':<20} {'ms':>8}  {'error':>8}")
    for tokens in options.tokens:
        for name, milliseconds, error in measure(options.size, tokens):
            print(f"{tokens:>6}  {name:<20} {milliseconds:>8.2f}  {error:>8.1e}", flush=True)
        print()


if __name__ == "__main__":
    main()
