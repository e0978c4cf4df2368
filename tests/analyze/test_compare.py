"""Tests of compare."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.analyze import compare
from jaxweights.core import Layout, Stats
from jaxweights.weights import Axes, Masked


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one(first, second, **options):
    return compare({"w": jnp.asarray(first)}, {"w": jnp.asarray(second)}, **options)["w"]


def test_errors_and_norms_are_what_their_definitions_say():
    a, b = normal(6, 5), normal(6, 5, seed=1)
    got = one(a, b)
    difference = (b - a).astype(np.float64)
    s = np.linalg.svd(difference, compute_uv=False)
    cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(got.fro, np.linalg.norm(difference), rtol=1e-5)
    np.testing.assert_allclose(
        got.relative_error, np.linalg.norm(difference) / np.linalg.norm(a), rtol=1e-5
    )
    np.testing.assert_allclose(got.max_abs, np.abs(difference).max(), rtol=1e-6)
    np.testing.assert_allclose(got.angle, np.arccos(cosine), rtol=1e-5)
    np.testing.assert_allclose(got.stable_rank, np.sum(s**2) / s[0] ** 2, rtol=1e-5)
    assert int(got.numerical_rank) == 5


def test_a_tree_does_not_differ_from_itself():
    a = normal(6, 5)
    for value in one(a, a)[:-1]:
        assert float(value) == 0


@pytest.mark.parametrize("angle", [1e-6, 1e-4, 1e-2, 1.0, 3.0])
def test_angles_are_exact_however_small(angle):
    a = normal(40, 30).astype(np.float64)
    across = normal(40, 30, seed=1).astype(np.float64)
    across -= np.vdot(across, a) / np.vdot(a, a) * a
    b = np.cos(angle) * a + np.sin(angle) * across * np.linalg.norm(a) / np.linalg.norm(across)
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    # What the rounded vectors enclose, in float64.
    x, y = a32.astype(np.float64), b32.astype(np.float64)
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    want = 2 * np.arctan2(np.linalg.norm(x - y), np.linalg.norm(x + y))
    np.testing.assert_allclose(one(a32, b32).angle, want, rtol=1e-4)
    if angle == 1e-6:
        naive = np.arccos(min(np.float32(1), np.float32(np.vdot(x, y))))
        assert abs(naive - want) > 0.5 * want  # the arc cosine cannot tell


def test_parallel_vectors_enclose_no_angle_and_opposite_ones_half_a_turn():
    a = normal(8, 8)
    assert float(one(a, 2 * a).angle) == 0
    np.testing.assert_allclose(one(a, -a).angle, np.pi, rtol=1e-6)


def test_zeros_give_defined_answers():
    a, zero = normal(3, 4), np.zeros((3, 4), np.float32)
    both, first, second = one(zero, zero), one(zero, a), one(a, zero)
    assert float(both.relative_error) == 0 and float(both.angle) == 0
    assert np.isinf(first.relative_error) and float(second.relative_error) == 1
    np.testing.assert_allclose([first.angle, second.angle], np.pi / 2, rtol=1e-6)
    assert int(both.numerical_rank) == 0


@pytest.mark.parametrize("dtype, size", [(jnp.float32, 1e-4), (jnp.bfloat16, 0.25)])
def test_the_rank_of_a_merged_adapter_survives_the_rounding_of_the_weights(dtype, size):
    base = jnp.asarray(normal(60, 50), dtype)
    # Large enough that its smallest direction rises above the rounding of the dtype.
    delta = jnp.asarray(size * normal(60, 3, seed=1) @ normal(3, 50, seed=2))
    merged = (base.astype(jnp.float32) + delta).astype(dtype)
    exact = np.linalg.matrix_rank(np.asarray(merged - base, np.float32))
    assert exact > 3  # rounding alone makes the difference full rank
    assert int(one(base, merged).numerical_rank) == 3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_weights_neither_vanish_nor_overflow(scale):
    a, b = normal(5, 4), normal(5, 4, seed=1)
    got, want = one(a * np.float32(scale), b * np.float32(scale)), one(a, b)
    for name in ("relative_error", "angle", "stable_rank", "numerical_rank"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5)


def test_stacked_leaves_are_compared_one_by_one():
    a, b = normal(3, 6, 4), normal(3, 6, 4, seed=1)
    got = one(a, b, layout={"w": Axes()})
    for i in range(3):
        alone = one(a[i], b[i])
        for name in ("relative_error", "max_abs", "angle", "fro", "stable_rank", "numerical_rank"):
            np.testing.assert_allclose(getattr(got, name)[i], getattr(alone, name), rtol=1e-5)


def test_leaves_without_axes_count_as_one_vector():
    a = {"bias": jnp.ones(4), "stack": {"kernel": jnp.ones((2, 3, 3))}}
    b = jax.tree.map(lambda x: 1.5 * x, a)
    report = compare(a, b)
    for path in ("bias", "stack/kernel"):
        assert report[path].stable_rank is None and report[path].relative_error.shape == ()
        np.testing.assert_allclose(report[path].relative_error, 0.5, rtol=1e-6)


def test_ranks_may_be_left_out():
    got = one(normal(4, 3), normal(4, 3, seed=1), ranks=False)
    assert got.stable_rank is None and got.numerical_rank is None
    assert float(got.relative_error) > 0


def test_represented_weights_are_compared_by_value():
    a = jnp.asarray(normal(4, 3))
    mask = jnp.asarray(normal(4, 3, seed=1) > 0)
    got = compare({"w": a}, {"w": Masked(a, mask)})["w"]
    np.testing.assert_allclose(got.fro, np.linalg.norm(np.where(mask, 0, a)), rtol=1e-6)


def test_output_error_weighs_the_difference_by_the_inputs():
    x, a, b = normal(50, 6), normal(6, 4, seed=1), normal(6, 4, seed=2)
    stats = Stats({"w": {"gram": jnp.asarray(x.T @ x)}}, layout=Layout.of({"w": Axes()}))
    got = one(a, b, stats=stats)
    want = np.linalg.norm(x @ (b - a)) ** 2 / np.linalg.norm(x @ a) ** 2
    np.testing.assert_allclose(got.output_error, want, rtol=1e-5)
    # A change in a direction that no input has costs nothing, however large.
    x[:, 0] = 0
    stats = Stats({"w": {"gram": jnp.asarray(x.T @ x)}}, layout=Layout.of({"w": Axes()}))
    b = a.copy()
    b[0] += 100
    assert float(one(a, b, stats=stats).output_error) == 0


def test_output_error_is_taken_per_layer_and_only_where_there_is_a_gram():
    x, a, b = normal(2, 50, 6), normal(2, 6, 4, seed=1), normal(2, 6, 4, seed=2)
    gram = np.einsum("lni,lnj->lij", x, x)
    stats = Stats({"w": {"gram": jnp.asarray(gram)}}, layout=Layout.of({"w": Axes()}))
    first, second = ({"w": jnp.asarray(w), "v": jnp.ones((2, 2))} for w in (a, b))
    report = compare(first, second, stats=stats)
    want = [
        np.linalg.norm(x[i] @ (b - a)[i]) ** 2 / np.linalg.norm(x[i] @ a[i]) ** 2 for i in (0, 1)
    ]
    np.testing.assert_allclose(report["w"].output_error, want, rtol=1e-5)
    assert report["v"].output_error is None


def test_statistics_of_another_model_are_refused():
    layout = Layout.of({"w": Axes()})
    stats = Stats({"w": {"gram": jnp.eye(7)}}, layout=layout)
    with pytest.raises(ValueError, match=r"'w': the statistic 'gram' has shape \(7, 7\)"):
        one(normal(6, 4), normal(6, 4), stats=stats)
    without = Stats({"w": {"second_moment": jnp.ones(6)}}, layout=layout)
    with pytest.raises(ValueError, match="hold no Gram matrix"):
        one(normal(6, 4), normal(6, 4), stats=without)


def test_every_difference_of_structure_is_listed_at_once():
    first = {"a": jnp.ones(2), "b": jnp.ones((2, 3)), "c": jnp.ones(1)}
    second = {"a": jnp.ones(2), "b": jnp.ones((3, 2)), "d": jnp.ones(1)}
    with pytest.raises(ValueError) as error:
        compare(first, second)
    for words in (
        "only the first tree has ['c']",
        "only the second tree has ['d']",
        "'b': is (2, 3) in the first tree but (3, 2) in the second",
        "Compare trees of one structure",
    ):
        assert words in str(error.value)
    assert list(compare(first, second, select="a")) == ["a"]


def test_leaves_that_are_not_floating_are_skipped_and_compared_exactly():
    first = {"w": jnp.eye(2), "step": jnp.arange(3), "key": jax.random.key(0)}
    second = {"w": jnp.eye(2), "step": jnp.array([0, 1, 5]), "key": jax.random.key(0)}
    report = compare(first, second)
    assert report.skipped["step"] == "is int32, not floating; 1 entries differ"
    assert report.skipped["key"].endswith("not floating; equal")


def test_leaves_that_are_not_finite_are_refused_by_side_and_name():
    good, bad = jnp.eye(2), jnp.array([[1.0, jnp.inf], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"second: 'w': 1 of 4 values are not finite"):
        one(good, bad)


def test_it_runs_under_jit_and_on_shapes_alone():
    a, b = {"w": jnp.asarray(normal(4, 3))}, {"w": jnp.asarray(normal(4, 3, seed=1))}
    np.testing.assert_allclose(jax.jit(compare)(a, b)["w"].fro, compare(a, b)["w"].fro, rtol=1e-6)
    assert jax.eval_shape(compare, a, b)["w"].stable_rank.shape == ()
