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
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from merge_quality_methods import Candidates, Method, task_methods
from merge_quality_models import (
    BATCH,
    VIEWS,
    Split,
    World,
    accuracies,
    logits,
    loss_fn,
    show,
    worlds,
)

import jaxweights as jw

M = jw.merge


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
