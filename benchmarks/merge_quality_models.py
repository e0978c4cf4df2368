"""Digits in four views, and the small networks that `merge_quality.py` merges."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any

START = time.perf_counter()
SIZES = (64, 256, 128, 10)
BATCH = 64
VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "upright": lambda x: x,
    "rotated": lambda x: np.rot90(x, axes=(1, 2)),
    "flipped": lambda x: x[:, :, ::-1],
    "inverted": lambda x: -x,
}


class Split(NamedTuple):
    """Images of all views `(views, images, 64)` and their labels `(images,)`."""

    images: jax.Array
    labels: jax.Array


class World(NamedTuple):
    """What one seed has."""

    seed: int
    train: Split
    valid: Split
    test: Split
    base: Params
    tuned: list[Params]  # one per view
    joint: Params  # tuned on all views together


def splits(seed: int) -> tuple[Split, Split, Split]:
    """Half of the images for training, a sixth to choose settings, a third for the test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    images, labels = found.images[order] / 8 - 1, found.target[order]
    views = np.stack([view(images).reshape(len(images), 64) for view in VIEWS.values()])
    bounds = (0, len(order) // 2, len(order) * 2 // 3, len(order))
    return tuple(
        Split(jnp.asarray(views[:, a:b], jnp.float32), jnp.asarray(labels[a:b], jnp.int32))
        for a, b in itertools.pairwise(bounds)
    )  # type: ignore[return-value]


# The network and its training, of many models at once.


def logits(params: Params, x: jax.Array) -> jax.Array:
    for name in sorted(params):
        x = x @ params[name]["kernel"]
        x = x if name == max(params) else jax.nn.relu(x)
    return x


def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def init(key: jax.Array, sizes: tuple[int, ...] = SIZES) -> Params:
    pairs = list(itertools.pairwise(sizes))
    return {
        f"layer_{i}": {"kernel": jax.random.normal(k, (rows, columns)) * (2 / rows) ** 0.5}
        for i, (k, (rows, columns)) in enumerate(
            zip(jax.random.split(key, len(pairs)), pairs, strict=True)
        )
    }


class Recipe(NamedTuple):
    """How a model is tuned; numbers or arrays of them."""

    rate: Any = 1e-3
    decay: Any = 1e-4
    smoothing: Any = 0.0
    noise: Any = 0.0
    mixup: Any = 0.0  # four times the mean share of another image
    share: Any = 1.0  # of the steps that are taken


def train(
    params: Params, images: jax.Array, labels: jax.Array, key: jax.Array, recipe: Recipe, steps: int
) -> Params:
    """One model; `images` is `(views, images, inputs)`, and every example draws its view."""
    adam, length = optax.scale_by_adam(), steps * jnp.asarray(recipe.share, jnp.float32)

    def loss(params: Params, x: jax.Array, y: jax.Array, other: jax.Array) -> jax.Array:
        found = logits(params, x + other * (x[::-1] - x))
        target = optax.smooth_labels(jax.nn.one_hot(y, found.shape[-1]), recipe.smoothing)
        target = target + other * (target[::-1] - target)
        return optax.softmax_cross_entropy(found, target).mean()

    def step(carry: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (params, state), (key, i) = carry, at
        keys = jax.random.split(key, 3)
        rows = jax.random.randint(keys[0], (BATCH,), 0, images.shape[1])
        x = images[jax.random.randint(keys[1], (BATCH,), 0, images.shape[0]), rows]
        x = x + recipe.noise * jax.random.normal(keys[2], x.shape)
        other = recipe.mixup / 2 * jax.random.uniform(jax.random.fold_in(key, 3), (BATCH, 1))
        grads = jax.grad(loss)(params, x, labels[rows], other)
        updates, state = adam.update(grads, state, params)
        rate = recipe.rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(i / length, 1)))
        move = lambda p, u: p - rate * (u + recipe.decay * p)  # noqa: E731
        return (jax.tree.map(move, params, updates), state), None

    at = (jax.random.split(key, steps), jnp.arange(steps))
    return jax.lax.scan(step, (params, adam.init(params)), at)[0][0]


@functools.partial(jax.jit, static_argnames="steps")
def train_many(
    params: Params, images: jax.Array, labels: jax.Array, keys: jax.Array, recipe: Any, steps: int
) -> Params:
    one = functools.partial(train, steps=steps)
    return jax.vmap(one)(params, images, labels, keys, recipe)


@jax.jit
def accuracies(params: Params, split: Split) -> jax.Array:
    """Percent right, per view."""
    return 100 * (logits(params, split.images).argmax(-1) == split.labels).mean(axis=-1)


def take(tree: Any, index: int) -> Any:
    """One of stacked trees; by NumPy, because nothing then waits for a compiler."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[index]), tree)


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def repeated(tree: Any, times: int) -> Any:
    return jax.tree.map(lambda x: np.repeat(np.asarray(x), times, axis=0), tree)


def worlds(options: argparse.Namespace) -> list[World]:
    """Every seed's data, base and fine-tunes, all of a kind trained in one compiled program."""
    seeds, views = options.seeds, len(VIEWS)
    data = [splits(seed) for seed in range(seeds)]
    trains = stacked([train for train, _, _ in data])
    keys = jax.vmap(lambda i: jax.random.split(jax.random.key(i), 5))(jnp.arange(seeds))
    same = lambda n, **settings: jax.tree.map(  # noqa: E731
        lambda x: np.full(n, x, np.float32), Recipe(**settings)
    )

    bases = jax.vmap(init)(keys[:, 0])
    upright = trains.images[:, :1]
    bases = train_many(bases, upright, trains.labels, keys[:, 1], same(seeds), options.steps)
    show("bases")
    joint = train_many(
        bases, trains.images, trains.labels, keys[:, 2], same(seeds), 2 * options.steps
    )
    single = trains.images.reshape(seeds * views, 1, *trains.images.shape[2:])
    tuned = train_many(
        repeated(bases, views),
        single,
        repeated(trains.labels, views),
        jax.vmap(lambda key: jax.random.split(key, views))(keys[:, 3]).ravel(),
        same(seeds * views),
        options.steps,
    )
    show("fine-tunes of four views")
    return [
        World(
            seed,
            *data[seed],
            take(bases, seed),
            [take(tuned, seed * views + i) for i in range(views)],
            take(joint, seed),
        )
        for seed in range(seeds)
    ]


def show(task: str) -> None:
    print(f"{time.perf_counter() - START:7.1f} s  {task}", file=sys.stderr, flush=True)
