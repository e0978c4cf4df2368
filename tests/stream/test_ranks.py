"""Thresholds found slice by slice are those of the whole, ties and all."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.stream._jobs import Job
from jaxweights.stream._ranks import _ALL, _TOP, RankSurvey, Target, among

JOB = Job("w", (0,), np.dtype(np.float32), ())


def _values(arrays, model):
    del model
    return arrays[1]


def _select(values, k, piece):
    """Marks the `k` largest magnitudes with a survey of pieces."""
    target = Target(0, k)
    survey = RankSurvey(_values, [target], values.size)
    starts = range(0, values.size, piece)
    again = True
    passes = 0
    while again:
        for start in starts:
            part = values[start : start + piece]
            padded = jnp.asarray(np.pad(part, (0, piece - part.size)))
            seen = survey.look(JOB, start, part.size, [padded, padded])
            survey.add(JOB, start, seen)
        again = survey.decide()
        passes += 1
    marks = []
    for start in starts:
        part = values[start : start + piece]
        bound = survey.bound(target, JOB, start, [part, part])
        bound = np.array(bound, np.int64).astype(np.uint32)
        marks.append(np.asarray(among(jnp.asarray(part), jnp.asarray(bound))))
    return np.concatenate(marks), passes


def _largest(values, k):
    """The definition: by falling magnitude, equal ones in their order."""
    order = np.argsort(-np.abs(values), kind="stable")
    mask = np.zeros(values.size, bool)
    mask[order[:k]] = True
    return mask


def _draws(kind, n):
    draw = np.random.default_rng(0)
    if kind == "normal":
        return draw.normal(size=n).astype(np.float32)
    if kind == "few levels":
        return draw.integers(-4, 5, n).astype(np.float32)
    if kind == "all equal":
        return np.ones(n, np.float32)
    if kind == "mostly zero":
        return np.where(draw.random(n) < 0.99, 0, draw.normal(size=n)).astype(np.float32)
    if kind == "rare between":  # no sampled entry is one of the six between the two levels
        others = np.repeat(np.float32([1, 3]), [n - n // 2 - 3, n // 2 - 3])
        return np.insert(draw.permutation(others), 60 * np.arange(6) + 1, 2)
    # A sample of every 61st entry sees nothing but the smallest.
    values = draw.normal(size=n).astype(np.float32)
    values[::61] *= 1e-6
    return values


KINDS = ["normal", "few levels", "all equal", "mostly zero", "rare between", "misleading sample"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, piece", [(1000, 1024), (50_000, 65536), (50_000, 16384)])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.3, 0.5, 0.999, 1.0])
def test_exactly_the_largest_are_marked_and_ties_in_their_order(kind, n, piece, share):
    values = _draws(kind, n)
    k = round(share * n) or (1 if share else 0)
    marked, _ = _select(values, k, piece)
    np.testing.assert_array_equal(marked, _largest(values, k))


@pytest.mark.parametrize("kind", ["few levels", "all equal", "mostly zero"])
@pytest.mark.parametrize("share", [0.004, 0.3, 0.6, 0.9])
def test_ties_end_in_any_run_of_a_slice(kind, share):
    values = _draws(kind, 700_000)
    k = round(share * values.size)
    marked, passes = _select(values, k, 1 << 19)
    np.testing.assert_array_equal(marked, _largest(values, k))
    assert passes == 2


def test_a_misleading_sample_costs_another_pass_and_nothing_else():
    values = _draws("misleading sample", 50_000)
    _, passes = _select(values, 25_000, 65536)
    _, usual = _select(_draws("normal", 50_000), 25_000, 65536)
    assert passes > usual == 2


@pytest.mark.parametrize(
    "bound, kept",
    [
        ((0, _ALL), [True] * 6),
        ((_TOP, -1), [False] * 6),
        ((_TOP, _ALL), [False] * 6),  # no magnitude has such a pattern
        ((0x3F800000, -1), [False, False, True, False, True, True]),
        ((0x3F800000, 1), [False, True, True, False, True, True]),
        ((0x7FFFFFFF, 5), [False] * 5 + [True]),
    ],
)
def test_a_bound_parts_the_first_of_equal_magnitudes_from_the_others(bound, kept):
    largest = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]
    values = np.array([0, -1, 2, 1, -np.inf, largest], np.float32)
    found = among(jnp.asarray(values), jnp.asarray(np.array(bound, np.int64).astype(np.uint32)))
    np.testing.assert_array_equal(found, kept)
