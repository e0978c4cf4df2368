"""The multiple-choice knapsack: one option for each item, within a budget, with the least error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RETRIES = 8


class Option(NamedTuple):
    """One way to treat an item."""

    size: int
    error: float


class Pick(NamedTuple):
    """An option for every item.

    Attributes:
      options: Position of each item's option.
      size: Sum of their sizes.
      error: Sum of their errors.
    """

    options: tuple[int, ...]
    size: int
    error: float


Items = Sequence[Sequence[Option]]


def pick_of(items: Items, options: Sequence[int]) -> Pick:
    """The sums of a choice."""
    chosen = [item[i] for item, i in zip(items, options, strict=True)]
    return Pick(tuple(options), sum(o.size for o in chosen), math.fsum(o.error for o in chosen))


def convex_front(items: Items) -> list[Pick]:
    """All choices that are best for some price of a byte, the smallest first.

    Each item moves along the lower convex hull of its options. Taking all the hulls' steps in the
    order of error saved per byte gives the vertices of the lower convex hull of all choices.

    Args:
      items: Options of each item.

    Returns:
      Choices of ascending size and descending error.

    Example:
      >>> items = [[Option(1, 9.0), Option(2, 1.0)], [Option(1, 5.0), Option(3, 4.0)]]
      >>> [(pick.size, pick.error) for pick in convex_front(items)]
      [(2, 14.0), (3, 6.0), (5, 5.0)]
    """
    steps = []
    current = []
    for number, item in enumerate(items):
        hull = _hull(item)
        current.append(hull[0])
        for old, new in itertools.pairwise(hull):
            saved = (item[old].error - item[new].error) / (item[new].size - item[old].size)
            steps.append((-saved, number, new))
    front = [pick_of(items, current)]
    for _, number, new in sorted(steps):
        current[number] = new
        front.append(pick_of(items, current))
    return front


def solve(items: Items, budget: int) -> tuple[Pick, float]:
    """The choice of the least error within a budget, and a proven lower bound of any.

    Args:
      items: Options of each item; sizes are non-negative integers, errors finite.
      budget: The most that sizes may sum to; at least the sum of the least sizes.

    Returns:
      The choice, and the bound: equal but for rounding where the search was completed.

    Source: The integer program is solved by branch and cut (HiGHS, through SciPy).
    """
    front = convex_front(items)
    start = max((pick for pick in front if pick.size <= budget), key=lambda pick: pick.size)
    if start is front[-1]:
        return start, start.error
    found, bound = _branch_and_cut(items, budget)
    best = min((found, start), key=lambda pick: pick.error) if found else start
    return best, min(bound, best.error)


def _hull(item: Sequence[Option]) -> list[int]:
    """Positions of the options on the lower convex hull, the smallest first."""
    order = sorted(range(len(item)), key=lambda i: (item[i].size, item[i].error))
    hull: list[int] = []
    for i in order:
        if hull and item[i].error >= item[hull[-1]].error:
            continue  # larger and no better
        while len(hull) > 1 and _above(item[hull[-2]], item[hull[-1]], item[i]):
            hull.pop()
        hull.append(i)
    return hull


def _above(first: Option, middle: Option, last: Option) -> bool:
    """Whether the middle option lies on or above the line between the others."""
    to_middle = (first.error - middle.error) * (last.size - first.size)
    to_last = (first.error - last.error) * (middle.size - first.size)
    return to_middle <= to_last


def _branch_and_cut(items: Items, budget: int) -> tuple[Pick | None, float]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [option for item in items for option in item]
    owner = np.repeat(np.arange(len(items)), [len(item) for item in items])
    sizes = np.asarray([option.size for option in flat], np.float64)
    errors = np.asarray([option.error for option in flat], np.float64)
    # Of size about one, so that the solver's absolute tolerances mean something.
    unit = max(float(pick_of(items, _hull_ends(items)).error), float(np.finfo(np.float64).tiny))
    one_each = csr_array(
        (np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(items), len(flat))
    )
    common = float(np.gcd.reduce(sizes.astype(np.int64)) or 1)
    room = budget // common
    bound = -math.inf
    for _ in range(_RETRIES):
        result = milp(
            errors / unit * 1e4,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(sizes[None] / common), -np.inf, room),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            return None, bound
        if bound == -math.inf:
            bound = float(result.mip_dual_bound) * unit / 1e4
        chosen = np.flatnonzero(result.x > 0.5)
        starts = np.cumsum([0, *(len(item) for item in items)])[:-1]
        pick = pick_of(items, [int(c - s) for c, s in zip(chosen, starts, strict=True)])
        if pick.size <= budget:
            return pick, bound
        # The solver lets a sum exceed its limit by a rounding; bytes are exact here.
        room -= math.ceil((pick.size - budget) / common)
    return None, bound


def _hull_ends(items: Items) -> list[int]:
    """The smallest option of every item."""
    return [_hull(item)[0] for item in items]
