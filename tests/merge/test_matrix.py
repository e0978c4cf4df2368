"""What every way to merge keeps, a cell for each method and invariant.

The rows are those of the contract's registry, so that a new method cannot be left out; a cell that
does not hold says why, and is shown not to hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core import apply
from tests.contract.registry import CASES
from tests.merge._trees import ULP, copy, finetuned, floats, tree

M = jw.merge
KEY = jax.random.key(0)
BASE = tree(0)

# The cells that differ from a plain "it holds".


@dataclasses.dataclass(frozen=True)
class Not:
    """Does not hold, by the method's definition."""

    why: str


@dataclasses.dataclass(frozen=True)
class Refused:
    """Is an error, with these words."""

    words: str


@dataclasses.dataclass(frozen=True)
class Absent:
    """The method has nothing to set there."""

    why: str


HOLDS = "holds"
UNSCALED = Absent("no scale of the merged delta")
LATER = Not("later models count more")
ONE = Absent("one model")
Invariant = Literal["copies", "base", "order", "zero scale", "alone", "sizes"]
INVARIANTS: tuple[Invariant, ...] = ("copies", "base", "order", "zero scale", "alone", "sizes")


@dataclasses.dataclass(frozen=True)
class Row:
    """A method: how to build it, and the cells in which it differs.

    Args:
      make: The factory.
      usual: Settings with which it drops or bends what it is made to.
      whole: Settings with which it keeps everything, and its weights sum to one.
      alone: Settings with which one model takes the base's place, where they differ from `whole`.
      models: How many models it merges here.
      deltas: Whether what it adds to the base is made of differences to it.
      exact: Whether it only adds up entries; others take norms, angles or solve systems.
      data: Settings made of statistics, by the models' numbers in their order.
      weighted: Whether models have weights.
      cells: Where it does not simply hold.
    """

    make: Callable[..., jw.Transform]
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    whole: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alone: Mapping[str, Any] | None = None
    models: int = 3
    deltas: bool = True
    exact: bool = False
    data: Callable[[list[int]], dict[str, Any]] = lambda ids: {}
    weighted: bool = True
    cells: Mapping[Invariant, Any] = dataclasses.field(default_factory=dict)

    def build(self, ids: list[int], **settings: Any) -> jw.Transform:
        """The transform for models of these numbers."""
        return self.make(**self.data(ids), names=[f"model {i}" for i in ids], **settings)


def _fishers(ids: list[int]) -> dict[str, Any]:
    return {"fishers": [jax.tree.map(jnp.square, tree(10 + i)) for i in ids]}


def _stats(ids: list[int]) -> dict[str, Any]:
    stats = []
    for i in ids:
        x = jnp.asarray(np.random.default_rng(i).normal(size=(20, 7)), jnp.float32)
        stats.append(jw.Stats({"dense/kernel": {"gram": x.T @ x, "count": jnp.int32(20)}}))
    return {"stats": stats}


ROWS: dict[str, Row] = {
    "mean": Row(M.mean, deltas=False, exact=True, cells={"zero scale": UNSCALED}),
    "ema": Row(
        M.ema,
        {"decay": 0.5},
        {"decay": 0.5},
        deltas=False,
        exact=True,
        weighted=False,
        cells={"order": LATER, "zero scale": UNSCALED},
    ),
    "lawa": Row(
        M.lawa,
        {"last": 2},
        {"last": 3},
        {"last": 1},
        deltas=False,
        exact=True,
        weighted=False,
        cells={"order": LATER, "zero scale": UNSCALED},
    ),
    "interpolate": Row(
        M.interpolate,
        {"alpha": 0.3},
        {"alpha": 0.3},
        {"alpha": 1.0},
        models=1,
        deltas=False,
        exact=True,
        weighted=False,
        cells={"order": ONE, "zero scale": Absent("alpha=0 is its own test")},
    ),
    "task_arithmetic": Row(M.task_arithmetic, whole={"normalize": True}, exact=True),
    "delta_merge": Row(M.delta_merge, whole={"normalize": "models"}, exact=True),
    "ties": Row(M.ties, {"density": 0.4}, {"density": 1.0}, exact=True),
    "dare_linear": Row(
        M.dare_linear, {"density": 0.4}, {"density": 1.0, "normalize": True}, exact=True
    ),
    "dare_ties": Row(M.dare_ties, {"density": 0.6, "trim": 0.5}, {"density": 1.0}, exact=True),
    "breadcrumbs": Row(
        M.breadcrumbs,
        {"density": 0.4, "outliers": 0.1},
        {"density": 1.0, "normalize": True},
        exact=True,
    ),
    "breadcrumbs_ties": Row(
        M.breadcrumbs_ties,
        {"density": 0.4, "outliers": 0.1},
        {"density": 1.0, "normalize": True},
        exact=True,
    ),
    "della": Row(M.della, {"density": 0.5, "epsilon": 0.3}, {"density": 1.0}, exact=True),
    "della_linear": Row(
        M.della_linear, {"density": 0.5}, {"density": 1.0, "normalize": True}, exact=True
    ),
    "sce": Row(
        M.sce,
        {"density": 0.5},
        weighted=False,
        cells={"zero scale": UNSCALED},
    ),
    "pcb": Row(
        M.pcb,
        {"density": 0.3},
        {"density": 1.0},
        cells={
            "copies": Not("scores reach from 0, which leaves an entry at the base"),
            "alone": Not("scores reach from 0, which leaves an entry at the base"),
            "sizes": Not("scores are of tanh of products of deltas"),
        },
    ),
    "ram": Row(
        M.ram, {"epsilon": 0.0}, {"epsilon": 0.0}, weighted=False, cells={"zero scale": UNSCALED}
    ),
    "ram_plus": Row(
        M.ram_plus,
        {"epsilon": 0.0},
        {"epsilon": 0.0},
        weighted=False,
        cells={"zero scale": UNSCALED},
    ),
    "nearswap": Row(
        M.nearswap,
        {"t": 0.01},
        {"t": 0.01},
        {"t": 1e6},
        models=1,
        exact=True,
        weighted=False,
        cells={
            "order": ONE,
            "zero scale": UNSCALED,
            "sizes": Not("its threshold is in units of the weights"),
        },
    ),
    "arcee_fusion": Row(
        M.arcee_fusion,
        whole={"whisker": -1e6},
        models=1,
        weighted=False,
        cells={
            "order": ONE,
            "zero scale": UNSCALED,
            "sizes": Not("a softmax over the weights ranks them"),
        },
    ),
    "slerp": Row(
        M.slerp,
        {"t": 0.3},
        {"t": 0.3},
        {"t": 1.0},
        models=1,
        deltas=False,
        weighted=False,
        cells={"order": ONE, "zero scale": UNSCALED},
    ),
    "nuslerp": Row(
        M.nuslerp,
        {"deltas": True},
        {"deltas": True},
        models=2,
        cells={"zero scale": UNSCALED, "alone": Refused("1 model was given")},
    ),
    "karcher": Row(M.karcher, {"deltas": True}, deltas=True, cells={"zero scale": UNSCALED}),
    "multislerp": Row(M.multislerp, {"deltas": True}, cells={"zero scale": UNSCALED}),
    "model_stock": Row(
        M.model_stock,
        weighted=False,
        cells={"zero scale": UNSCALED, "alone": Refused("at least 2")},
    ),
    "fisher": Row(M.fisher, data=_fishers, deltas=False, cells={"zero scale": UNSCALED}),
    "regmean": Row(M.regmean, data=_stats, deltas=False, cells={"zero scale": UNSCALED}),
    "tsv": Row(M.tsv, cells={"copies": Not("each delta keeps a third of its directions")}),
    "iso_c": Row(
        M.iso_c,
        cells={
            "copies": Not("singular values become equal"),
            "alone": Not("singular values become equal"),
        },
    ),
    "iso_cts": Row(
        M.iso_cts,
        {"common": 0.5},
        {"common": 0.5},
        cells={
            "copies": Not("singular values become equal"),
            "alone": Not("singular values become equal"),
        },
    ),
}


def test_every_method_has_a_row():
    registered = {case.name.split()[0].removeprefix("merge.") for case in CASES
                  if case.name.startswith("merge.")}  # fmt: skip
    assert set(ROWS) == registered


def check(cell: Any, merged: Callable[[], dict], want: dict, exact: bool) -> None:
    """What is merged equals what is wanted, or the cell says how it does not."""
    if isinstance(cell, Refused):
        with pytest.raises(ValueError, match=cell.words):
            merged()
        return
    got = merged()
    off = 0.0
    for ours, theirs in zip(floats(got), floats(want), strict=True):
        if exact:  # some steps at the size of the numbers, which reach 4
            off = max(off, float(np.abs(ours - theirs).max()) / (4 * 2 * ULP))
        else:
            length = float(np.linalg.norm(theirs)) or 1.0
            off = max(off, float(np.linalg.norm(ours - theirs)) / length / 1e-5)
    if isinstance(cell, Not):
        assert off > 1, f"it does hold: {cell.why}"
    else:
        assert off <= 1


MODELS = {i: finetuned(BASE, i) for i in (1, 2, 3)}
CELLS = [
    pytest.param(name, invariant, id=f"{name}-{invariant}")
    for name, row in ROWS.items()
    for invariant in INVARIANTS
    if not isinstance(row.cells.get(invariant), Absent)
]


@pytest.mark.parametrize("name, invariant", CELLS)
def test_the_cell_is_as_the_table_says(name, invariant):
    row = ROWS[name]
    ids = list(MODELS)[: row.models]
    models = [MODELS[i] for i in ids]
    cell = row.cells.get(invariant, HOLDS)

    def merge(base: dict, trees: list[dict], ids: list[int] = ids, **settings: Any) -> dict:
        return apply(row.build(ids, **settings), base, models=trees, key=KEY)

    if invariant == "copies":
        # What goes from the tree to a model has the tree for its other model.
        start = MODELS[1] if row.models == 1 else BASE
        trees = [copy(MODELS[1]) for _ in ids]
        check(cell, lambda: merge(start, trees, **row.whole), MODELS[1], row.exact)
    elif invariant == "base":
        check(cell, lambda: merge(BASE, [copy(BASE) for _ in ids], **row.usual), BASE, row.exact)
    elif invariant == "order":
        weights = [0.5, 1.5, 1.0][: len(ids)]
        given = {"weights": weights} if row.weighted else {}
        turned = {"weights": weights[::-1]} if row.weighted else {}
        want = merge(BASE, models, **row.usual, **given)
        assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(floats(want), floats(BASE)))
        merged = lambda: merge(BASE, models[::-1], ids[::-1], **row.usual, **turned)  # noqa: E731
        check(cell, merged, want, row.exact)
    elif invariant == "zero scale":
        check(cell, lambda: merge(BASE, models, **row.usual, scale=0.0), BASE, row.exact)
    elif invariant == "alone":
        settings = row.whole if row.alone is None else row.alone
        check(cell, lambda: merge(BASE, models[:1], ids[:1], **settings), MODELS[1], row.exact)
    else:
        thrice = lambda t: jax.tree.map(lambda x: 3 * x, t)  # noqa: E731
        # A base of zero leaves the merged delta alone; other methods scale with the base, too.
        start = jax.tree.map(jnp.zeros_like, BASE) if row.deltas else tree(7)
        trees = [tree(i) for i in ids]
        want = thrice(merge(start, trees, **row.usual))
        check(cell, lambda: merge(thrice(start), thrice(trees), **row.usual), want, False)


def test_what_has_no_scale_takes_none():
    unscaled = [name for name, row in ROWS.items() if row.cells.get("zero scale") == UNSCALED]
    assert unscaled
    for name in unscaled:
        with pytest.raises(TypeError, match="scale"):
            ROWS[name].build([1], **ROWS[name].usual, scale=0.0)
