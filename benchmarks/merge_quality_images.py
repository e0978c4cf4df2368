"""Two image sets, a base that knows both from other views, and twenty fine-tunes on each."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import images
import jax
import jax.numpy as jnp
import numpy as np
from merge_quality_models import (
    Params,
    Recipe,
    Split,
    init,
    logits,
    repeated,
    show,
    take,
    train_many,
)
from scipy import ndimage

SIDE = 14
SIZES = (SIDE * SIDE, 128, 128, 20)  # ten classes of each set
SETS = ("clothes", "digits")
SOURCES = {"clothes": 15_000, "digits": 5_000}  # images that the base learns
FEW = 500  # that fine-tunes learn, and as many to choose by
REHEARSAL = {"clothes": 5_000, "digits": 2_000}
KNOWN = {"clothes": 60_000, "digits": 8_000}  # the others are the test
STEPS_OF_BASE = 6000


class Task(NamedTuple):
    """One set of one seed; images are `(views, images, 196)`, upright ones a single view."""

    name: str
    seed: int
    source: Split
    train: Split
    valid: Split
    test: dict[str, Split]  # upright first, then shifted in other ways


class Kitchen(NamedTuple):
    """A task, its base, and the fine-tunes that a soup is made of."""

    task: Task
    base: Params
    probed: Params  # with a head learned on what it computes, where all ingredients start
    ingredients: list[Params]


def small(x: np.ndarray) -> np.ndarray:
    """28 x 28 pixels to 14 x 14, by means of four."""
    return x.reshape(-1, SIDE, 2, SIDE, 2).mean(axis=(2, 4))


def turned(x: np.ndarray, degrees: float) -> np.ndarray:
    return ndimage.rotate(x, degrees, axes=(1, 2), reshape=False, order=1, cval=-1.0)


# What the base learns; never the upright view.
VIEWS_OF_BASE = (
    lambda x: x[:, :, ::-1],
    lambda x: -x,
    lambda x: turned(x, 45),
    lambda x: turned(x, -45),
)


def shifted(x: np.ndarray) -> dict[str, np.ndarray]:
    """The images as they are, and in three ways that nothing was trained for."""
    noise = np.random.default_rng(0).normal(0, 0.6, x.shape)
    return {
        "upright": x,
        "turned by 20 degrees": turned(x, 20),
        "with noise": x + noise,
        "moved by a pixel": ndimage.shift(x, (0, 1, 1), order=1, cval=-1.0),
    }


def jittered(x: np.ndarray, seed: int) -> np.ndarray:
    """Every image moved by up to a pixel."""
    offsets = np.random.default_rng(seed).integers(-1, 2, (2, len(x), 1, 1))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-1.0)
    rows, columns = 1 + offsets + np.arange(SIDE)
    return padded[np.arange(len(x))[:, None, None], rows.transpose(0, 2, 1), columns]


def split(x: np.ndarray, y: np.ndarray) -> Split:
    """Of images `(views, n, 14, 14)`."""
    flat = x.reshape(*x.shape[:2], SIDE * SIDE)
    return Split(jnp.asarray(flat, jnp.float32), jnp.asarray(y, jnp.int32))


def sets(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images `(n, 14, 14)` and labels, 0 to 9 for clothes and 10 to 19 for digits."""
    parts = [images.fashion(folder, part) for part in ("train", "t10k")]
    clothes, kinds = (np.concatenate(both) for both in zip(*parts, strict=True))
    digits, numbers = images.digits()
    return {"clothes": (small(clothes), kinds), "digits": (small(digits), numbers + 10)}


def task(name: str, x: np.ndarray, y: np.ndarray, seed: int, rehearse: bool) -> Task:
    """Draws a seed's images; the test is the same for all, and set apart from the start."""
    order = np.random.default_rng(seed).permutation(KNOWN[name])
    sizes = (SOURCES[name], FEW, FEW, REHEARSAL[name])
    bounds = np.cumsum((0, *sizes))
    source, learn, valid, held_out = (order[a:b] for a, b in itertools.pairwise(bounds))
    rows = held_out if rehearse else np.arange(KNOWN[name], len(y))
    moved = jittered(x[source], seed)
    others = [view(moved) for view in VIEWS_OF_BASE]
    return Task(
        name,
        seed,
        split(np.stack(others), y[source]),
        split(x[None, learn], y[learn]),
        split(x[None, valid], y[valid]),
        {title: split(found[None], y[rows]) for title, found in shifted(x[rows]).items()},
    )


def ingredients(seed: int, count: int) -> Recipe:
    """Random recipes, as a search for hyperparameters draws them."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.uniform(low, high, count).astype(np.float32)  # noqa: E731
    return Recipe(
        rate=10 ** draw(-3.3, -2.7),
        decay=10 ** draw(-4, -2),
        smoothing=draw(0, 0.2),
        noise=draw(0, 0.15),
        mixup=np.where(draw(0, 1) < 0.5, draw(0, 1), 0).astype(np.float32),
        share=draw(0.4, 1),
    )


def probed(base: Params, learn: Split, key: jax.Array) -> Params:
    """The base with a head that was trained on its features alone."""
    *body, head = sorted(base)
    features = jax.nn.relu(logits({name: take(base[name], 0) for name in body}, learn.images))
    rate = jax.tree.map(lambda x: np.full(1, x, np.float32), Recipe(rate=5e-3))
    new = train_many({head: base[head]}, features[None], learn.labels[None], key[None], rate, 200)
    return take(base | new, 0)


def kitchens(options: argparse.Namespace) -> dict[str, list[Kitchen]]:
    """Of both sets and all seeds; trainings of a kind are one compiled program."""
    seeds, count = options.seeds, options.ingredients
    data = sets(options.fashion)
    tasks = [[task(n, *data[n], seed, options.rehearse) for n in SETS] for seed in range(seeds)]
    keys = jax.vmap(lambda i: jax.random.split(jax.random.key(i), 4))(jnp.arange(seeds))
    same = jax.tree.map(lambda x: np.full(1, x, np.float32), Recipe(noise=0.1))
    bases = []
    for seed, both in enumerate(tasks):
        repeats = [max(SOURCES.values()) // SOURCES[t.name] for t in both]
        x, y = (
            np.concatenate([np.repeat(get(t.source), n, axis) for t, n in zip(both, repeats)], axis)
            for get, axis in ((lambda s: s.images, 1), (lambda s: s.labels, 0))
        )
        start = jax.tree.map(lambda leaf: leaf[None], init(keys[seed, 0], SIZES))
        key = keys[seed, 1:2]
        bases.append(train_many(start, x[None], y[None], key, same, STEPS_OF_BASE))
        show(f"base of seed {seed} for the soups")
    found: dict[str, list[Kitchen]] = {name: [] for name in SETS}
    for (seed, both), i in itertools.product(enumerate(tasks), range(len(SETS))):
        one = both[i]
        recipes = ingredients(len(SETS) * seed + i, count)
        learn = repeated(jax.tree.map(lambda leaf: leaf[None], one.train), count)
        several = jax.random.split(keys[seed, 2 + i], count + 1)
        base = probed(bases[seed], one.train, several[count])
        start = jax.tree.map(lambda leaf: np.repeat(leaf[None], count, 0), base)
        tuned = train_many(start, *learn, several[:count], recipes, options.steps)
        tuned = jax.tree.map(np.asarray, tuned)
        models = [take(tuned, n) for n in range(count)]
        found[one.name].append(Kitchen(one, take(bases[seed], 0), base, models))
        show(f"{count} fine-tunes on {one.name}, seed {seed}")
    return found
