"""GPTQ of one matrix: seconds, compile seconds and loss, beside a torch version and rounding.

Run: python benchmarks/bench_gptq.py [--inputs 2048] [--outputs 2048] [--stack 1] [--repeats 5]

The torch version is Algorithm 1 of the paper as its authors run it: two Cholesky factorizations and
an inverse, blocks of 128 columns, one column at a time inside. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.quantize import Codes, Grid, decode, gptq_matrix, quantize_matrix

BITS, GROUP, DAMPING = 4, 128, 0.01


def problem(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Gram matrix of inputs that share a quarter of their variance."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(16, inputs)).astype(np.float32)
    x = rng.normal(size=(2 * inputs, inputs)).astype(np.float32)
    x += 0.15 * rng.normal(size=(2 * inputs, 16)).astype(np.float32) @ factors
    return rng.normal(size=(inputs, outputs)).astype(np.float32), x.T @ x


def torch_gptq(
    weight: np.ndarray, gram: np.ndarray, device: str = "cpu"
) -> Callable[[], np.ndarray] | None:
    """Dequantized `(in, out)`, groups of 128 with moving scales on the affine grid."""
    try:
        import torch
    except ImportError:
        return None
    original = torch.from_numpy(weight.T.copy()).to(device)
    hessian = torch.from_numpy(gram.copy()).to(device)
    top = 2**BITS - 1

    def run() -> np.ndarray:
        rows = original.clone()
        result = torch.zeros_like(rows)
        eye = torch.eye(len(hessian), device=device)
        damped = hessian + DAMPING * torch.mean(torch.diag(hessian)) * eye
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, rows.shape[1], 128):
            end = min(start + 128, rows.shape[1])
            block, inner = rows[:, start:end].clone(), factor[start:end, start:end]
            errors = torch.zeros_like(block)
            for i in range(end - start):
                if (start + i) % GROUP == 0:
                    group = rows[:, start + i : start + i + GROUP]
                    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                    scale = (high - low) / top
                    zero = torch.round(-low / scale)
                column = block[:, i]
                codes = torch.clamp(torch.round(column / scale) + zero, 0, top)
                rounded = scale * (codes - zero)
                error = (column - rounded) / inner[i, i]
                block[:, i:] -= error[:, None] @ inner[i, i:][None]
                errors[:, i] = error
                result[:, start + i] = rounded
            rows[:, end:] -= errors @ factor[start:end, end:]
        return result.cpu().numpy().T

    return run


def dense(codes: Codes) -> np.ndarray:
    spread = lambda x: jnp.repeat(x, GROUP, axis=0)  # noqa: E731
    return np.asarray(decode(codes.codes, spread(codes.scale), spread(codes.zero_point)))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--stack", type=int, default=1, help="matrices, one after another")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    weight, gram = problem(options.inputs, options.outputs)
    arrays = jnp.asarray(weight), jnp.asarray(gram)
    if options.stack > 1:
        arrays = jax.tree.map(lambda x: jnp.stack([x] * options.stack), arrays)

    def compiled(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        program = jax.jit(fn).lower(*args).compile()
        return program, time.perf_counter() - start

    settings = {"bits": BITS, "group_size": GROUP, "damping": DAMPING}
    one, nearest = (
        functools.partial(gptq_matrix, **settings),
        functools.partial(quantize_matrix, grid=Grid("affine", BITS, GROUP)),
    )
    if options.stack > 1:
        each, all_at_once = one, nearest
        one = lambda *stack: jax.lax.map(lambda a: each(*a), stack)  # noqa: E731
        nearest = jax.vmap(all_at_once)
    ours, ours_compile = compiled(one, *arrays)
    plain, plain_compile = compiled(nearest, arrays[0])
    theirs = torch_gptq(weight, gram)
    if theirs is not None and options.stack > 1:
        single = theirs
        theirs = lambda: max((single() for _ in range(options.stack)), key=len)  # noqa: E731
    first = lambda codes: dense(  # noqa: E731
        jax.tree.map(lambda x: x[0], codes) if options.stack > 1 else codes
    )
    cases = {
        "jaxweights gptq": (lambda: ours(*arrays).codes, first, ours_compile),
        "torch, the authors' way": (theirs, np.asarray, 0.0),
        "rounding to nearest": (lambda: plain(arrays[0]), first, plain_compile),
    }
    best: dict[str, float] = {}
    losses: dict[str, float] = {}
    for repeat in range(options.repeats + 1):
        for name, (run, to_dense, _) in cases.items():
            if run is None:
                continue
            start = time.perf_counter()
            result = jax.block_until_ready(run())
            seconds = time.perf_counter() - start
            if repeat:  # the first warms up
                best[name] = min(best.get(name, seconds), seconds)
            else:
                change = weight - to_dense(result)
                losses[name] = float(
                    np.sum(change * (gram @ change)) / np.sum(weight * (gram @ weight))
                )
            time.sleep(0.2)  # threads of matrix libraries spin on after a call
    print(
        f"{options.stack} x {options.inputs} x {options.outputs}, {BITS} bits, groups of {GROUP}, "
        f"{jax.devices()[0]}"
    )
    print(f"{'':<26} {'s':>8} {'compile s':>10} {'relative loss':>14}")
    for name, seconds in best.items():
        print(f"{name:<26} {seconds:>8.3f} {cases[name][2]:>10.2f} {losses[name]:>14.5f}")


if __name__ == "__main__":
    main()
