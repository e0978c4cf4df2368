"""Tests of spectrum."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.analyze import spectrum
from jaxweights.analyze._spectrum import spectrum_of_values
from jaxweights.core import Layout
from jaxweights.weights import CONV_HWIO, Axes, Masked
from tests._fixtures import fixture

# A float32 SVD is good to a few epsilons of the largest singular value.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
RANKS = ("stable_rank", "participation_ratio", "effective_rank", "numerical_rank")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one(matrix, **options):
    return spectrum({"w": jnp.asarray(matrix)}, **options)["w"]


def oracle(matrix, energy=0.99):
    """The table of definitions, in float64."""
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    entropy = lambda p: -np.sum(p[p > 0] * np.log(p[p > 0]))  # noqa: E731
    rank = int(np.sum(s > max(matrix.shape) * np.finfo(np.float32).eps * s[0]))
    return {
        "singular_values": s,
        "fro": np.linalg.norm(matrix),
        "spectral": s[0],
        "nuclear": s.sum(),
        "stable_rank": np.sum(s**2) / s[0] ** 2,
        "effective_rank": np.exp(entropy(s / s.sum())),
        "participation_ratio": np.sum(s**2) ** 2 / np.sum(s**4),
        "numerical_rank": rank,
        "energy_rank": int(np.argmax(np.cumsum(s**2) >= energy * np.sum(s**2)) + 1),
        "entropy": entropy(s**2 / np.sum(s**2)) / np.log(rank),
    }


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("method", ["svd", "gram"])
def test_every_field_is_what_its_definition_says(shape, method):
    matrix = normal(*shape)
    got, want = one(matrix, method=method), oracle(matrix)
    for name, value in want.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=2e-5, err_msg=name)
    assert bool(got.valid)


def test_the_entropy_may_be_of_the_squares():
    matrix = normal(6, 4)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    p = s**2 / np.sum(s**2)
    want = np.exp(-np.sum(p * np.log(p)))
    np.testing.assert_allclose(one(matrix, entropy_of="squares").effective_rank, want, rtol=1e-5)


def test_ranks_are_ordered():
    # 1 <= stable <= participation <= exp entropy of the squares <= numerical rank.
    got = one(normal(20, 12), entropy_of="squares")
    ranks = [1.0, *(float(getattr(got, name)) for name in RANKS)]
    assert ranks == sorted(ranks) and len(set(ranks)) == 5


def test_the_identity_has_full_ranks_and_a_rank_one_matrix_ones():
    for name in (*RANKS, "energy_rank"):
        full = getattr(one(np.eye(6, dtype=np.float32), energy=1.0), name)
        single = getattr(one(np.outer(normal(6), normal(9))), name)
        np.testing.assert_allclose(full, 6, rtol=1e-6, err_msg=name)
        # The entropy of 5 rounded zeros adds a little to the effective rank.
        np.testing.assert_allclose(single, 1, rtol=1e-4, err_msg=name)


def test_ranks_do_not_change_with_scale_transposition_or_rotation():
    matrix = normal(8, 5)
    q = np.linalg.qr(normal(8, 8, seed=1))[0]
    want = one(matrix)
    for other in (
        -3e-3 * matrix,
        matrix.T,
        q @ matrix,
        matrix[np.random.default_rng(0).permutation(8)],
    ):
        got = one(other)
        for name in (*RANKS, "entropy"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5)


def test_a_zero_matrix_has_ranks_zero_and_no_nan():
    got = one(np.zeros((4, 3), np.float32))
    assert not bool(got.valid)
    for name in got._fields[:-1]:
        np.testing.assert_array_equal(getattr(got, name), 0, err_msg=name)


def test_a_single_column_has_ranks_one():
    got = one(normal(5, 1))
    for name in (*RANKS, "energy_rank"):
        np.testing.assert_allclose(getattr(got, name), 1, rtol=1e-6)
    assert float(got.entropy) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_weights_neither_vanish_nor_overflow(scale):
    # Squares of either leave the range of float32.
    matrix = normal(5, 4)
    got, want = one(matrix * np.float32(scale)), one(matrix)
    for name in RANKS:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5)
    np.testing.assert_allclose(got.fro, want.fro * np.float32(scale), rtol=1e-5)


def test_stacked_leaves_are_matrices_by_themselves():
    leaf = normal(3, 2, 6, 4)
    got = one(leaf, layout={"w": Axes()})
    assert got.singular_values.shape == (3, 2, 4) and got.fro.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            np.testing.assert_allclose(
                got.singular_values[i, j], oracle(leaf[i, j])["singular_values"], **CLOSE
            )


def test_heads_are_split_or_flattened_on_either_side():
    query, out = normal(2, 12, 3, 4), normal(2, 3, 4, 12, seed=1)
    layout = Layout.of(
        {
            "q": Axes(inputs=(-3,), outputs=(-2, -1)),
            "o": Axes(inputs=(-3, -2), outputs=(-1,)),
        }
    )
    params = {"q": jnp.asarray(query), "o": jnp.asarray(out)}
    split, flat = spectrum(params, layout=layout), spectrum(params, layout=layout, heads="flatten")
    for layer in range(2):
        for head in range(3):
            for path, matrix in (("q", query[layer, :, head]), ("o", out[layer, head])):
                want = oracle(matrix)["singular_values"]
                np.testing.assert_allclose(split[path].singular_values[layer, head], want, **CLOSE)
        for path, matrix in (
            ("q", query[layer].reshape(12, 12)),
            ("o", out[layer].reshape(12, 12)),
        ):
            want = oracle(matrix)["singular_values"]
            np.testing.assert_allclose(
                flat[path].singular_values[layer], want, rtol=1e-4, atol=1e-5
            )


def test_convolutions_are_flattened_or_taken_by_position():
    kernel = normal(2, 3, 4, 5)
    layout = Layout.of({"w": CONV_HWIO})
    want = oracle(kernel.reshape(24, 5))["singular_values"]
    np.testing.assert_allclose(one(kernel, layout=layout).singular_values, want, **CLOSE)
    by_position = one(kernel, layout=layout, conv="per_position")
    want = oracle(kernel[1, 2])["singular_values"]
    np.testing.assert_allclose(by_position.singular_values[1, 2], want, **CLOSE)


def test_narrow_dtypes_are_widened_and_represented_weights_materialised():
    matrix = jnp.asarray(normal(6, 5), jnp.bfloat16)
    mask = jnp.asarray(normal(6, 5, seed=1) > 0)
    want = oracle(np.asarray(matrix, np.float32))["singular_values"]
    np.testing.assert_allclose(one(matrix).singular_values, want, **CLOSE)
    masked = spectrum({"w": Masked(matrix, mask)})["w"]
    want = oracle(np.asarray(jnp.where(mask, matrix, 0), np.float32))["singular_values"]
    np.testing.assert_allclose(masked.singular_values, want, **CLOSE)


def test_skipped_leaves_say_why():
    params = {
        "bias": jnp.ones(3),
        "empty": {"kernel": jnp.ones((0, 3))},
        "kernel": jnp.eye(3),
        "stack": {"kernel": jnp.ones((2, 3, 3))},
        "norm": {"scale": jnp.ones((2, 3))},
        "step": jnp.zeros((), jnp.int32),
    }
    report = spectrum(params)
    assert list(report) == ["kernel"] and len(report) == 1
    assert report.skipped["bias"] == "has shape (3,), which is no matrix"
    assert report.skipped["step"] == "is int32, not floating"
    assert report.skipped["norm/scale"] == "is a bias or norm by its name"
    assert report.skipped["empty/kernel"] == "has shape (0, 3), which is empty"
    assert "ambiguous. Pass layout=" in report.skipped["stack/kernel"]
    with pytest.raises(KeyError, match="skipped: has shape"):
        report["bias"]
    assert set(report) | set(report.skipped) == {"bias", "empty/kernel", "kernel", "norm/scale",
                                                 "stack/kernel", "step"}  # fmt: skip


def test_a_selection_names_leaves_by_pattern_or_predicate():
    params = {"a": {"kernel": jnp.eye(2)}, "b": {"kernel": jnp.eye(3)}}
    assert list(spectrum(params, select="a/.*")) == ["a/kernel"]
    assert list(spectrum(params, select=lambda path: path.startswith("b"))) == ["b/kernel"]
    with pytest.raises(ValueError, match=r"matches no leaf. The nearest paths: .*'a/kernel'"):
        spectrum(params, select="c/kernel")


def test_leaves_that_are_not_finite_are_refused_by_name():
    params = {"a": jnp.eye(2), "b": jnp.array([[1.0, jnp.nan], [0.0, 1.0]])}
    with pytest.raises(ValueError, match=r"'b': 1 of 4 values are not finite"):
        spectrum(params)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"energy": 0.0}, r"energy=0.0 must lie in \(0, 1\]"),
        ({"heads": "all"}, "heads='all' is neither 'split' nor 'flatten'"),
        ({"method": "qr"}, "method='qr' is neither"),
        ({"precision": "float64"}, "float64 requested but jax_enable_x64 is off"),
        ({"precision": "half"}, "precision='half'"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        one(np.eye(2), **options)


def test_ranks_are_differentiable_also_where_singular_values_coincide():
    gradient = jax.grad(lambda w: spectrum({"w": w})["w"].stable_rank)(jnp.eye(4))
    assert bool(jnp.all(jnp.isfinite(gradient)))
    matrix, step = jnp.asarray(normal(4, 3)), jnp.asarray(normal(4, 3, seed=1))
    for name in ("stable_rank", "effective_rank", "nuclear", "fro", "entropy"):

        def value(w, name=name):
            return getattr(spectrum({"w": w})["w"], name)

        slope = jnp.vdot(jax.grad(value)(matrix), step)
        h = 1e-2
        numeric = (value(matrix + h * step) - value(matrix - h * step)) / (2 * h)
        np.testing.assert_allclose(slope, numeric, rtol=1e-2, atol=1e-3, err_msg=name)


def test_it_runs_under_jit_and_on_shapes_alone():
    params = {"w": jnp.asarray(normal(6, 4))}
    jitted = jax.jit(spectrum)(params)
    np.testing.assert_allclose(jitted["w"].fro, spectrum(params)["w"].fro, rtol=1e-6)
    shapes = jax.eval_shape(spectrum, params)
    assert shapes["w"].singular_values.shape == (4,)


def test_the_tolerance_of_the_numerical_rank_may_be_chosen():
    matrix = np.diag([1.0, 1e-2, 1e-4]).astype(np.float32)
    assert int(one(matrix).numerical_rank) == 3
    assert int(one(matrix, rtol=1e-3).numerical_rank) == 2


@pytest.mark.parametrize("energy, rank", [(0.6, 1), (0.66, 1), (0.7, 2), (0.9, 3), (1.0, 3)])
def test_energy_rank_counts_the_values_that_hold_the_share(energy, rank):
    # Squares 4, 1, 1: shares 2/3, 5/6, 1.
    values = jnp.array([2.0, 1.0, 1.0])
    assert int(spectrum_of_values(values, rtol=0, energy=energy).energy_rank) == rank


@pytest.mark.parametrize("matrix", ["gaussian", "student_t", "spiked", "powerlaw"])
def test_norms_and_entropies_agree_with_weightwatcher(matrix):
    arrays = fixture("analyze/weightwatcher.npz")
    assert "matrix" in json.loads(str(arrays["meta"]))["note"]
    weight = arrays[f"{matrix}/W"].T  # stored (out, in)
    got = one(weight)
    ours = np.sort(np.asarray(got.singular_values, np.float64) ** 2)
    # 1e-4 relative, but no better than float32 tells the smallest of them.
    floor = 4 * np.finfo(np.float32).eps * np.sqrt(ours.max() * ours)
    esd = np.sort(arrays[f"{matrix}/esd"])
    assert np.all(np.abs(ours - esd) <= 1e-4 * esd + floor)
    names = ("stable_rank", "entropy", "matrix_rank", "spectral_norm", "sv_max", "norm")
    want = {name: float(arrays[f"{matrix}/default/{name}"]) for name in names}
    np.testing.assert_allclose(got.stable_rank, want["stable_rank"], rtol=1e-4)
    np.testing.assert_allclose(got.entropy, want["entropy"], rtol=1e-4)
    np.testing.assert_allclose(got.spectral, want["sv_max"], rtol=1e-4)
    np.testing.assert_allclose(got.spectral**2, want["spectral_norm"], rtol=1e-4)
    np.testing.assert_allclose(got.fro**2, want["norm"], rtol=1e-4)
    assert int(got.numerical_rank) == want["matrix_rank"]
