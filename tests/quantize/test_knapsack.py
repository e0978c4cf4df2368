"""The knapsack: as good as trying everything, never a byte too much."""

import itertools

import numpy as np
import pytest

from jaxweights.quantize._knapsack import Option, convex_front, pick_of, solve


def draw(seed, items=5, options=4, scale=1):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 30, (items, options)) * scale
    errors = np.exp(rng.normal(size=(items, options)) * 3)
    return [[Option(int(s), float(e)) for s, e in zip(*row)] for row in zip(sizes, errors)]


def everything(items):
    return [pick_of(items, chosen) for chosen in itertools.product(*(range(len(i)) for i in items))]


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_trying_everything_finds_and_proves_it(seed):
    items = draw(seed, scale=(1, 7, 1_000_003)[seed % 3])
    picks = everything(items)
    sizes = sorted({pick.size for pick in picks})
    for budget in (*sizes[:: len(sizes) // 7], sizes[-1], sizes[len(sizes) // 2] - 1):
        best, bound = solve(items, budget)
        expected = min(pick.error for pick in picks if pick.size <= budget)
        assert best.size <= budget
        assert best.error == pytest.approx(expected, rel=1e-9)
        assert bound <= best.error
        assert bound == pytest.approx(best.error, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_the_lower_hull_of_everything(seed):
    items = draw(seed)
    front = convex_front(items)
    picks = everything(items)
    assert all(a.size < b.size and a.error > b.error for a, b in itertools.pairwise(front))
    slopes = [(a.error - b.error) / (b.size - a.size) for a, b in itertools.pairwise(front)]
    assert slopes == sorted(slopes, reverse=True)
    assert front[0].size == min(pick.size for pick in picks)
    assert front[-1].error == pytest.approx(min(pick.error for pick in picks))
    for slope in slopes:  # no choice is cheaper at the price that the step pays
        prices = [pick.error + slope * pick.size for pick in picks]
        at = min(point.error + slope * point.size for point in front)
        assert at == pytest.approx(min(prices), rel=1e-9)


def test_two_hundred_leaves_with_real_sizes_are_solved_exactly():
    items = draw(0, items=200, options=8, scale=65_537)
    front = convex_front(items)
    budget = (front[100].size + front[101].size) // 2 + 12_345
    best, bound = solve(items, budget)
    assert best.size <= budget and best.error <= front[100].error
    assert (best.error - bound) / best.error < 1e-5


def test_single_options_and_exact_budgets():
    items = [[Option(3, 1.0)], [Option(4, 0.0), Option(5, 0.0)]]
    assert solve(items, 7) == (pick_of(items, [0, 0]), 1.0)
    assert [pick.size for pick in convex_front(items)] == [7]
