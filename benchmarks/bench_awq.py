"""AWQ's scale search on one matrix: seconds, compile seconds and choice, beside a torch version.

Run: python benchmarks/bench_awq.py [--inputs 2048] [--outputs 2048] [--tokens 16384] [--repeats 3]

The torch version is the authors' procedure: for each of 20 ratios it rescales and rounds the
weight, runs the layer on all tokens and compares the outputs. Ours judges the same candidates from
the Gram matrix, whose own product is timed apart: calibration gathers it once for every method. The
authors calibrate on 128 samples of 512 tokens, 65,536 in all. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.quantize import Grid
from jaxweights.quantize._awq_search import candidate_scales, search_limits, search_scale

BITS, GROUP, STEPS = 4, 128, 20


def problem(inputs: int, outputs: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and tokens of which one feature in 64 is large."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, inputs)).astype(np.float32)
    x[:, ::64] *= 20
    return rng.normal(size=(inputs, outputs)).astype(np.float32) / inputs**0.5, x


def torch_search(weight: np.ndarray, x: np.ndarray) -> Callable[[], np.ndarray] | None:
    """The authors' `auto_scale` of one linear layer; returns the scale."""
    try:
        import torch
    except ImportError:
        return None
    linear, tokens = torch.from_numpy(weight.T.copy()), torch.from_numpy(x)
    top = 2**BITS - 1

    def rounded(w: Any) -> Any:
        groups = w.reshape(-1, GROUP)
        high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / top
        zero = (-torch.round(low / scale)).clamp_(0, top)
        codes = torch.clamp(torch.round(groups / scale) + zero, 0, top)
        return ((codes - zero) * scale).reshape(w.shape)

    def run() -> np.ndarray:
        with torch.no_grad():
            mean = tokens.abs().mean(0)
            original = tokens @ linear.T
            best, chosen = float("inf"), mean
            for step in range(STEPS):
                scale = mean.pow(step / STEPS).clamp(min=1e-4)
                scale = scale / (scale.max() * scale.min()).sqrt()
                new = rounded(linear * scale) / scale
                loss = (original - tokens @ new.T).float().pow(2).mean().item()
                if loss < best:
                    best, chosen = loss, scale
            return chosen.numpy()

    return run


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    weight, x = problem(options.inputs, options.outputs, options.tokens)
    grid = Grid("affine", BITS, GROUP)
    arrays = jnp.asarray(weight), jnp.asarray(x)
    mean = jnp.abs(arrays[1]).mean(0)

    def compiled(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        program = jax.jit(fn).lower(*args).compile()
        return program, time.perf_counter() - start

    gram_of, gram_compile = compiled(lambda x: jnp.matmul(x.T, x, precision="highest"), arrays[1])
    gram = gram_of(arrays[1])
    search, search_compile = compiled(
        lambda w, gram, mean: search_scale([w], gram, mean, grid).scale, arrays[0], gram, mean
    )
    limits, limits_compile = compiled(lambda w, gram: search_limits(w, gram, grid), arrays[0], gram)
    cases = {
        "jaxweights scale search": (lambda: search(arrays[0], gram, mean), search_compile),
        "torch, the authors' way": (torch_search(weight, x), 0.0),
        "Gram matrix of the tokens": (lambda: gram_of(arrays[1]), gram_compile),
        "jaxweights clip search": (lambda: limits(arrays[0], gram), limits_compile),
    }
    best: dict[str, float] = {}
    scales: dict[str, np.ndarray] = {}
    for repeat in range(options.repeats + 1):
        for name, (run, _) in cases.items():
            if run is None or (name.startswith("torch") and repeat == options.repeats):
                continue
            start = time.perf_counter()
            result = jax.block_until_ready(run())
            seconds = time.perf_counter() - start
            if repeat or name.startswith("torch"):  # the first run of ours warms up
                best[name] = min(best.get(name, seconds), seconds)
            scales[name] = np.asarray(result)
            time.sleep(0.2)  # threads of matrix libraries spin on after a call
    candidates = np.asarray(candidate_scales(mean, None))
    print(
        f"{options.inputs} x {options.outputs}, {options.tokens} tokens, {BITS} bits, groups of "
        f"{GROUP}, {jax.devices()[0]}"
    )
    print(f"{'':<28} {'s':>8} {'compile s':>10} {'ratio chosen':>13}")
    for name, seconds in best.items():
        chosen = ""
        if scales[name].shape == candidates[0].shape:
            off = np.abs(candidates / scales[name] - 1).max(axis=1)
            chosen = f"{off.argmin() / STEPS:.2f}"
        print(f"{name:<28} {seconds:>8.3f} {cases[name][1]:>10.2f} {chosen:>13}")


if __name__ == "__main__":
    main()
