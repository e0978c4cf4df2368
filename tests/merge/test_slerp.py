"""Tests of SLERP."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, apply, partition
from jaxweights.merge import _sphere, slerp
from jaxweights.weights import Axes
from tests.merge._public import assert_merged, checkpoint, results
from tests.merge._trees import assert_same_bits, finetuned, tree

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 40)).astype(np.float32)


def merge(tx, first, second):
    return np.asarray(
        apply(tx, {"w": jnp.asarray(first)}, models=[{"w": jnp.asarray(second)}])["w"]
    )


def exact(a, b, t):
    """In float64, by the arc cosine, which is good enough there."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    omega = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_it_agrees_with_mergekit(compat):
    merged, _ = results("slerp")
    tx = slerp(t=0.35, compat=compat)
    got = apply(tx, checkpoint("base"), models=[checkpoint("ft3")])
    assert_merged(got, merged["default"], 2e-6)


def test_places_per_layer_and_block_are_a_partition():
    merged, _ = results("slerp")
    layer = lambda i, block, t: (rf"model\.layers\.{i}\..*{block}.*", slerp(t=t))  # noqa: E731
    tx = partition(
        layer(0, "self_attn", 0.0),
        layer(1, "self_attn", 0.8),
        layer(0, "mlp", 0.7),
        layer(1, "mlp", 0.2),
        (..., slerp(t=0.5)),
    )
    got = apply(tx, checkpoint("base"), models=[checkpoint("ft3")])
    assert_merged(got, merged["filtered_t"], 2e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.75])
def test_it_is_the_formula(t):
    np.testing.assert_allclose(merge(slerp(t=t), A, B), exact(A, B, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["blend", "interpolate"])
def test_the_ends_of_the_arc_are_exact(norm):
    base, model = tree(0), finetuned(tree(0), 1)
    step = {"step": base["step"]}
    assert_same_bits(apply(slerp(t=0.0, norm=norm), base, models=[model]), base)
    assert_same_bits(apply(slerp(t=1.0, norm=norm), base, models=[model]), model | step)


def test_the_way_back_is_the_same_way():
    there, back = merge(slerp(t=0.3), A, B), merge(slerp(t=0.7), B, A)
    np.testing.assert_allclose(there, back, rtol=1e-6, atol=1e-6)


def test_a_model_and_itself_give_itself():
    np.testing.assert_allclose(merge(slerp(t=0.3), A, A.copy()), A, rtol=2e-7)


def test_unit_vectors_stay_so_and_the_speed_is_constant():
    a, b = A / np.linalg.norm(A), B / np.linalg.norm(B)
    points = [merge(slerp(t=t), a, b).astype(np.float64) for t in np.linspace(0, 1, 6)]
    np.testing.assert_allclose([np.linalg.norm(p) for p in points], 1, rtol=1e-6)
    steps = [np.arccos(p @ q) for p, q in itertools.pairwise(points)]
    np.testing.assert_allclose(steps, np.mean(steps), rtol=1e-5)
    # A straight line is neither.
    middle = (a + b) / 2
    assert np.linalg.norm(middle) < 0.9


def test_norms_may_be_interpolated():
    got = merge(slerp(t=0.25, norm="interpolate"), 2 * A, 6 * B)
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    size = 0.75 * np.linalg.norm(2 * A) + 0.25 * np.linalg.norm(6 * B)
    np.testing.assert_allclose(got, size * exact(unit(A), unit(B), 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["blend", "interpolate"])
def test_a_zero_vector_is_interpolated_linearly(norm):
    got = merge(slerp(t=0.25, norm=norm), np.zeros(40, np.float32), B)
    np.testing.assert_allclose(got, B / 4, rtol=1e-6)


def test_opposite_vectors_are_refused_by_name_or_interpolated_linearly():
    with pytest.raises(ValueError, match="'w': the two vectors point in opposite directions"):
        merge(slerp(), A, -2 * A)
    np.testing.assert_allclose(merge(slerp(antipodal="lerp"), A, -2 * A), -A / 2, rtol=1e-6)
    np.testing.assert_allclose(merge(slerp(compat="mergekit"), A, -2 * A), -A / 2, rtol=1e-6)
    compiled = jax.jit(lambda a, b: apply(slerp(), {"w": a}, models=[{"w": b}])["w"])
    np.testing.assert_allclose(compiled(A, -2 * A), -A / 2, rtol=1e-6)


def test_mergekit_interpolates_nearly_parallel_tensors_linearly():
    near = A + np.float32(0.02) * np.linalg.norm(A) * B / np.linalg.norm(B)
    line = 0.7 * A + 0.3 * near
    np.testing.assert_allclose(merge(slerp(t=0.3, compat="mergekit"), A, near), line, rtol=1e-5)
    # The arc is longer by about t(1-t)Ω²/2, 4e-5 of the length here.
    gap = np.linalg.norm(merge(slerp(t=0.3), A, near) - line) / np.linalg.norm(line)
    assert 3e-5 < gap < 5e-5


def test_layers_and_experts_have_angles_of_their_own():
    layout = Layout.of({"layers/up/kernel": Axes()}, traced=True)
    first, second = RNG.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    second[0, 1] = first[0, 1]  # one expert did not move
    tree_of = lambda x: {"layers": {"up": {"kernel": jnp.asarray(x)}}}  # noqa: E731
    got = apply(slerp(t=0.3), tree_of(first), models=[tree_of(second)], layout=layout)
    got = np.asarray(got["layers"]["up"]["kernel"])
    for place in np.ndindex(2, 3):
        a, b = first[place].ravel(), second[place].ravel()
        want = a if place == (0, 1) else exact(a, b, 0.3)
        np.testing.assert_allclose(got[place].ravel(), want, rtol=1e-5, atol=1e-6)


def test_two_hundred_places_compile_once():
    x = jnp.ones((3, 11))
    y = x.at[0].set(-0.5)
    apply(slerp(t=0.5), {"w": x}, models=[{"w": y}])
    programs = [_sphere.squared_length, _sphere.slerp_factors, _sphere.weighted_sum]
    before = [f._cache_size() for f in programs]
    for t in np.linspace(0, 1, 200):
        apply(slerp(t=float(t)), {"w": x}, models=[{"w": y}])
    assert [f._cache_size() for f in programs] == before


def test_the_place_is_differentiable_even_where_models_are_equal():
    def loss(t, a, b):
        return jnp.sum(apply(slerp(t=t), {"w": a}, models=[{"w": b}])["w"] ** 2)

    step = 1e-3
    ends = [float(np.sum(exact(A, B, 0.3 + s * step) ** 2)) for s in (-1, 1)]
    slope = jax.grad(loss)(0.3, jnp.asarray(A), jnp.asarray(B))
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * step), rtol=1e-3)
    assert np.isfinite(jax.grad(loss)(0.3, jnp.asarray(A), jnp.asarray(A)))


def test_nan_is_refused_by_path_and_model():
    bad = B.copy()
    bad[3] = np.nan
    with pytest.raises(ValueError, match=r"merge.slerp: 'w': 1 of 40 values of models\[0\]"):
        merge(slerp(t=0.0), A, bad)


def test_settings_and_the_number_of_models_are_checked():
    with pytest.raises(ValueError, match=r"merge.slerp: t=1.5 must be one number in \[0, 1\]"):
        slerp(t=1.5)
    with pytest.raises(ValueError, match=r"merge.slerp: antipodal='skip' is not one of"):
        slerp(antipodal="skip")
    model = {"w": jnp.asarray(A)}
    with pytest.raises(
        ValueError, match=r"2 models were given, but it merges exactly 1\. The tree"
    ):
        apply(slerp(), model, models=[model, model])
