"""Formats that need no data: time and memory, beside torchao, qwix and plain ways to write them.

Run: python benchmarks/bench_quantize.py [--peers PYTHON] [--only time|memory] [--rows 4096]
       [--columns 4096] [--repeats 15]

Time: every row quantizes the same float32 matrix; the best of interleaved repeats is reported. With
`--peers`, that Python, which needs torchao and qwix but not this library, times them on a matrix of
the same shape, once before and once after ours, and the better time counts.

Memory: resident bytes of a process that makes a tree of 0.2 G parameters, quantizes it and drops
the input, and the bytes of the arrays in the new tree. Their difference, some 13 MB of compiled
programs and allocator, was the same for a tree of twice the size.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 128
HERE = Path(__file__).resolve()


def ours() -> dict[str, Any]:
    """Transforms by the names that the table gives them."""
    import jaxweights as jw

    rtn, q = jw.quantize.round_to_nearest, jw.quantize
    return {
        "int4 g128 signed_max": rtn(bits=4, group_size=GROUP),
        "int4 g128 affine": rtn(bits=4, group_size=GROUP, grid="affine"),
        "int4 g128 half": rtn(bits=4, group_size=GROUP, grid="half"),
        "int3 g128 signed_max": rtn(bits=3, group_size=GROUP),
        "int8 outputs narrow": rtn(bits=8),
        "nf4 g64": q.nf4(),
        "nf4 g64 double": q.nf4(double_quantization=True),
        "fp4 g64": q.fp4(),
        "fp8 e4m3 outputs": q.fp8(),
        "fp8 e4m3 128x128": q.fp8(group_size=(128, 128)),
        "mx e4m3": q.mx(element="e4m3"),
        "mx e3m2": q.mx(element="e3m2"),
        "mx e2m1": q.mx(element="e2m1"),
        "nvfp4": q.nvfp4(),
        "ternary": q.ternary(),
        "power 4 bit, a=0.7": q.power(bits=4, exponents=[0.7]),
        "power 4 bit, 20 exponents": q.power(bits=4),
        "hqq 4 bit g64": q.hqq(bits=4),
    }


def plain_jax(weight: Any) -> Any:
    """As one writes it first: int4 in uint8, the grid from 7 times the scale to -8 times it."""
    import jax.numpy as jnp

    groups = weight.reshape(-1, GROUP, weight.shape[1])
    scale = jnp.max(jnp.abs(groups), axis=1, keepdims=True) / 7
    codes = jnp.clip(jnp.round(groups / scale), -8, 7).astype(jnp.int8).reshape(weight.shape)
    packed = (codes[::2] & 15) | (codes[1::2] << 4)
    return packed.astype(jnp.uint8), scale[:, 0]


def best_of(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Best seconds of each case; slow cases run less often."""
    best: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, run in cases.items():
            if repeat > 3 and best[name] > 1:
                continue
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if repeat:  # the first compiles
                best[name] = min(best.get(name, seconds), seconds)
            time.sleep(0.02)  # threads of matrix libraries spin on after a call
    return best


def measure_ours(rows: int, columns: int, repeats: int) -> dict[str, float]:
    import jax

    import jaxweights as jw

    # As large as weights are: what an absolute setting of a method calls an outlier depends on it.
    weight = 0.02 * jax.random.normal(jax.random.key(0), (rows, columns))
    host = np.asarray(weight)
    done = jax.block_until_ready
    plain = jax.jit(plain_jax)
    cases: dict[str, Callable[[], Any]] = {
        f"jaxweights {name}": lambda tx=tx: done(jw.apply(tx, {"kernel": weight}))
        for name, tx in ours().items()
    }
    cases["plain jax int4 g128, jit"] = lambda: done(plain(weight))
    cases["numpy copy of the bytes"] = host.copy
    return best_of(cases, repeats)


def measure_peers(rows: int, columns: int, repeats: int) -> dict[str, float]:
    """Runs where torchao and qwix are installed; knows nothing of this library."""
    import jax
    import torch
    from qwix._src.core import qarray
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization import quant_primitives as primitives

    values = np.random.default_rng(0).normal(size=(columns, rows)).astype(np.float32)
    tensor = torch.from_numpy(values)  # (out, in), as torch holds it
    block, mapping = (1, GROUP), primitives.MappingType.SYMMETRIC

    def module() -> Any:
        linear = torch.nn.Linear(rows, columns, bias=False)
        linear.weight = torch.nn.Parameter(tensor, requires_grad=False)
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
        quantize_(linear, config)
        return linear.weight

    def rounded(weight: Any) -> Any:
        scale, zero = primitives.choose_qparams_affine(weight, mapping, block, torch.int8, -8, 7)
        codes = primitives.quantize_affine(weight, block, scale, zero, torch.int8, -8, 7)
        return codes, scale

    compiled = torch.compile(rounded)
    how = dict(channelwise_axes=[1], tiled_axes={0: GROUP}, calibration_method="absmax")
    weight = jax.numpy.asarray(values.T.copy())
    cases: dict[str, Callable[[], Any]] = {
        "torchao int4 g128, quantize_": module,
        "torchao int4 g128, primitives": lambda: rounded(tensor),
        "torchao int4 g128, torch.compile": lambda: compiled(tensor),
    }
    for name, qtype, tile in (("int4 g128", "int4", GROUP), ("nf4 g64", "nf4", 64)):
        setting = qarray.HowToQuantize(qtype=qtype, **(how | {"tiled_axes": {0: tile}}))
        run = jax.jit(lambda x, setting=setting: qarray.quantize(x, setting))
        cases[f"qwix {name}, jit"] = lambda run=run: jax.block_until_ready(run(weight))
    with torch.inference_mode():
        return best_of(cases, repeats)


def measure_memory(kind: str) -> dict[str, float]:
    """Bytes of a process that quantizes a tree of 0.2 G parameters."""
    import jax
    import jax.numpy as jnp

    import jaxweights as jw

    tx = ours()[kind]
    shapes = {f"layer_{i}": (4096, 4096) for i in range(7)} | {"wide": (4096, 16384)}
    for shape in set(shapes.values()):  # programs are compiled before anything is counted
        jax.block_until_ready(jw.apply(tx, {"kernel": jnp.ones(shape)}))
    before = resident_now()
    params = {name: jax.block_until_ready(jnp.full(n, 1.5)) for name, n in shapes.items()}
    count = sum(leaf.size for leaf in params.values())
    largest = max(leaf.nbytes for leaf in params.values())
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    new = jax.block_until_ready(jw.apply(tx, params))
    peak = resident("VmHWM") - before
    del params
    held = resident_now() - before
    assert all(jw.is_weight(leaf) for leaf in new.values())
    arrays = sum(leaf.nbytes for leaf in new.values())
    return {
        "peak over input, in largest leaves": (peak - 4 * count) / largest,
        "held bytes a parameter": held / count,
        "bytes of arrays a parameter": arrays / count,
    }


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def resident_now() -> int:
    """After what was freed went back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


def child(python: str, *arguments: str) -> dict[str, float]:
    """Runs a part of this file in another process."""
    done = subprocess.run(
        [python, str(HERE), *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_times(options: argparse.Namespace) -> None:
    sizes = (options.rows, options.columns, options.repeats)
    arguments = [f"--{name}={getattr(options, name)}" for name in ("rows", "columns", "repeats")]
    peers = [child(options.peers, "--part=peers", *arguments)] if options.peers else []
    seconds = measure_ours(*sizes)
    peers += [child(options.peers, "--part=peers", *arguments)] if options.peers else []
    for found in peers:
        seconds |= {name: min(s, seconds.get(name, s)) for name, s in found.items()}
    print(f"{options.rows} x {options.columns} float32")
    print(f"{'':<38} {'ms':>8} {'Gparam/s':>9}")
    for name, best in seconds.items():
        print(f"{name:<38} {1e3 * best:>8.1f} {options.rows * options.columns / best / 1e9:>9.2f}")


def print_memory() -> None:
    print(f"{'':<38} {'peak over input,':>18} {'held bytes':>12} {'in arrays':>12}")
    print(f"{'':<38} {'in largest leaves':>18} {'a parameter':>12} {'a parameter':>12}")
    for kind in ("int4 g128 signed_max", "int8 outputs narrow", "nf4 g64", "fp8 e4m3 outputs"):
        found = child(sys.executable, f"--part=memory:{kind}")
        over, held, arrays = found.values()
        print(f"jaxweights {kind:<27} {over:>18.2f} {held:>12.2f} {arrays:>12.3f}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", help="a Python with torchao and qwix")
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "peers":
        print(json.dumps(measure_peers(options.rows, options.columns, options.repeats)))
    elif options.part:
        print(json.dumps(measure_memory(options.part.partition(":")[2])))
    else:
        if options.only != "memory":
            print_times(options)
        if options.only != "time":
            print_memory()


if __name__ == "__main__":
    main()
