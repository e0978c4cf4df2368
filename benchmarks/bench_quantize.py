"""Rounding to nearest: Gparam/s beside the plain ways to write it, and a copy of the bytes.

Run: python benchmarks/bench_quantize.py [--rows 4096] [--columns 4096] [--repeats 15]

Every row quantizes the same float32 matrix in groups of 128 inputs. Rows of other libraries appear
where they are installed. Repeats are interleaved, the best is reported; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core import apply
from jaxweights.quantize import round_to_nearest

GROUP = 128


def ours(bits: int, grid: str | None) -> Callable[[jax.Array], Any]:
    tx = round_to_nearest(bits=bits, group_size=GROUP, grid=grid)
    return lambda weight: apply(tx, {"kernel": weight})["kernel"]


@jax.jit
def plain_jax(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As one writes it first: int4 in uint8, the grid from 7 times the scale to -8 times it."""
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    scale = jnp.max(jnp.abs(groups), axis=1, keepdims=True) / 7
    codes = jnp.clip(jnp.round(groups / scale), -8, 7).astype(jnp.int8).reshape(weight.shape)
    packed = (codes[::2] & 15) | (codes[1::2] << 4)
    return packed.astype(jnp.uint8), scale[:, 0]


def numpy_baseline(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    scale = np.abs(groups).max(1, keepdims=True) / np.float32(7)
    codes = np.clip(np.round(groups / scale), -8, 7).astype(np.int8).reshape(weight.shape)
    return ((codes[::2] & 15) | (codes[1::2] << 4)).astype(np.uint8), scale[:, 0]


def torch_baseline(weight: np.ndarray) -> Callable[[], Any] | None:
    try:
        import torch
    except ImportError:
        return None
    tensor = torch.from_numpy(weight.T.copy())  # (out, in), as torch holds it

    def run() -> Any:
        groups = tensor.reshape(tensor.shape[0], -1, GROUP)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = torch.clamp(torch.round(groups / scale), -8, 7).to(torch.int8).reshape(tensor.shape)
        return ((codes[:, ::2] & 15) | (codes[:, 1::2] << 4)).to(torch.uint8), scale

    return run


def qwix_baseline(weight: jax.Array) -> Callable[[], Any] | None:
    try:
        from qwix._src.core import qarray
    except ImportError:
        return None
    how = qarray.HowToQuantize(
        qtype="int4",
        channelwise_axes=[1],
        tiled_axes={0: GROUP},
        calibration_method="absmax",
    )
    run = jax.jit(lambda x: qarray.quantize(x, how))
    return lambda: run(weight)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    weight = jax.random.normal(jax.random.key(0), (options.rows, options.columns))
    host = np.asarray(weight)
    cases: dict[str, Callable[[], Any] | None] = {
        "jaxweights int4 signed_max": lambda run=ours(4, None): run(weight),
        "jaxweights int4 affine": lambda run=ours(4, "affine"): run(weight),
        "jaxweights int3 signed_max": lambda run=ours(3, None): run(weight),
        "jaxweights int8 narrow": lambda run=ours(8, None): run(weight),
        "plain jax, int4, jit": lambda: plain_jax(weight),
        "numpy, int4": lambda: numpy_baseline(host),
        "torch eager, int4": torch_baseline(host),
        "qwix int4, jit": qwix_baseline(weight),
        "numpy copy of the bytes": host.copy,
    }
    best: dict[str, float] = {}
    for repeat in range(options.repeats + 1):
        for name, run in cases.items():
            if run is None:
                continue
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds = time.perf_counter() - start
            if repeat:  # the first compiles
                best[name] = min(best.get(name, seconds), seconds)
            time.sleep(0.02)  # threads of matrix libraries spin on after a call
    print(f"{options.rows} x {options.columns} float32, groups of {GROUP}, {jax.devices()[0]}")
    print(f"{'':<28} {'ms':>8} {'Gparam/s':>9}")
    for name, seconds in best.items():
        print(f"{name:<28} {1e3 * seconds:>8.1f} {weight.size / seconds / 1e9:>9.2f}")


if __name__ == "__main__":
    main()
