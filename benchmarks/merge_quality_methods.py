"""Ways to merge four fine-tunes, as functions of a world that yield candidates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from merge_quality_models import BATCH, Params, World, accuracies, logits, loss_fn, stacked

import jaxweights as jw

M = jw.merge

SCALES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0)

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


def regmean_plus(world: World) -> Candidates:
    data = [[images] for images in world.train.images]
    stages = [f"{name}/.*" for name in sorted(world.base)]
    for alpha in (0.5, 0.9, 1.0):
        merged = M.regmean_plus(logits, world.tuned, data, stages=stages, alpha=alpha)
        yield f"alpha {alpha}", merged


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
        "ram": grid(M.ram, epsilon=(1e-5, 1e-3, 1e-2)),
        "ram_plus": grid(M.ram_plus, epsilon=(1e-5, 1e-3), gain=(0.1, 0.5), most=(0.2, 1.0)),
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
        "regmean_plus": regmean_plus,
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
