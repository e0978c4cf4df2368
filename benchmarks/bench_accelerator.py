"""Milliseconds of the main transforms on the default device, beside torch and a plain copy there.

Run: python benchmarks/bench_accelerator.py [--width 4096] [--repeats 20] [--rows 'gptq|ties']

Every row works on float32 matrices of `--width` squared that lie on the device; the best of the
repeats counts. Transforms are called as they are, which includes what the host does for a leaf,
its look at the result among it, and inside one `jax.jit`; GB/s is the rate at which that reads its
operands. A torch row does the work of the row above it on the same device, where torch is
installed and sees one.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to torch

import jax
import jax.numpy as jnp
import numpy as np
from bench_gptq import torch_gptq

import jaxweights as jw
from jaxweights.quantize import gptq_matrix

BITS, GROUP = 4, 128


class Case(NamedTuple):
    """One row."""

    name: str
    work: Callable[..., Any]
    operands: tuple[Any, ...]
    read: int  # bytes
    traceable: bool = True


def one_leaf(width: int, torch: Any) -> Iterator[Case]:
    """Transforms of one matrix that need no data."""
    weight = 0.02 * jax.random.normal(jax.random.key(0), (width, width))
    read, q = weight.nbytes, jw.quantize
    yield Case("copy of the bytes", jnp.copy, (weight,), read)
    yield from (
        Case(name, functools.partial(jw.apply, tx), ({"kernel": weight},), read)
        for name, tx in {
            "int4 g128 affine": q.round_to_nearest(bits=BITS, group_size=GROUP, grid="affine"),
            "nf4 g64": q.nf4(),
            "fp8 e4m3": q.fp8(),
            "mx e2m1": q.mx(element="e2m1"),
            "nvfp4": q.nvfp4(),
            "hqq int4 g64": q.hqq(bits=BITS),
            "magnitude 50 %": jw.sparsify.magnitude(sparsity=0.5),
            "magnitude 2:4": jw.sparsify.magnitude(keep=2, of=4),
            "svd, rank 64": jw.adapt.truncate(rank=64),
            "int4 g128": q.round_to_nearest(bits=BITS, group_size=GROUP),
        }.items()
    )
    if torch is not None:
        rows = on_device(torch, weight.T)

        def rounded() -> Any:
            groups = rows.reshape(len(rows), -1, GROUP)
            scale = groups.abs().amax(-1, keepdim=True) / (2 ** (BITS - 1) - 0.5)
            low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
            return (groups / scale).round().clamp(low, high).to(torch.int8), scale

        yield Case("  torch, eager", rounded, (), read, traceable=False)
        yield Case("  torch.compile", torch.compile(rounded), (), read, traceable=False)


def merges(width: int, torch: Any) -> Iterator[Case]:
    """Merges of a base and three fine-tunes."""
    draws = jax.random.normal(jax.random.key(2), (4, width, width))
    base = {"kernel": 0.02 * draws[0]}
    tuned = [{"kernel": base["kernel"] + 0.002 * draw} for draw in draws[1:]]
    read = 4 * base["kernel"].nbytes
    key = jax.random.key(3)
    m = jw.merge
    for name, tx, models in (
        ("mean", m.mean(), tuned),
        ("task arithmetic", m.task_arithmetic(), tuned),
        ("dare", m.dare_linear(density=0.5), tuned),
        ("dare + ties", m.dare_ties(density=0.5), tuned),
        ("slerp of two", m.slerp(t=0.4), tuned[:1]),
        ("model stock", m.model_stock(), tuned),
        ("ties, half kept", m.ties(density=0.5), tuned),
    ):
        keys = {"key": key} if "dare" in name else {}
        work = lambda base, models, tx=tx, keys=keys: jw.apply(tx, base, models=models, **keys)  # noqa: E731
        yield Case(f"merge, {name}", work, (base, models), read if models is tuned else read // 2)
    if torch is not None:
        first, *others = (on_device(torch, tree["kernel"]) for tree in (base, *tuned))

        def ties() -> Any:
            deltas = torch.stack([other - first for other in others])
            flat = deltas.reshape(len(others), -1)
            least = flat.abs().kthvalue(flat.shape[1] // 2, dim=1, keepdim=True).values
            flat = torch.where(flat.abs() > least, flat, 0.0)
            agree = flat.sign() == flat.sum(0).sign()
            total = (flat * agree).sum(0) / (agree & (flat != 0)).sum(0).clamp(min=1)
            return first + total.reshape(first.shape)

        yield Case("  torch, eager", ties, (), read, traceable=False)


def gptq(width: int, torch: Any) -> Iterator[Case]:
    """GPTQ of one matrix, beside its authors' algorithm."""
    x = jax.random.normal(jax.random.key(4), (2 * width, width))
    weight = jax.random.normal(jax.random.key(5), (width, width))
    gram = jnp.matmul(x.T, x, precision="highest")
    ours = lambda w, h: gptq_matrix(w, h, bits=BITS, group_size=GROUP, damping=0.01)  # noqa: E731
    read = weight.nbytes + gram.nbytes
    yield Case("gptq int4 g128", ours, (weight, gram), read)
    if torch is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        theirs = torch_gptq(np.asarray(weight), np.asarray(gram), device=device)
        yield Case("  torch, the authors' way", theirs, (), read, traceable=False)


def on_device(torch: Any, array: jax.Array) -> Any:
    """A copy as a tensor."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.cuda() if torch.cuda.is_available() else tensor


def installed_torch() -> Any:
    """Torch, where it is installed and has the kind of device that JAX uses; else None."""
    try:
        import torch
    except ImportError:
        return None
    gpu = jax.default_backend() == "gpu"
    return torch if gpu == torch.cuda.is_available() else None


def seconds_of(run: Callable[[], Any], torch: Any, repeats: int) -> tuple[float, float]:
    """Seconds of the first call and of the best later one, the device's work included."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    budget, best = 3.0, float("inf")  # slow rows run less often
    for _ in range(repeats):
        seconds = once()
        best, budget = min(best, seconds), budget - seconds
        if budget < 0:
            break
    return first, best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", default="", help="only rows whose names match")
    options = parser.parse_args()
    torch = installed_torch()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.width} squared, float32"
    )
    print(f"{'':<28}{'first s':>9}{'ms':>10}{'jit, ms':>10}{'GB/s':>8}")
    for part in (one_leaf, merges, gptq):
        for case in part(options.width, torch):
            if not re.search(options.rows, case.name):
                continue
            first, best = seconds_of(lambda: case.work(*case.operands), torch, options.repeats)  # noqa: B023
            line = f"{case.name:<28}{first:>9.2f}{1e3 * best:>10.3f}"
            if case.traceable:
                whole = jax.jit(case.work)
                _, best = seconds_of(lambda: whole(*case.operands), torch, options.repeats)  # noqa: B023
                line += f"{1e3 * best:>10.3f}{case.read / best / 1e9:>8.0f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
