"""Tests of truncation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.adapt import truncate
from jaxweights.checkpoint import load_tree, save_tree
from jaxweights.weights import Axes, Factored

RNG = np.random.default_rng(0)


def with_spectrum(values, shape=(7, 5)):
    left, _ = np.linalg.qr(RNG.normal(size=(shape[0], shape[0])))
    right, _ = np.linalg.qr(RNG.normal(size=(shape[1], shape[1])))
    n = len(values)
    return jnp.asarray((left[:, :n] * values) @ right[:, :n].T, jnp.float32)


def best(matrix, rank):
    """The truncated decomposition, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("form", ["factors", "dense"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_no_matrix_of_that_rank_comes_closer(form, shape, rank):
    weight = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    got = jw.apply(truncate(rank=rank, form=form), {"kernel": weight})["kernel"]
    if form == "factors":
        assert isinstance(got, Factored) and got.rank == min(rank, *shape)
        got = got.materialize()
    np.testing.assert_allclose(got, best(weight, rank), rtol=0, atol=5e-6)


@pytest.mark.parametrize("energy, rank", [(0.5, 1), (0.8, 1), (0.81, 2), (0.999, 3), (1.0, 4)])
def test_the_lowest_rank_that_keeps_the_energy_is_taken(energy, rank):
    squares = np.array([8.05, 1.5, 0.44, 0.01])
    weight = with_spectrum(np.sqrt(squares))
    got = jw.apply(truncate(energy=energy), {"kernel": weight})["kernel"]
    assert got.rank == rank
    np.testing.assert_allclose(got.materialize(), best(weight, rank), rtol=0, atol=5e-6)
    capped = jw.apply(truncate(energy=energy, rank=2), {"kernel": weight})["kernel"]
    assert capped.rank == min(rank, 2)


def test_each_matrix_of_a_stack_has_its_own_rank_in_factors_of_one_width():
    matrices = [with_spectrum([5.0, 0.1]), with_spectrum([3.0, 2.0, 1.0])]
    params = {"layers": {"kernel": jnp.stack(matrices)}}
    got = jw.apply(truncate(energy=0.95), params, layout={"layers/kernel": Axes()})
    got = got["layers"]["kernel"]
    assert got.rank == 3 and got.shape == (2, 7, 5)
    for made, matrix, rank in zip(got.materialize(), matrices, (1, 3), strict=True):
        np.testing.assert_allclose(made, best(matrix, rank), rtol=0, atol=5e-6)


def test_attention_kernels_are_cut_as_matrices():
    weight = jnp.asarray(RNG.normal(size=(6, 2, 4)), jnp.float32)
    layout = {"q/kernel": Axes(inputs=(-3,), outputs=(-2, -1))}
    got = jw.apply(truncate(rank=2), {"q": {"kernel": weight}}, layout=layout)["q"]["kernel"]
    assert got.shape == (6, 2, 4)
    want = best(weight.reshape(6, 8), 2).reshape(6, 2, 4)
    np.testing.assert_allclose(got.materialize(), want, rtol=0, atol=5e-6)


def test_bfloat16_is_cut_in_float32_and_rounded_once():
    weight = jnp.asarray(RNG.normal(size=(8, 8)), jnp.bfloat16)
    dense = jw.apply(truncate(rank=4, form="dense"), {"kernel": weight})["kernel"]
    want = best(np.asarray(weight, np.float32), 4).astype(jnp.bfloat16)
    assert dense.dtype == jnp.bfloat16
    assert np.mean(np.asarray(dense) == want) > 0.95  # but for ties of rounding
    got = jw.apply(truncate(rank=4, dtype=jnp.float32), {"kernel": weight})["kernel"]
    assert got.dtype == jnp.bfloat16 and got.down.dtype == jnp.float32


def test_a_lifted_model_multiplies_by_the_factors():
    weight = with_spectrum([3.0, 2.0, 1.0])
    cut = jw.apply(truncate(rank=2), {"kernel": weight})["kernel"]
    x = jnp.asarray(RNG.normal(size=(3, 7)), jnp.float32)
    model = lambda params, x: x @ params["kernel"]  # noqa: E731
    got = jw.lift(model)({"kernel": cut}, x)
    np.testing.assert_allclose(got, x @ cut.materialize(), rtol=1e-5, atol=1e-5)
    products = str(jax.make_jaxpr(lambda p, x: jw.lift(model)(p, x))({"kernel": cut}, x))
    assert products.count("dot_general") == 2


def test_factors_are_saved_and_loaded(tmp_path):
    cut = jw.apply(truncate(rank=2), {"kernel": with_spectrum([3.0, 2.0, 1.0])})
    save_tree(tmp_path / "cut", cut)
    loaded = load_tree(tmp_path / "cut").tree["kernel"]
    assert isinstance(loaded, Factored)
    np.testing.assert_array_equal(loaded.materialize(), cut["kernel"].materialize())


def test_zeros_stay_zeros_and_under_jit_the_width_is_what_the_rank_allows():
    zeros = {"kernel": jnp.zeros((4, 3))}
    got = jw.apply(truncate(energy=0.9), zeros)["kernel"]
    assert got.rank == 1 and not np.any(got.materialize())
    weight = {"kernel": with_spectrum([3.0, 0.1])}
    tx = truncate(energy=0.9, rank=3)
    inside = jax.jit(lambda p: jw.apply(tx, p))(weight)["kernel"]
    outside = jw.apply(tx, weight)["kernel"]
    assert (inside.rank, outside.rank) == (3, 1)
    np.testing.assert_allclose(inside.materialize(), outside.materialize(), atol=1e-6)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "neither rank nor energy is given"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"energy": 1.5}, r"energy=1.5 must lie in \(0, 1\]"),
        ({"rank": 2, "form": "thin"}, "form='thin' must be 'factors' or 'dense'"),
        ({"rank": 2, "dtype": jnp.int8}, "cannot hold factors"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=f"adapt.truncate: .*{words}"):
        truncate(**settings)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"'kernel': 1 of 6 values are not finite"):
        jw.apply(truncate(rank=1), {"kernel": jnp.ones((2, 3)).at[0, 0].set(jnp.nan)})
    with pytest.raises(ValueError, match=r"down has shape \(4, 2\) and up \(3, 4\)"):
        Factored.of(jnp.ones((4, 2)), jnp.ones((3, 4)), jnp.float32)
