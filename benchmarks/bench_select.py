"""Exact selection beside sorting and NumPy's partition, in one run.

Run: `python benchmarks/bench_select.py [--size 45000000] [--repeats 5] [--sort]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core import kth_smallest, smallest
from jaxweights.sparsify import n_of_m_mask

REST = 0.3  # seconds between samples; threads of the last one spin on for a while


def best_of(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first and of the fastest later call."""
    seconds = []
    for _ in range(repeats + 1):
        time.sleep(REST)
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:])


def cases(size: int, sort: bool) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; the first row is the yardstick."""
    host = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    side = int(size**0.5) // 4 * 4
    flat, k = jax.device_put(host), size // 2
    matrix = flat[: side * side].reshape(side, side)
    narrow = flat.astype(jnp.bfloat16)
    kth, mark = jax.jit(kth_smallest), jax.jit(smallest)
    mark_columns = jax.jit(lambda w: smallest(w, side // 2, axis=0))
    mark_runs = jax.jit(lambda w: n_of_m_mask(w, keep=2, of=4))
    add = jax.jit(lambda w: w + 1)
    columns = np.abs(host[: side * side]).reshape(side, side)
    sort_flat = jax.jit(lambda w: jnp.sort(jnp.abs(w))[k - 1])
    assert kth(flat, jnp.int32(k)) == np.partition(np.abs(host), k - 1)[k - 1]
    assert int(mark(flat, jnp.int32(k)).sum()) == k
    table: dict[str, Callable[[], Any]] = {
        "numpy.partition, k-th magnitude": lambda: np.partition(np.abs(host), k - 1)[k - 1],
        "kth_smallest, float32": lambda: kth(flat, jnp.int32(k)),
        "kth_smallest, bfloat16": lambda: kth(narrow, jnp.int32(k)),
        "smallest, one group": lambda: mark(flat, jnp.int32(k)),
        "numpy.partition, each column": lambda: np.partition(columns, side // 2, axis=0),
        "smallest, each column": lambda: mark_columns(matrix),
        "n_of_m_mask, 2 of 4": lambda: mark_runs(matrix),
        "read and write (x + 1)": lambda: add(flat),
    }
    if sort:
        sort_columns = jax.jit(lambda w: jnp.sort(jnp.abs(w), axis=0)[side // 2])
        table["jnp.sort, each column"] = lambda: sort_columns(matrix)
        table["jnp.sort, k-th magnitude"] = lambda: sort_flat(flat)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=45_000_000, help="number of floats")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sort", action="store_true", help="also time jnp.sort, which is slow")
    options = parser.parse_args()
    print(f"{options.size:,} floats, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'':34}{'first s':>9}{'best s':>9}{'x partition':>13}")
    yardstick = None
    for name, run in cases(options.size, options.sort).items():
        first, best = best_of(run, options.repeats)
        yardstick = yardstick or best
        print(f"{name:34}{first:9.3f}{best:9.3f}{best / yardstick:13.2f}")


if __name__ == "__main__":
    main()
