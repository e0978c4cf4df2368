"""Tests of TIES and of the table's consensus."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import delta_merge, ties
from jaxweights.merge._delta_tree import Thinning

RNG = np.random.default_rng(0)


def merge(tx, *deltas, **options):
    """The merged delta of models with these deltas to a zero base."""
    deltas = [np.asarray(delta, np.float32) for delta in deltas]
    base = {"w": jnp.zeros(deltas[0].shape)}
    return np.asarray(
        apply(tx, base, models=[{"w": jnp.asarray(d)} for d in deltas], **options)["w"]
    )


def slow_ties(deltas, density, weights):
    """TIES entry by entry, from its description."""
    deltas = [np.asarray(d, np.float64).ravel() for d in deltas]
    n = deltas[0].size
    k = max(round(density * n), 1)
    trimmed = []
    for delta in deltas:
        order = sorted(range(n), key=lambda j, delta=delta: (-abs(delta[j]), j))
        trimmed.append(np.array([delta[j] if j in set(order[:k]) else 0.0 for j in range(n)]))
    merged = np.zeros(n)
    for j in range(n):
        total = sum(w * t[j] for w, t in zip(weights, trimmed))
        sign = 1.0 if total >= 0 else -1.0
        agree = [(w, t[j]) for w, t in zip(weights, trimmed) if np.sign(w * t[j]) == sign]
        if agree:
            merged[j] = sum(w * t for w, t in agree) / sum(abs(w) for w, _ in agree)
    return merged


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 2, 1], [1, -1, 0.3]])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_it_is_what_its_description_says(density, weights):
    deltas = [RNG.normal(size=(6, 7)) for _ in weights]
    got = merge(ties(density=density, weights=weights, scope="leaf"), *deltas)
    want = slow_ties(deltas, density, weights).reshape(6, 7)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_merged_entries_have_the_elected_sign_and_trimmed_ones_stay_at_the_base():
    deltas = [RNG.normal(size=200) for _ in range(3)]
    tops = [np.argsort(-np.abs(d))[:40] for d in deltas]
    trimmed = np.zeros((3, 200))
    for i, top in enumerate(tops):
        trimmed[i, top] = deltas[i][top]
    got = merge(ties(density=0.2, scope="leaf"), *deltas)
    elected = np.sign(trimmed.sum(axis=0))
    assert np.all((got == 0) | (np.sign(got) == elected))
    np.testing.assert_array_equal(got == 0, np.all(trimmed == 0, axis=0))


def test_deltas_that_do_not_overlap_are_all_kept():
    first, second = np.zeros(10), np.zeros(10)
    first[:4], second[6:] = RNG.normal(size=4), RNG.normal(size=4)
    got = merge(ties(density=0.4, scope="leaf"), first, second)
    np.testing.assert_allclose(got, first + second, rtol=1e-6)


def test_opposite_deltas_give_one_of_the_two():
    delta = RNG.normal(size=30)
    for scope in ("leaf", "tree"):
        got = merge(ties(density=1.0, scope=scope), delta, -delta)
        np.testing.assert_allclose(np.abs(got), np.abs(delta), rtol=1e-6)


def test_rescaling_all_weights_changes_nothing():
    deltas = [RNG.normal(size=30) for _ in range(3)]
    first, second = (
        merge(ties(density=0.5, weights=c * np.array([1.0, 0.5, 2.0])), *deltas) for c in (1, 7)
    )
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-7)


def test_the_tree_is_ranked_as_a_whole_and_leaves_by_themselves():
    base = {"large": jnp.zeros(50), "small": jnp.zeros(50)}
    model = {"large": jnp.asarray(10 + RNG.random(50)), "small": jnp.asarray(RNG.random(50))}
    model = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    kept = lambda tx: {k: int((v != 0).sum()) for k, v in apply(tx, base, models=[model]).items()}  # noqa: E731
    assert kept(ties(density=0.3)) == {"large": 30, "small": 0}
    assert kept(ties(density=0.6)) == {"large": 50, "small": 10}
    assert kept(ties(density=0.3, scope="leaf")) == {"large": 15, "small": 15}
    assert kept(ties(density=0.3, compat="mergekit")) == {"large": 15, "small": 15}


@pytest.mark.parametrize("scope", ["leaf", "tree"])
@pytest.mark.parametrize("n", [1, 2, 5, 33])
@pytest.mark.parametrize("density", [1e-3, 0.25, 0.5, 0.9])
def test_exactly_the_stated_number_survives_even_when_all_tie(scope, n, density):
    kept = np.flatnonzero(merge(ties(density=density, scope=scope), np.ones(n)))
    # Halves round to even; at least one entry survives; ties go to the lowest index.
    np.testing.assert_array_equal(kept, np.arange(max(round(density * n), 1)))


def test_ties_across_leaves_go_to_the_earlier_leaf():
    base = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    got = apply(ties(density=0.75), base, models=[jax.tree.map(jnp.ones_like, base)])
    np.testing.assert_array_equal(np.concatenate([got["a"], got["b"]]), [1] * 6 + [0] * 2)


def test_a_sum_of_zero_takes_the_sign_of_the_majority_or_plus():
    first, second = [1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]
    majority = merge(ties(density=1.0, scope="tree"), first, second)
    positive = merge(ties(density=1.0, scope="leaf"), first, second)
    np.testing.assert_array_equal(majority, [-1, -2, -3])
    np.testing.assert_array_equal(positive, [1, -2, -3])
    row = {"sparsifier": "magnitude", "consensus": "sum", "normalize": "entries"}
    stated = merge(delta_merge(**row, sign_ties="majority"), first, second)
    np.testing.assert_array_equal(stated, [-1, -2, -3])


def test_a_negative_weight_keeps_its_sign_where_entries_are_normalised():
    got = merge(ties(density=1.0, weights=[-1.0]), [0.3, -0.2])
    np.testing.assert_allclose(got, [-0.3, 0.2], rtol=1e-6)


def test_ways_to_combine():
    deltas = ([4.0, 1.0], [2.0, -3.0], [0.0, -1.0])
    np.testing.assert_array_equal(merge(ties(density=1.0), *deltas), [3, -2])
    np.testing.assert_array_equal(merge(ties(density=1.0, combine="sum"), *deltas), [6, -4])
    np.testing.assert_array_equal(merge(ties(density=1.0, combine="max"), *deltas), [4, -3])


def test_density_zero_drops_all():
    assert np.all(merge(ties(density=0.0), RNG.normal(size=9)) == 0)


def test_tiny_deltas_are_rescaled_exactly_where_absolute_guards_would_fire():
    delta = 1e-25 * RNG.normal(size=100)  # squares vanish in float32
    tx = delta_merge(sparsifier="magnitude", density=0.5, rescale="l2")
    got = merge(tx, delta)
    np.testing.assert_allclose(np.linalg.norm(got.astype(float)), np.linalg.norm(delta), rtol=1e-5)


@pytest.mark.parametrize("compat, counts", [("paper", (1, 4)), ("mergekit", (0, 3))])
def test_counts_are_rounded_as_stated(compat, counts):
    # 0.6 of an outlier and 3.6 kept entries.
    assert Thinning(0.6, 0.1, 1.0).counts(6, 0.6, compat) == counts


@pytest.mark.parametrize(
    "options, words",
    [
        ({"density": 0.5}, "density=0.5 has no effect without a sparsifier"),
        ({"sparsifier": "magnitude", "density": 1.5}, r"density=1.5 must lie in \[0, 1\]"),
        ({"sparsifier": "magnitude", "density": [0.5, -1]}, r"must lie in \[0, 1\]"),
        ({"sparsifier": "magnitude", "outliers": 0.1}, "goes with sparsifier='outliers' only"),
        ({"sparsifier": "magnitude", "trim": 0.1}, "goes with sparsifier='bernoulli' only"),
        ({"sparsifier": "top"}, "sparsifier='top' is not one of 'none', 'magnitude'"),
        ({"scope": "column"}, "scope='column' is not one of 'row', 'leaf', 'tree'"),
        (
            {"sparsifier": "bernoulli", "density": 0.0, "rescale": "inverse_density"},
            "density=0 cannot be rescaled by its inverse",
        ),
        ({"scale": np.inf}, "scale=inf must be finite"),
        ({"weights": [0.0, 0.0], "normalize": "models"}, "cannot be normalised"),
    ],
)
def test_settings_are_checked_when_built(options, words):
    with pytest.raises(ValueError, match=words):
        delta_merge(**options)


def test_unknown_keywords_and_ways_are_refused():
    with pytest.raises(TypeError, match="densty"):
        ties(densty=0.5)
    with pytest.raises(ValueError, match="combine='median' is not one of 'mean', 'sum', 'max'"):
        ties(combine="median")
