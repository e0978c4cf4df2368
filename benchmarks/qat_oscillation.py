"""Oscillation of weights in small vision transformers, for `qat.py`."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from qat_training import (
    START,
    Method,
    Params,
    Q,
    annealed,
    chain,
    digits,
    learned,
    scale_by_speed,
    scoring,
    straight,
    training,
)

import jaxweights as jw

WIDTH, HEADS, BLOCKS, PATCHES = 48, 4, 2, 16
HEAD_DIM = WIDTH // HEADS
# Products of queries and keys have this much less spread than either.
PRODUCT = (HEAD_DIM / WIDTH) ** 0.5


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
            block["qk"] = Q.query_key_product(query, keys, rotary=False).product / PRODUCT
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
            logits = PRODUCT * Q.query_key_logits(n, n, block["qk"], head_dim=HEAD_DIM)
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
