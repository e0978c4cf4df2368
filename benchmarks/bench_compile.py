"""Compile time and program size of a chain and of a lifted model, 4 layers beside 64.

Run: python benchmarks/bench_compile.py
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

import jaxweights as jw

WIDTH = 256


def make(layers: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    shape = (layers, WIDTH, WIDTH)
    return {"up": jax.random.normal(keys[0], shape), "down": jax.random.normal(keys[1], shape)}


def model(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    def layer(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"] / WIDTH, None

    return jax.lax.scan(layer, x, params)[0]


def compiled(fn, *args) -> tuple[float, int]:
    """Seconds to trace, lower and compile, and lines of the compiled program."""
    jax.clear_caches()
    start = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    return time.perf_counter() - start, program.as_text().count("\n")


def main() -> None:
    """Prints the table."""
    tx = jw.chain(
        jw.sparsify.wanda(sparsity=0.5),
        jw.quantize.gptq(bits=4, group_size=128),
        jw.adapt.lora(rank=8),
    )
    rows = {}
    for layers in (4, 64):
        params = make(layers)
        x = jax.random.normal(jax.random.key(1), (8, WIDTH))
        stats = jw.calibrate(model, params, [x], needs=tx.needs(params))
        small = jw.apply(tx, params, stats=stats)
        run = lambda p, s: jw.apply(tx, p, stats=s)  # noqa: E731
        chain = min(compiled(run, params, stats) for _ in range(3))
        lifted = min(compiled(jw.lift(model), small, x) for _ in range(3))
        rows[layers] = (*chain, *lifted)
    print(f"{'layers':>8} {'chain s':>9} {'lines':>7} {'lifted model s':>15} {'lines':>7}")
    for layers, row in rows.items():
        print(f"{layers:>8} {row[0]:>9.2f} {row[1]:>7} {row[2]:>15.2f} {row[3]:>7}")
    ratios = [b / a for a, b in zip(rows[4], rows[64], strict=True)]
    print(f"{'64 / 4':>8} {ratios[0]:>9.2f} {ratios[1]:>7.2f} {ratios[2]:>15.2f} {ratios[3]:>7.2f}")


if __name__ == "__main__":
    main()
