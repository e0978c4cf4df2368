"""Loss barrier between two MLPs trained apart, before and after every way to align them.

Two networks learn scikit-learn's digits from other starts, in another order. The table shows the
loss barrier between them, the test accuracy halfway, and how far singular vectors are aligned.

Run: `python benchmarks/barrier.py [--width 512] [--hidden 3] [--seeds 3] [--figure FILE.png]`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxweights import align

Params = Any
Data = tuple[jax.Array, jax.Array]  # images and labels
BATCH = 128


def digits() -> tuple[Data, Data]:
    """Images for training, and every third of them for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 8 - 1, jnp.float32)
    labels, test = jnp.asarray(labels, jnp.int32), np.arange(len(labels)) % 3 == 0
    return (images[~test], labels[~test]), (images[test], labels[test])


def init(key: jax.Array, width: int, hidden: int) -> Params:
    sizes = [64, *[width] * hidden, 10]
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(k, (rows, columns)) * (2 / rows) ** 0.5,
            "bias": jnp.zeros(columns),
        }
        for i, (k, (rows, columns)) in enumerate(zip(keys, itertools.pairwise(sizes), strict=True))
    }


def units(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """What every layer computes; the last one gives the scores."""
    found = {}
    for name in sorted(params):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == max(params) else jax.nn.relu(x)
        found[name] = x
    return found


def loss_fn(params: Params, batch: Data) -> jax.Array:
    scores = units(params, batch[0])[max(params)]
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()


def train(params: Params, data: Data, key: jax.Array, steps: int) -> Params:
    optimizer = optax.adamw(1e-3, weight_decay=1e-2)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(data[0]))
        grads = jax.grad(loss_fn)(params, (data[0][rows], data[1][rows]))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])
    return run(params)


def hidden_units(params: Params, batch: Data) -> dict[str, jax.Array]:
    found = units(params, batch[0])
    del found[max(params)]
    return found


def ways(a: Params, b: Params, data: Data, keys: jax.Array) -> Iterator[tuple[str, Any, float]]:
    """Names, permutations and seconds of all alignments of `b` to `a`."""
    spec, (x, y) = align.mlp_permutations(a), data
    yield "not aligned", spec.identity(), 0.0
    start = time.perf_counter()
    matched = align.weight_matching(spec, a, b, key=keys[0]).permutations
    yield "weight matching", matched, time.perf_counter() - start
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    start = time.perf_counter()
    found = align.activation_matching(spec, hidden_units, a, b, batches).permutations
    yield "activation matching", found, time.perf_counter() - start
    start = time.perf_counter()
    found = align.straight_through_matching(
        spec,
        loss_fn,
        a,
        b,
        batches * 6,
        key=keys[1],
        start=matched,
        score_fn=jax.jit(lambda params: loss_fn(params, data)),
    ).permutations
    yield "straight through", found, time.perf_counter() - start


def measure(a: Params, b: Params, permutations: Any, data: Data, test: Data) -> tuple[float, ...]:
    """One row of the table, and what the figure shows."""
    spec = align.mlp_permutations(a)
    moved = align.apply_permutation(spec, b, permutations)
    barriers = [
        align.loss_barrier(lambda params, d=d: loss_fn(params, d), a, moved).barrier
        for d in (data, test)
    ]
    middle = jax.tree.map(lambda a, b: (a + b) / 2, a, moved)
    right = units(middle, test[0])[max(middle)].argmax(axis=-1) == test[1]
    found = align.singular_vector_alignment(spec, a, b, permutations)
    return (*barriers, 100 * float(right.mean()), found.after[1], found.distance_ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", help="where to draw the singular vectors of the first pair")
    options = parser.parse_args()
    data, test = digits()
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(options.seeds):
        keys = jax.random.split(jax.random.key(seed), 4)
        a, b = (
            train(init(key, options.width, options.hidden), data, key, options.steps)
            for key in keys[:2]
        )
        for name, permutations, seconds in ways(a, b, data, keys[2:]):
            row = measure(a, b, permutations, data, test)
            rows.setdefault(name, []).append((*row, seconds))
            if options.figure and seed == 0 and name == "weight matching":
                spec = align.mlp_permutations(a)
                found = align.singular_vector_alignment(spec, a, b, permutations)
                align.alignment_figure(found).savefig(options.figure, dpi=150)
    print(f"{options.hidden} hidden layers of {options.width}, {options.seeds} pairs, ± deviation")
    heads = ("train barrier", "test barrier", "% right halfway", "R at 0.3", "distance", "seconds")
    print(f"{'':20}" + "".join(f"{head:>17}" for head in heads))
    for name, values in rows.items():
        pairs = zip(np.mean(values, axis=0), np.std(values, axis=0), strict=True)
        print(f"{name:20}" + "".join(f"{f'{mean:.3f} ± {std:.3f}':>17}" for mean, std in pairs))


if __name__ == "__main__":
    main()
