"""Weight matching beside a plain NumPy and SciPy coordinate descent, in one run.

Run: `python benchmarks/bench_align.py [--width 512] [--hidden 8] [--repeats 3]`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxweights import align

Tree = dict[str, np.ndarray]


def mlp(width: int, hidden: int, rng: np.random.Generator) -> Tree:
    """Weights of an MLP with as many hidden layers."""
    sizes = [784, *[width] * hidden, 10]
    tree: Tree = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        kernel = rng.standard_normal((rows, columns), dtype=np.float32)
        tree[f"{i}/kernel"] = kernel / np.float32(rows**0.5)
        tree[f"{i}/bias"] = rng.standard_normal(columns, dtype=np.float32) * np.float32(0.1)
    return tree


def axes_of(hidden: int) -> dict[str, tuple[str | None, ...]]:
    """Names of the axes of `mlp`."""
    names = [None, *(f"hidden_{i}" for i in range(hidden)), None]
    axes: dict[str, tuple[str | None, ...]] = {}
    for i in range(hidden + 1):
        axes[f"{i}/kernel"] = (names[i], names[i + 1])
        axes[f"{i}/bias"] = (names[i + 1],)
    return axes


def transformer(width: int, layers: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """The spec of a decoder with stacked layers, and its weights."""
    from jaxweights.models import Llama, LlamaConfig

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=width // 32,
        num_kv_heads=width // 64,
    )
    tokens = np.zeros((1, 2), np.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    tree = jax.tree.map(lambda x: rng.standard_normal(x.shape, dtype=np.float32), shapes)
    return align.llama_permutations(config), tree


def baseline(axes: dict[str, tuple[str | None, ...]], a: Tree, b: Tree, seed: int) -> Any:
    """The authors' loop: every permutation in every sweep, until a sweep changes nothing."""
    names = sorted({n for entry in axes.values() for n in entry if n is not None})
    sizes = {n: a[p].shape[i] for p, entry in axes.items() for i, n in enumerate(entry) if n}
    perms = {n: np.arange(sizes[n]) for n in names}

    def permuted(path: str, leave: str | None) -> np.ndarray:
        leaf = b[path]
        for i, name in enumerate(axes[path]):
            if name is not None and name != leave:
                leaf = np.take(leaf, perms[name], axis=i)
        return leaf

    rng, sweeps, changed = np.random.default_rng(seed), 0, True
    while changed:
        changed, sweeps = False, sweeps + 1
        for name in (names[i] for i in rng.permutation(len(names))):
            total = np.zeros((sizes[name], sizes[name]), np.float32)
            for path, entry in axes.items():
                if name in entry:
                    axis = entry.index(name)
                    ours = np.moveaxis(a[path], axis, 0).reshape(sizes[name], -1)
                    theirs = np.moveaxis(permuted(path, name), axis, 0).reshape(sizes[name], -1)
                    total += ours @ theirs.T
            rows, columns = linear_sum_assignment(total, maximize=True)
            old, new = total[rows, perms[name]].sum(), total[rows, columns].sum()
            changed |= bool(new > old + 1e-12)
            perms[name] = columns
    value = sum(float(np.vdot(a[path], permuted(path, None))) for path in axes)
    return sweeps, value


def timed(run: Callable[[int], Any], repeats: int) -> tuple[float, float, Any]:
    """Seconds of the first and the fastest later call, and the last result."""
    seconds, out = [], None
    for seed in range(repeats + 1):
        start = time.perf_counter()
        out = run(seed)
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:]), out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=8, help="hidden layers of the MLP")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--transformer", action="store_true", help="also match two decoders")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    axes = axes_of(options.hidden)
    a, other = mlp(options.width, options.hidden, rng), mlp(options.width, options.hidden, rng)
    spec = align.PermutationSpec.of(a, axes)
    planted = {name: rng.permutation(size) for name, size in spec.sizes.items()}
    noisy = {k: v + 0.01 * rng.standard_normal(v.shape, dtype=np.float32) for k, v in a.items()}
    b = jax.tree.map(np.asarray, align.apply_permutation(spec, noisy, planted))

    print(f"{options.hidden} hidden layers of {options.width}, jax {jax.__version__}")
    print(f"{'':36}{'first s':>9}{'best s':>9}{'sweeps':>8}{'objective':>12}")
    for case, theirs in (("planted", b), ("independent", other)):

        def ours(seed: int, theirs: Tree = theirs) -> align.Matching:
            return align.weight_matching(spec, a, theirs, key=jax.random.key(seed))

        first, best, plain = timed(
            lambda seed, t=theirs: baseline(axes, a, t, seed), options.repeats
        )
        print(f"{case + ', NumPy and SciPy':36}{first:9.2f}{best:9.2f}{plain[0]:8}{plain[1]:12.1f}")
        first, best, found = timed(ours, options.repeats)
        value = found.objective[-1]
        print(
            f"{case + ', weight_matching':36}{first:9.2f}{best:9.2f}{found.sweeps:8}{value:12.1f}"
        )
    if options.transformer:
        decoder, model = transformer(options.width // 2, 4, rng)
        twin = jax.tree.map(lambda x: rng.standard_normal(x.shape, dtype=np.float32), model)
        first, best, found = timed(
            lambda seed: align.weight_matching(decoder, model, twin, key=jax.random.key(seed)),
            options.repeats,
        )
        value = found.objective[-1]
        print(
            f"{'decoder, weight_matching':36}{first:9.2f}{best:9.2f}{found.sweeps:8}{value:12.1f}"
        )


if __name__ == "__main__":
    main()
