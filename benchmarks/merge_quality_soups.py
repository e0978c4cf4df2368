"""Soups of twenty fine-tunes that differ in their hyperparameters."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterator

import jax
import numpy as np
from merge_quality_images import SETS, Kitchen, kitchens
from merge_quality_models import BATCH, Params, Split, accuracies, logits, loss_fn, show
from scipy import stats

import jaxweights as jw

M = jw.merge

Rows = dict[str, np.ndarray]  # (seeds, ways of the test), upright first
EPOCHS = 5  # over the images to choose by, of learned soups


def tested(kitchen: Kitchen, params: Params) -> np.ndarray:
    return np.array([float(accuracies(params, s)[0]) for s in kitchen.task.test.values()])


def ensemble(models: list[Params], split: Split) -> float:
    """Percent right of the mean of all models' probabilities."""
    total = sum(jax.nn.softmax(logits(model, split.images[0])) for model in models)
    return 100 * float((total.argmax(-1) == split.labels).mean())


def batches(split: Split, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng, x, y = np.random.default_rng(seed), np.asarray(split.images[0]), np.asarray(split.labels)
    for _ in range(EPOCHS):
        order = rng.permutation(len(y))
        for i in range(0, len(y) - BATCH + 1, BATCH):
            yield x[order[i : i + BATCH]], y[order[i : i + BATCH]]


def rows_of(kitchen: Kitchen) -> tuple[dict[str, np.ndarray], int]:
    """Accuracies of one seed, and how many models the greedy soup kept."""
    models, valid = kitchen.ingredients, kitchen.task.valid
    score = lambda params: float(accuracies(params, valid)[0])  # noqa: E731
    scores = [score(model) for model in models]
    singles = np.stack([tested(kitchen, model) for model in models])
    greedy, history = M.greedy_soup(models, score, scores=scores)
    steps = list(batches(valid, kitchen.task.seed))
    learned = {
        title: M.learned_soup(models, loss_fn, steps, epochs=1, groups=groups).params
        for title, groups in (("model", "tree"), ("leaf", "leaf"))
    }
    found = {
        "base": tested(kitchen, kitchen.base),
        "base with a new head": tested(kitchen, kitchen.probed),
        "worst ingredient": singles.min(axis=0),
        "mean of the ingredients": singles.mean(axis=0),
        "best on validation": singles[int(np.argmax(scores))],
        "best on each test, unknowable": singles.max(axis=0),
        "uniform soup": tested(kitchen, jw.apply(M.mean(), models[0], models=models)),
        "greedy soup": tested(kitchen, greedy),
    }
    found |= {f"learned soup, per {t}": tested(kitchen, params) for t, params in learned.items()}
    found[f"ensemble of all {len(models)}, at their cost"] = np.array(
        [ensemble(models, split) for split in kitchen.task.test.values()]
    )
    return found, sum(step.kept for step in history)


def soups(options: argparse.Namespace) -> dict[str, Rows]:
    """By image set."""
    found: dict[str, Rows] = {}
    for name, seeds in kitchens(options).items():
        gathered = collections.defaultdict(list)
        kept = []
        for kitchen in seeds:
            rows, count = rows_of(kitchen)
            kept.append(count)
            for title, values in rows.items():
                gathered[title].append(values)
            show(f"soups of {name}, seed {kitchen.task.seed}")
        found[name] = {title: np.stack(values) for title, values in gathered.items()}
        show(f"greedy soups of {name} kept {kept}")
    return found


# Output.


def table(rows: Rows, ways: tuple[str, ...]) -> str:
    heads = ("upright", "shifted, mean", *ways[1:])
    lines = [f"| weights | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, values in rows.items():
        pair = (values[:, 0], values[:, 1:].mean(axis=1))
        cells = [f"{x.mean():.2f} ± {x.std():.2f}" for x in pair]
        cells += [f"{x:.1f}" for x in values[:, 1:].mean(axis=0)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(x: np.ndarray) -> str:
    """The mean and its 95 % interval by Student's t, over seeds."""
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
    return f"{x.mean():+.2f} ± {half:.2f}"


def paired(rows: Rows, first: str, second: str) -> str:
    """Differences seed by seed: what all rows of a seed share does not count."""
    difference = rows[first] - rows[second]
    upright, others = difference[:, 0], difference[:, 1:].mean(axis=1)
    return (
        f"| {first} less {second} | {interval(upright)} | {interval(others)} | "
        f"{(upright >= 0).sum()} and {(others >= 0).sum()} of {len(upright)} |"
    )


def report_soups(found: dict[str, Rows]) -> str:
    ways = ("upright", "turned", "with noise", "moved")
    lines = []
    for name in SETS:
        rows = found[name]
        lines += [f"**Twenty fine-tunes of one base on {name}**, % right on the test\n"]
        lines += [table(rows, ways), ""]
        lines += ["| points, mean ± 95 % interval | upright | shifted | no worse in seeds |"]
        lines += ["|---|---:|---:|---:|"]
        best, uniform = "best on validation", "uniform soup"
        learned = ("learned soup, per model", "learned soup, per leaf")
        lines += [paired(rows, soup, best) for soup in (uniform, "greedy soup", *learned)]
        lines += [paired(rows, soup, uniform) for soup in learned]
        lines += [paired(rows, uniform, "mean of the ingredients"), ""]
    return "\n".join(lines)
