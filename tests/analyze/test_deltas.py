"""Tests of deltas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.analyze import deltas
from jaxweights.core import Layout
from jaxweights.weights import Axes, Masked


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(base, models, density=None):
    """The definitions, entry by entry in float64, of one matrix."""
    base = np.asarray(base, np.float64).ravel()
    moved = [np.asarray(model, np.float64).ravel() - base for model in models]
    norms = [np.sqrt(sum(d * d for d in delta)) for delta in moved]
    cosine = [
        [sum(a * b for a, b in zip(x, y, strict=True)) / m / n for y, n in zip(moved, norms)]
        for x, m in zip(moved, norms)
    ]
    conflicts = sum(max(entry) > 0 > min(entry) for entry in zip(*moved, strict=True))
    kept = None
    if density is not None:
        k = max(round(density * base.size), 1)
        kept = [sum(sorted(d * d for d in delta)[-k:]) / n**2 for delta, n in zip(moved, norms)]
    return (
        np.array(norms) / np.sqrt(sum(b * b for b in base)),
        np.array(cosine),
        conflicts / base.size,
        kept,
    )


def check(got, want, rtol=2e-6):
    for ours, theirs in zip(got, want, strict=True):
        # A cosine near 0 is a difference of large sums: its error is absolute.
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", [(), (7,), (30, 21), (3, 5, 4, 6)])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_numbers_are_what_their_definitions_say(shape, density):
    base, *models = (normal(*shape, seed=i) for i in range(4))
    got = deltas({"w": base}, [{"w": m} for m in models], density=density)["w"]
    check(got, oracle(base, models, density))


def test_stacked_layers_are_compared_one_by_one():
    base, first, second = (normal(3, 6, 2, 4, seed=i) for i in range(3))
    layout = Layout.of({"w": Axes(inputs=(-3,), outputs=(-2, -1))})
    got = deltas({"w": base}, [{"w": first}, {"w": second}], layout=layout, density=0.5)["w"]
    assert got.cosine.shape == (3, 2, 2) and got.sign_conflict.shape == (3,)
    for i in range(3):
        check([field[i] for field in got], oracle(base[i], [first[i], second[i]], 0.5))


def test_each_model_has_its_own_density():
    base, first, second = (normal(8, 8, seed=i) for i in range(3))
    trees = [{"w": first}, {"w": second}]
    got = deltas({"w": base}, trees, density=[0.1, 0.7])["w"].kept_energy
    for i, density in enumerate((0.1, 0.7)):
        np.testing.assert_allclose(got[i], oracle(base, [first, second], density)[3][i], rtol=1e-6)


def test_ties_at_the_threshold_count_once_each():
    moved = np.array([1, -1, 1, 1, 0, 2], np.float32)
    got = deltas({"w": np.zeros(6, np.float32)}, [{"w": moved}], density=0.5)["w"]
    assert float(got.kept_energy[0]) == 0.75  # 4 + 1 + 1 of 8


def test_opposite_deltas_conflict_everywhere_and_equal_ones_nowhere():
    base, delta = normal(9, 5), 0.01 * normal(9, 5, seed=1)
    opposite = deltas({"w": base}, [{"w": base + delta}, {"w": base - delta}])["w"]
    np.testing.assert_allclose(opposite.cosine[0, 1], -1, atol=1e-6)
    assert float(opposite.sign_conflict) == 1
    equal = deltas({"w": base}, [{"w": base + delta}] * 2)["w"]
    assert float(equal.cosine[0, 1]) == pytest.approx(1, abs=1e-6)
    assert float(equal.sign_conflict) == 0
    assert equal.kept_energy is None


def test_zero_entries_conflict_with_nothing():
    zero = np.zeros(4, np.float32)
    models = [{"w": np.array([1, 0, 1, -1], np.float32)}, {"w": np.array([0, -1, -1, 0], "f4")}]
    assert float(deltas({"w": zero}, models)["w"].sign_conflict) == 0.25


def test_deltas_of_zero_give_defined_answers():
    base, moved = normal(4, 4), normal(4, 4, seed=1)
    got = deltas({"w": base}, [{"w": base}, {"w": moved}], density=0.5)["w"]
    assert float(got.relative_norm[0]) == 0 and float(got.kept_energy[0]) == 1
    np.testing.assert_array_equal(got.cosine, [[0, 0], [0, 1]])
    from_zero = deltas({"w": 0 * base}, [{"w": 0 * base}, {"w": moved}])["w"].relative_norm
    np.testing.assert_array_equal(from_zero, [0, np.inf])


@pytest.mark.parametrize("size", [1e-30, 1e30, 1e38])
def test_sizes_neither_vanish_nor_overflow(size):
    base, *models = (np.clip(normal(6, 6, seed=i), -1, 1) for i in range(3))
    trees = [{"w": (m * size).astype(np.float32)} for m in (base, *models)]
    got = deltas(trees[0], trees[1:], density=0.3)["w"]
    check(got, oracle(base, models, 0.3), rtol=1e-5)


def test_long_sums_lose_nothing():
    n = 3_000_001
    base = np.zeros(n, np.float32)
    first = np.full(n, 0.1, np.float32)
    second = first + 1e-3 * normal(n)
    got = deltas({"w": base + 1}, [{"w": base + 1 + first}, {"w": base + 1 + second}])["w"]
    x = (base + 1 + first).astype(np.float64) - 1
    y = (base + 1 + second).astype(np.float64) - 1
    want = np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y))
    naive = np.cumsum(x.astype(np.float32) ** 2, dtype=np.float32)[-1]
    assert abs(naive / np.dot(x, x) - 1) > 1e-4  # what adding in the entries' order loses
    # Runs of 256 equal terms round alike: some ten units of the last place.
    np.testing.assert_allclose(got.cosine[0, 1], want, rtol=2e-6)
    np.testing.assert_allclose(got.relative_norm[0], np.sqrt(np.dot(x, x) / n), rtol=2e-6)


def test_bfloat16_leaves_are_compared_in_float32():
    base, first, second = (jnp.asarray(normal(16, 8, seed=i), jnp.bfloat16) for i in range(3))
    got = deltas({"w": base}, [{"w": first}, {"w": second}], density=0.25)["w"]
    assert got.cosine.dtype == jnp.float32
    wide = [np.asarray(x, np.float32) for x in (base, first, second)]
    check(got, oracle(wide[0], wide[1:], 0.25))


def test_represented_weights_are_materialised():
    base, dense = normal(6, 4), normal(6, 4, seed=1)
    mask = jnp.asarray(dense > 0)
    got = deltas({"w": base}, [{"w": Masked(jnp.asarray(dense), mask)}])["w"]
    want = deltas({"w": base}, [{"w": np.where(dense > 0, dense, 0)}])["w"]
    np.testing.assert_array_equal(got.relative_norm, want.relative_norm)


def test_under_jit_it_gives_the_same_numbers():
    base, first, second = ({"w": normal(5, 4, seed=i)} for i in range(3))
    run = lambda b, *m: deltas(b, m, density=0.5)  # noqa: E731
    eager, jitted = run(base, first, second), jax.jit(run)(base, first, second)
    for ours, theirs in zip(jitted["w"], eager["w"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    shapes = jax.eval_shape(run, base, first, second)["w"]
    assert shapes.cosine.shape == (2, 2)


def test_other_leaves_are_skipped_with_a_reason():
    base = {"step": np.int32(3), "none": np.zeros((0, 4), np.float32), "w": normal(3)}
    report = deltas(base, [base])
    assert list(report) == ["w"]
    assert report.skipped["step"] == "is int32, not floating"
    assert report.skipped["none"] == "has shape (0, 4), which is empty"


def test_models_that_do_not_fit_are_one_error():
    base = {"a": normal(3, 2), "b": normal(2), "c": normal(2)}
    models = [{"a": normal(3, 4), "b": normal(2)}, {**base, "c": np.zeros(2, np.int32)}]
    with pytest.raises(ValueError) as error:
        deltas(base, models, names=["math", "code"])
    message = str(error.value)
    assert "models[0] ('math') lacks ['c']" in message
    assert "'a': is (3, 4) in models[0] ('math') but (3, 2) in the base" in message
    assert "'c': is int32 in models[1] ('code') but float32 in the base" in message


def test_values_that_are_not_finite_are_named_with_their_model():
    base = {"a": normal(3, 2)}
    broken = {"a": base["a"] * np.array([1, np.nan], np.float32)}
    with pytest.raises(ValueError, match=r"models\[1\]: 'a'"):
        deltas(base, [base, broken])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"density": 0.0}, r"density=0.0 must lie in \(0, 1\]"),
        ({"density": [0.5, 0.5]}, "density has 2 entries, but 1 model was given"),
        ({"names": ["a", "b"]}, "names has 2 entries"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    base = {"w": normal(2, 2)}
    with pytest.raises(ValueError, match=words):
        deltas(base, [base], **options)


def test_models_must_be_a_list_that_is_not_empty():
    base = {"w": normal(2, 2)}
    with pytest.raises(ValueError, match="models is empty"):
        deltas(base, [])
    with pytest.raises(TypeError, match=r"models is a dict, not a list of trees"):
        deltas(base, base)
