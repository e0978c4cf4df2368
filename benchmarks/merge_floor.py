"""What a merge of checkpoints cannot avoid, by parts; `bench_merge.py --floor` runs it.

    read    every byte of the operands is seen once, mapped from the page cache, for its checksum
    write   as many bytes as the result has are written from a buffer that stays in cache into a
            file whose room is reserved, and their checksum is taken
    survey  what must be known of whole tensors before any entry can be made: TIES counts each
            delta's entries above a threshold, once, as if the threshold were known; DARE-TIES draws
            a bit for each entry of each delta, and sums up the magnitudes of all and of those kept;
            SLERP sums up two squares and a product
    merge   the method's arithmetic once for every entry, in a compiled program

Survey and merge work on arrays that stay in a core's cache and are never fetched. All parts but
writing run with as many threads as cores, each of which works by itself. Numbers are processor
seconds of all threads, the least of several runs. The floor is their sum divided by the cores: what
a merge takes whose work is even on all cores, never waits, and is done with each byte in cache.

Left out are start-up, compiling, plans, provenance, a second look at the operands after a survey,
what keeps threads in order, and "sync", the seconds that the disk takes afterwards until it holds
what was written: a merge waits for that, `cp` does not.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import xxhash

CHUNK = 2 << 20
ENTRIES = CHUNK // 2  # of bfloat16
WORKERS = os.cpu_count() or 1
RUNS = 3
WEIGHTS = (0.5, 0.3, 0.2)
SUMS = 1 << 14  # partial sums of a piece, which NumPy adds up


def wide(x: Any) -> jax.Array:
    return x.astype(jnp.float32)


def sums(x: jax.Array) -> jax.Array:
    """Sums of 64 entries each: compilers for CPUs add rows faster than they reduce."""
    for fold in (4, 4, 4):
        x = jax.lax.optimization_barrier(functools.reduce(jnp.add, jnp.split(x, fold)))
    return x


@jax.jit
def linear(base: Any, *models: Any) -> jax.Array:
    total = sum(w * wide(m) for w, m in zip((0.5, *WEIGHTS), (base, *models), strict=True))
    return jnp.asarray(total).astype(jnp.bfloat16)


@jax.jit
def task_arithmetic(base: Any, *models: Any) -> jax.Array:
    total = sum(w * (wide(m) - wide(base)) for w, m in zip(WEIGHTS, models, strict=True))
    return (wide(base) + total).astype(jnp.bfloat16)


# With factors that are given: their own computation is of a few numbers.
@jax.jit
def slerp(one: Any, other: Any) -> jax.Array:
    return (0.6 * wide(one) + 0.4 * wide(other)).astype(jnp.bfloat16)


@jax.jit
def product_sums(one: Any, other: Any) -> jax.Array:
    return sums(wide(one) * wide(other))


def combined(base: Any, deltas: Sequence[jax.Array], *, normalize: bool) -> jax.Array:
    """The sum of the weighted deltas that have the sign of the sum of all, with the base."""
    weighted = [w * d for w, d in zip(WEIGHTS, deltas, strict=True)]
    elected = functools.reduce(jnp.add, weighted) >= 0
    agrees = [((d >= 0) == elected) & (d != 0) for d in weighted]
    merged = sum(jnp.where(a, d, 0) for a, d in zip(agrees, weighted, strict=True))
    if normalize:
        total = jnp.asarray(sum(jnp.where(a, w, 0.0) for a, w in zip(agrees, WEIGHTS, strict=True)))
        merged = merged / jnp.where(total == 0, 1, total)
    return (wide(base) + merged).astype(jnp.bfloat16)


@jax.jit
def ties(base: Any, *models: Any) -> jax.Array:
    deltas = [wide(m) - wide(base) for m in models]
    kept = [jnp.where(jnp.abs(d) >= 1e-3, d, 0) for d in deltas]
    return combined(base, kept, normalize=True)


@jax.jit
def count_above(base: Any, model: Any) -> jax.Array:
    return sums((jnp.abs(wide(model) - wide(base)) >= 1e-3).astype(jnp.uint32))


@jax.jit
def dare_ties(base: Any, *rest: Any) -> jax.Array:
    models, masks = rest[:3], rest[3:]
    kept = [thinned(base, m, k) for m, k in zip(models, masks, strict=True)]
    return combined(base, kept, normalize=False)


def thinned(base: Any, model: Any, mask: Any) -> jax.Array:
    """A delta where a mask of ones and zeros keeps it, by integers: faster than a choice."""
    bits = jax.lax.bitcast_convert_type(wide(model) - wide(base), jnp.int32)
    return jax.lax.bitcast_convert_type(bits & -mask.astype(jnp.int32), jnp.float32)


@jax.jit
def magnitude_sums(base: Any, model: Any, mask: Any) -> jax.Array:
    """Sums of all magnitudes and of those that are kept, as one complex number each."""
    size = jnp.abs(wide(model) - wide(base))
    return sums(jax.lax.complex(size, jnp.abs(thinned(base, model, mask))))


def drawn(generator: np.random.SFC64) -> np.ndarray:
    """A one or a zero for each entry of a piece."""
    words = generator.random_raw(ENTRIES // 64)
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(np.int8)


def arithmetic(method: str) -> dict[str, Callable[[], Any]]:
    """What survey and merge do with a piece, and where there is none, nothing."""
    draw = np.random.default_rng(0)
    base, *models = [
        jnp.asarray((0.02 * draw.standard_normal(ENTRIES)).astype(ml_dtypes.bfloat16))
        for _ in range(4)
    ]
    generator = np.random.SFC64(0)
    masks = [drawn(generator) for _ in models]
    programs: dict[str, Callable[[], Any]] = {
        "linear": lambda: linear(base, *models),
        "task_arithmetic": lambda: task_arithmetic(base, *models),
        "slerp": lambda: slerp(base, models[0]),
        "ties": lambda: ties(base, *models),
        "dare_ties": lambda: dare_ties(base, *models, *masks),
    }
    surveys: dict[str, Callable[[], Any]] = {
        "slerp": lambda: [
            product_sums(a, b) for a, b in ((base, base), (models[0], models[0]), (base, models[0]))
        ],
        "ties": lambda: [count_above(base, model) for model in models],
        "dare_ties": lambda: [magnitude_sums(base, m, drawn(generator)) for m in models],
    }
    return {"survey": surveys.get(method, list), "merge": programs[method]}


def in_threads(work: Callable[[int], None]) -> float:
    """Processor seconds of workers that each have a number."""
    before = time.process_time()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))
    return time.process_time() - before


def repeated(programs: Sequence[Callable[[], Any]], pieces: int) -> float:
    """A program, one for each worker, over all pieces."""

    def work(worker: int) -> None:
        for _ in range(worker, pieces, WORKERS):
            jax.block_until_ready(programs[worker]())

    return in_threads(work)


def read(files: Sequence[Path]) -> float:
    """Takes checksums of files."""

    def work(worker: int) -> None:
        for file in files:
            digest = xxhash.xxh3_128()
            with file.open("rb") as opened:
                data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                array = np.frombuffer(data, np.uint8)
                for start in range(worker * CHUNK, len(data), WORKERS * CHUNK):
                    part = array[start : start + CHUNK]
                    digest.update(part)
                    data.madvise(mmap.MADV_DONTNEED, start, part.size)  # few page tables are held

    return in_threads(work)


def write(file: Path, nbytes: int) -> tuple[float, float]:
    """Writes as many bytes, which a file system lets one thread at a time; and sends them off."""
    buffer, digest = memoryview(bytearray(CHUNK)), xxhash.xxh3_128()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        before = time.process_time()
        for start in range(0, nbytes, CHUNK):
            data = buffer[: min(CHUNK, nbytes - start)]
            digest.update(data)
            os.pwrite(descriptor, data, start)
        cpu, began = time.process_time() - before, time.perf_counter()
        os.fsync(descriptor)
        return cpu, time.perf_counter() - began
    finally:
        os.close(descriptor)
        file.unlink()


def floor_of(method: str, operands: Sequence[Path], scratch: Path) -> dict[str, float]:
    """Processor seconds by part, and seconds of the disk.

    Args:
      method: What is done.
      operands: Folders of the models that are read, all of one size.
      scratch: A file that may be written.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # results are fresh memory, which is used again, as in the merge
        mallopt(-3, 1 << 30)
        mallopt(-1, (1 << 31) - 1)
    files = [file for folder in operands for file in sorted(folder.glob("*.safetensors"))]
    nbytes = sum(file.stat().st_size for file in operands[0].glob("*.safetensors"))
    pieces = -(-nbytes // CHUNK)
    own = [arithmetic(method) for _ in range(WORKERS)]
    for programs in own:
        jax.block_until_ready([program() for program in programs.values()])
    found: dict[str, list[float]] = {}
    for _ in range(RUNS):
        os.sync()
        found.setdefault("read", []).append(read(files))
        for part in ("survey", "merge"):
            seconds = repeated([programs[part] for programs in own], pieces)
            found.setdefault(part, []).append(seconds)
        for part, seconds in zip(("write", "sync"), write(scratch, nbytes), strict=True):
            found.setdefault(part, []).append(seconds)
    return {part: min(seconds) for part, seconds in found.items()}


if __name__ == "__main__":
    name, scratch, *folders = sys.argv[1:]
    print(json.dumps(floor_of(name, [Path(folder) for folder in folders], Path(scratch))))
