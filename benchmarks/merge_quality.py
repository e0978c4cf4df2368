"""What every way to merge keeps of four tasks, and of twenty fine-tunes of one.

    python benchmarks/merge_quality.py  # 3 to 4 minutes on two cores, mostly to compile
    python benchmarks/merge_quality.py --seeds 5  # about 25 seconds more for each seed
    python benchmarks/merge_quality.py --table soups  # one of three tables: about a minute

A network of 64-256-128-10 units, without biases, learns half of scikit-learn's digits. It is then
fine-tuned on the same images in four views: upright, rotated by 90 degrees, flipped and inverted. A
third of the other half chooses every setting (scales, densities, learned coefficients), for every
seed by itself; the rest is the test, which nothing else sees. Seeds differ in the split, the base
and all fine-tunes; what follows ± is the standard deviation over seeds, most of which all rows
share. Read small differences from the paired lines below a table.

The second table merges the base with one fine-tune: what is forgotten of the upright view against
what is learned of the other. The third one makes soups of twenty fine-tunes of one task, the
rotated one with fewer images, which differ in learning rate, weight decay, label smoothing, noise,
length and seed.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxweights as jw

Params = Any
M = jw.merge

START = time.perf_counter()
SIZES = (64, 256, 128, 10)
BATCH = 64
SCALES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0)
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
    soup: list[Params]  # fine-tunes of one task
    soup_settings: list[str]


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


def init(key: jax.Array) -> Params:
    pairs = list(itertools.pairwise(SIZES))
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
    share: Any = 1.0  # of the steps that are taken

    def __str__(self) -> str:
        names = ("rate", "decay", "smoothing", "noise", "length")
        return ", ".join(f"{n} {float(x):.2g}" for n, x in zip(names, self, strict=True))


def train(
    params: Params, images: jax.Array, labels: jax.Array, key: jax.Array, recipe: Recipe, steps: int
) -> Params:
    """One model; `images` is `(views, images, 64)`, and every example draws its view."""
    adam, length = optax.scale_by_adam(), steps * jnp.asarray(recipe.share, jnp.float32)

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        target = optax.smooth_labels(jax.nn.one_hot(y, SIZES[-1]), recipe.smoothing)
        return optax.softmax_cross_entropy(logits(params, x), target).mean()

    def step(carry: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (params, state), (key, i) = carry, at
        keys = jax.random.split(key, 3)
        rows = jax.random.randint(keys[0], (BATCH,), 0, images.shape[1])
        x = images[jax.random.randint(keys[1], (BATCH,), 0, images.shape[0]), rows]
        x = x + recipe.noise * jax.random.normal(keys[2], x.shape)
        grads = jax.grad(loss)(params, x, labels[rows])
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
    count, few = options.ingredients, slice(0, options.soup_images)
    recipes = [ingredients(seed, count) for seed in range(seeds)]
    soups = train_many(
        repeated(bases, count),
        repeated(trains.images[:, 1:2, few], count),
        repeated(trains.labels[:, few], count),
        jax.vmap(lambda key: jax.random.split(key, count))(keys[:, 4]).ravel(),
        jax.tree.map(lambda *x: np.concatenate(x), *recipes),
        options.steps,
    )
    show("ingredients of the soups")
    return [
        World(
            seed,
            *data[seed],
            take(bases, seed),
            [take(tuned, seed * views + i) for i in range(views)],
            take(joint, seed),
            [take(soups, seed * count + i) for i in range(count)],
            [str(take(recipes[seed], i)) for i in range(count)],
        )
        for seed in range(seeds)
    ]


def ingredients(seed: int, count: int) -> Recipe:
    """Random recipes, as a search for hyperparameters draws them."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.uniform(low, high, count).astype(np.float32)  # noqa: E731
    return Recipe(
        rate=10 ** draw(-3.2, -2.5),
        decay=10 ** draw(-4, -2),
        smoothing=draw(0, 0.1),
        noise=draw(0, 0.5),
        share=draw(0.6, 1),
    )


# Four tasks: every method, as functions of a world that yield candidates.

Candidates = Iterator[tuple[str, Params]]
Method = Callable[[World], Candidates]


def grid(make: Callable[..., jw.Transform], **axes: tuple[Any, ...]) -> Method:
    """A transform at all points of a grid of settings."""

    def candidates(world: World) -> Candidates:
        for values in itertools.product(*axes.values()):
            settings = dict(zip(axes, values, strict=True))
            label = ", ".join(f"{name} {value}" for name, value in settings.items())
            yield (
                label,
                jw.apply(
                    make(**settings), world.base, models=world.tuned, key=jax.random.key(world.seed)
                ),
            )

    return candidates


def scaled(make: Callable[..., jw.Transform], scales: tuple[float, ...], **axes: Any) -> Method:
    """As `grid`, over scales too: what is added to the base is proportional to them."""

    def candidates(world: World) -> Candidates:
        for label, merged in grid(make, **axes)(world):
            vector = M.task_vector(merged, world.base)
            for scale in scales:
                title = ", ".join(filter(None, (label, f"scale {scale}")))
                yield title, M.add_task_vector(world.base, vector, scale=scale)

    return candidates


def folded(make: Callable[[int], jw.Transform], *, base: bool) -> Method:
    """A method of two models, applied to one model after the other.

    Args:
      make: The transform that gives the next one of n models its equal share.
      base: Whether the transform acts on the base and is given both models.
    """

    def candidates(world: World) -> Candidates:
        merged = world.tuned[0]
        for n, model in enumerate(world.tuned[1:], start=2):
            tree, models = (world.base, [merged, model]) if base else (merged, [model])
            merged = jw.apply(make(n), tree, models=models)
        yield "equal shares", merged

    return candidates


@jax.jit
def calibrated(model: Params, images: jax.Array) -> jw.Stats:
    return jw.calibrate(logits, model, [images], needs=M.regmean_needs(model))


@jax.jit
def fisher_of(model: Params, images: jax.Array) -> Params:
    return M.diagonal_fisher(logits, model, [images], variant="exact", examples_at_once=32)


def regmean(world: World) -> Candidates:
    data = zip(world.tuned, world.train.images, strict=True)
    stats = [calibrated(model, images) for model, images in data]
    for alpha in (0.1, 0.5, 0.9, 1.0):
        tx = M.regmean(stats=stats, alpha=alpha)
        yield f"alpha {alpha}", jw.apply(tx, world.base, models=world.tuned)


def fisher(world: World) -> Candidates:
    data = zip(world.tuned, world.train.images[:, :256], strict=True)
    fishers = [fisher_of(model, images) for model, images in data]
    for normalize, damping in itertools.product(("none", "model", "leaf"), (1e-6, 1e-2, 1.0)):
        tx = M.fisher(fishers=fishers, normalize=normalize, damping=damping)
        merged = jw.apply(tx, world.base, models=world.tuned)
        yield f"normalize {normalize}, damping {damping:g}", merged


def batches(world: World, epochs: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Batches of the validation images, all views of each: `(views, BATCH, 64)` and labels."""
    rng, count = np.random.default_rng(world.seed), len(world.valid.labels)
    images, labels = np.asarray(world.valid.images), np.asarray(world.valid.labels)
    for _ in range(epochs):
        order = rng.permutation(count)
        for i in range(0, count - BATCH + 1, BATCH):
            rows = order[i : i + BATCH]
            yield images[:, rows], labels[rows]


def all_views_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return loss_fn(params, x, jnp.broadcast_to(y, x.shape[:-1]))


@jax.jit
def descend(mix: M.Mixture, x: jax.Array, y: jax.Array) -> Params:
    """The mixture whose coefficients were learned; one program for all seeds."""
    optimizer, start = optax.adam(0.02), mix.full(0.3)

    def step(carry: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        coefficients, state = carry
        grads = jax.grad(lambda c: all_views_loss(mix.merge(c), *batch))(coefficients)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(coefficients, updates), state), None

    coefficients = jax.lax.scan(step, (start, optimizer.init(start)), (x, y))[0][0]
    return mix.merge(coefficients)


def learned(groups: Any) -> Method:
    """Coefficients of a mixture by gradient descent on labelled validation images."""

    def candidates(world: World) -> Candidates:
        mix = M.mixture(world.base, world.tuned, groups=groups)
        yield "", descend(mix, *stacked(list(batches(world, epochs=50))))

    return candidates


def searched(world: World) -> Candidates:
    """Coefficients per model by CMA-ES on the accuracy of the validation images."""
    mix = M.mixture(world.base, world.tuned)
    genome = M.genome({"coefficients": np.full(mix.shape, 0.3)})
    search = M.evolution(
        genome, {"coefficients": np.full(mix.shape, 0.3)}, key=jax.random.key(world.seed)
    )
    score = mix.evaluate(lambda params: accuracies(params, world.valid).mean(), at_once=8)
    for _ in range(25):
        candidates = [genome.decode(x)["coefficients"] for x in search.ask()]
        search.tell(np.asarray(score(np.stack(candidates))).tolist())
    yield "25 generations", mix.merge(jnp.asarray(search.best["coefficients"], jnp.float32))


def learned_soup(world: World) -> Candidates:
    steps = list(batches(world, epochs=15))
    found = M.learned_soup(world.tuned, all_views_loss, steps, epochs=1, optimizer=optax.adam(0.1))
    yield f"{len(steps)} steps", found.params


def adamerging(groups: str) -> Method:
    """Without labels. The base is certain of the views that it gets wrong, which misleads it."""

    def candidates(world: World) -> Candidates:
        steps = [x for x, _ in batches(world, epochs=15)]
        # Fewer steps than the authors' 500 of 1e-3, and longer ones.
        rate = optax.adam(5e-3)
        for start in (0.3, 0.6):
            found = M.adamerging(
                world.base,
                world.tuned,
                logits,
                steps,
                groups=groups,
                start=start,
                optimizer=rate,
            )
            yield f"start {start}, {len(steps)} steps", found.params

    return candidates


def task_methods() -> dict[str, Method]:
    """The rows of the first table."""
    fixed = {
        f"task_arithmetic, scale {scale}": grid(M.task_arithmetic, scale=(scale,))
        for scale in (0.3, 0.5, 1.0)
    }
    densities, chances = (0.1, 0.2, 0.5, 0.8), (0.3, 0.5, 0.8)
    return {
        "mean": grid(M.mean),
        **fixed,
        "task_arithmetic": scaled(M.task_arithmetic, SCALES),
        "ties": scaled(M.ties, SCALES, density=densities),
        "dare_linear": scaled(M.dare_linear, SCALES, density=chances),
        "dare_ties": scaled(M.dare_ties, SCALES, density=chances),
        "breadcrumbs": scaled(M.breadcrumbs, SCALES, density=densities),
        "breadcrumbs_ties": scaled(M.breadcrumbs_ties, SCALES, density=densities),
        "della": scaled(M.della, SCALES, density=chances),
        "della_linear": scaled(M.della_linear, SCALES, density=chances),
        "sce": grid(M.sce, density=(0.1, 0.2, 0.5, 0.8, 1.0)),
        "pcb": scaled(M.pcb, SCALES, density=(0.05, 0.1, 0.3)),
        "slerp, one by one": folded(lambda n: M.slerp(t=1 / n), base=False),
        "nuslerp of deltas, one by one": folded(
            lambda n: M.nuslerp(weights=[n - 1, 1], deltas=True), base=True
        ),
        "karcher": grid(M.karcher, deltas=(False, True)),
        "multislerp": grid(M.multislerp, deltas=(False, True)),
        "model_stock": grid(M.model_stock, group=("leaf", "output")),
        "fisher": fisher,
        "regmean": regmean,
        "tsv": scaled(M.tsv, SCALES),
        "iso_c": scaled(M.iso_c, SCALES),
        "iso_cts": scaled(M.iso_cts, SCALES),
        "adamerging, per model": adamerging("tree"),
        "adamerging, per leaf": adamerging("leaf"),
        "evolution, per model": searched,
        "learned_soup, per leaf": learned_soup,
        "mixture learned, per model": learned("tree"),
        "mixture learned, per leaf": learned("leaf"),
    }


class Row(NamedTuple):
    """One line of a table."""

    setting: str
    values: np.ndarray  # (seeds, columns)


def chosen(
    method: Method, seeds: list[World], views: Callable[[np.ndarray], np.ndarray] = lambda x: x
) -> Row:
    """Chooses each seed's candidate by its mean validation accuracy, and tests that one."""
    labels, values = [], []
    for world in seeds:
        candidates = list(method(world))
        scores = [
            views(np.asarray(accuracies(params, world.valid))).mean() for _, params in candidates
        ]
        label, params = candidates[int(np.argmax(scores))]
        labels.append(label)
        values.append(views(np.asarray(accuracies(params, world.test))))
    return Row(most_common(labels), np.stack(values))


def most_common(labels: list[str]) -> str:
    """What most seeds chose, and how many of them, where they differ."""
    (label, count), *others = collections.Counter(labels).most_common()
    return f"{label} ({count} of {len(labels)})" if others else label


def four_tasks(seeds: list[World]) -> dict[str, Row]:
    only = lambda get: lambda world: iter([("", get(world))])  # noqa: E731
    rows = {"base": chosen(only(lambda world: world.base), seeds)}
    for i, view in enumerate(VIEWS):
        rows[f"fine-tuned: {view}"] = chosen(only(lambda world, i=i: world.tuned[i]), seeds)
    for name, method in task_methods().items():
        rows[name] = chosen(method, seeds)
        show(name)
    rows["trained on all four views"] = chosen(only(lambda world: world.joint), seeds)
    return rows


# Two models: the base and one fine-tune.


def base_and_one(seeds: list[World]) -> dict[str, Row]:
    """Upright view and the fine-tune's own, averaged over the three other views."""
    alphas = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    methods: dict[str, list[tuple[str, jw.Transform]]] = {
        "base": [("", M.interpolate(alpha=0.0))],
        "fine-tuned": [("", M.interpolate(alpha=1.0))],
        "interpolate, halfway": [("", M.interpolate(alpha=0.5))],
        "interpolate": [(f"alpha {a}", M.interpolate(alpha=a)) for a in alphas],
        "slerp": [(f"t {t}", M.slerp(t=t)) for t in alphas],
        "nearswap": [(f"t {t}", M.nearswap(t=t)) for t in (0.01, 0.02, 0.03, 0.05, 0.1)],
        "arcee_fusion": [(f"whisker {w}", M.arcee_fusion(whisker=w)) for w in (0.0, 0.5, 1.5)],
    }
    rows = {}
    for name, transforms in methods.items():
        found = []
        for i in range(1, len(VIEWS)):

            def method(world: World, i: int = i, transforms: Any = transforms) -> Candidates:
                for label, tx in transforms:
                    yield label, jw.apply(tx, world.base, models=[world.tuned[i]])

            found.append(chosen(method, seeds, lambda x, i=i: x[np.array([0, i])]))
        settings = "; ".join(row.setting for row in found) if len(transforms) > 1 else ""
        rows[name] = Row(settings, np.mean([row.values for row in found], axis=0))
        show(f"base and one: {name}")
    return rows


# Twenty fine-tunes of one task.


def soups(seeds: list[World]) -> dict[str, Row]:
    found: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    for world in seeds:
        x, y = np.asarray(world.valid.images[1]), np.asarray(world.valid.labels)
        held_out, test = (Split(s.images[1:2], s.labels) for s in (world.valid, world.test))
        score = lambda params, s=held_out: float(accuracies(params, s)[0])  # noqa: E731
        tested = lambda params, s=test: float(accuracies(params, s)[0])  # noqa: E731
        models, scores = world.soup, [score(model) for model in world.soup]
        singles = [tested(model) for model in models]
        found["worst ingredient"].append(("", min(singles)))
        found["mean of the ingredients"].append(("", float(np.mean(singles))))
        best = int(np.argmax(scores))
        found["best on validation"].append((world.soup_settings[best], singles[best]))
        found["best on test, unknowable"].append(("", max(singles)))
        uniform = jw.apply(M.mean(), models[0], models=models)
        found["uniform soup"].append(("", tested(uniform)))
        greedy, history = M.greedy_soup(models, score, scores=scores)
        kept = sum(step.kept for step in history)
        found["greedy soup"].append((f"{kept} kept", tested(greedy)))
        rng = np.random.default_rng(world.seed)
        steps = [
            (x[rows], y[rows])
            for _ in range(5)
            for rows in rng.permutation(len(y))[: len(y) // BATCH * BATCH].reshape(-1, BATCH)
        ]
        for groups, title in (("tree", "model"), ("leaf", "leaf")):
            learned = M.learned_soup(models, loss_fn, steps, epochs=1, groups=groups)
            found[f"learned soup, per {title}"].append(("", tested(learned.params)))
        scores_of_all = sum(jax.nn.softmax(logits(m, test.images[0])) for m in models)
        right = (scores_of_all.argmax(-1) == test.labels).mean()
        found[f"ensemble of all {len(models)}, at their cost"].append(("", 100 * float(right)))
        show(f"soups of seed {world.seed}")
    settings = {name: [label for label, _ in row] for name, row in found.items()}
    settings["best on validation"] = [""]
    return {
        name: Row(
            "; ".join(settings[name]) if any(settings[name]) else "",
            np.array([[value] for _, value in row]),
        )
        for name, row in found.items()
    }


# Output.


def table(head: str, rows: dict[str, Row], columns: tuple[str, ...]) -> str:
    """Markdown; with several columns, their mean comes first."""
    several = len(columns) > 1
    heads = (("mean", *columns) if several else columns) + ("setting",)
    lines = [f"| {head} | {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1) + "---|"]
    for name, row in rows.items():
        means = row.values.mean(axis=1)
        cells = [f"{means.mean():.1f} ± {means.std():.1f}"]
        cells += [f"{x:.1f}" for x in row.values.mean(axis=0)] if several else []
        lines.append(f"| {name} | {' | '.join(cells)} | {row.setting} |")
    return "\n".join(lines)


def paired(rows: dict[str, Row], first: str, second: str) -> str:
    """The difference of two rows, seed by seed."""
    difference = (rows[first].values - rows[second].values).mean(axis=1)
    return (
        f"- {first} less {second}: {difference.mean():+.1f} ± {difference.std():.1f} points, "
        f"at least as good in {(difference >= 0).sum()} of {len(difference)} seeds"
    )


def report_tasks(rows: dict[str, Row]) -> str:
    learned, fixed = "mixture learned, per leaf", "task_arithmetic"
    return "\n".join(
        [
            "**Four fine-tunes of one base**, % right on the test\n",
            table("weights", rows, tuple(VIEWS)) + "\n",
            paired(rows, "mixture learned, per model", fixed),
            paired(rows, learned, fixed),
            paired(rows, learned, "mean"),
        ]
    )


def report_pair(rows: dict[str, Row]) -> str:
    title = "**The base and one fine-tune**, % right on the test, mean of three views\n"
    return title + "\n" + table("weights", rows, ("upright", "own view"))


def report_soups(rows: dict[str, Row]) -> str:
    lines = ["**Fine-tunes of one task**, % right on the test\n"]
    lines.append(table("weights", rows, ("rotated",)) + "\n")
    learned = ("learned soup, per model", "learned soup, per leaf")
    for name in ("uniform soup", "greedy soup", *learned):
        lines.append(paired(rows, name, "best on validation"))
    for name in learned:
        lines.append(paired(rows, name, "uniform soup"))
    lines.append(paired(rows, "uniform soup", "mean of the ingredients"))
    return "\n".join(lines)


def show(task: str) -> None:
    print(f"{time.perf_counter() - START:7.1f} s  {task}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH} images, per training")
    parser.add_argument("--ingredients", type=int, default=20, help="of a soup")
    parser.add_argument("--soup-images", type=int, default=300, help="that ingredients learn from")
    titles = ("four tasks", "base and one", "soups")
    parser.add_argument("--table", choices=(*titles, "all"), default="all", help="print this one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    seeds = worlds(options)
    found = {}
    for title, run, report in (
        ("four tasks", four_tasks, report_tasks),
        ("base and one", base_and_one, report_pair),
        ("soups", soups, report_soups),
    ):
        if options.table not in (title, "all"):
            continue
        rows = run(seeds)
        found[title] = {
            name: {"setting": row.setting, "values": row.values.tolist()}
            for name, row in rows.items()
        }
        if not options.json:
            print(report(rows), "\n", flush=True)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{options.seeds} seeds; jax {jax.__version__} on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
