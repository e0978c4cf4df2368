"""What permutations do to singular vectors, in cases that can be told beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights import align
from jaxweights.core import Layout
from jaxweights.weights import Axes
from tests.align._models import library_model, mlp_params, random_like, random_permutations

KEY = jax.random.key(0)


def setup(*sizes):
    a, b = mlp_params(*sizes, seed=1), mlp_params(*sizes, seed=2)
    return align.mlp_permutations(a), a, b


def numpy_alignment(a, b, gamma):
    """R of one matrix by its definition, pair by pair."""
    (ua, sa, va), (ub, sb, vb) = (np.linalg.svd(np.float64(x), full_matrices=False) for x in (a, b))
    ia, ib = (np.flatnonzero(s >= gamma * s[0]) for s in (sa, sb))
    total = sum((ua[:, i] @ ub[:, j]) * (va[i] @ vb[j]) for i in ia for j in ib)
    return total / min(len(ia), len(ib))


def test_the_sum_over_pairs_is_that_of_the_definition():
    spec, a, b = setup(6, 9, 7, 3)
    perms = random_permutations(spec)
    moved = align.apply_permutation(spec, b, perms)
    found = align.singular_vector_alignment(spec, a, b, perms, gammas=(0.0, 0.3, 0.9))
    assert list(found.layers) == [f"Dense_{i}/kernel" for i in range(3)]
    for path, layer in found.layers.items():
        ours, theirs, there = (x[path.split("/")[0]]["kernel"] for x in (a, b, moved))
        for i, gamma in enumerate(found.gammas):
            np.testing.assert_allclose(
                layer.before[i], numpy_alignment(ours, theirs, gamma), atol=1e-5
            )
            np.testing.assert_allclose(
                layer.after[i], numpy_alignment(ours, there, gamma), atol=1e-5
            )
        sigma = np.linalg.svd(ours)[1]
        np.testing.assert_allclose(layer.singular_values_a, sigma, rtol=1e-5)
        np.testing.assert_allclose(layer.distance_after, np.linalg.norm(ours - there), rtol=1e-5)
        gap = np.linalg.norm(sigma - np.linalg.svd(theirs)[1]) / np.linalg.norm(sigma)
        np.testing.assert_allclose(layer.spectra_distance, gap, rtol=1e-4)


def test_over_all_matrices_every_vector_counts_once():
    spec, a, b = setup(6, 9, 7, 3)
    found = align.singular_vector_alignment(spec, a, b, random_permutations(spec))
    layers = list(found.layers.values())
    for i in range(2):
        ranks = np.array([x.ranks[i] for x in layers])
        expected = (
            sum(float(x.after[i]) * r for x, r in zip(layers, ranks, strict=True)) / ranks.sum()
        )
        np.testing.assert_allclose(found.after[i], expected, rtol=1e-6)
    old, new = (
        sum(float(getattr(x, f"distance_{k}")) ** 2 for x in layers) for k in ("before", "after")
    )
    np.testing.assert_allclose(found.distance_ratio, (new / old) ** 0.5, rtol=1e-6)


def test_a_model_is_aligned_with_itself_and_with_its_renumbered_self_after_matching():
    spec, a, _ = setup(6, 16, 12, 3)
    planted = random_permutations(spec)
    b = align.apply_permutation(spec, a, planted)
    found = align.singular_vector_alignment(spec, a, b, align.invert(spec, planted))
    np.testing.assert_allclose(found.after, 1.0, atol=1e-5)
    assert (found.before < 0.5).all() and found.distance_ratio == 0.0
    for layer in found.layers.values():
        np.testing.assert_allclose(layer.spectra_distance, 0, atol=1e-5)


def test_weight_matching_aligns_the_vectors_of_large_singular_values_first():
    spec, a, b = setup(32, 64, 64, 8)
    # Trained matrices have a few large singular values; so do these.
    a, b = (
        jax.tree.map(
            lambda x: (
                jnp.float32(4) * jnp.outer(x.mean(1), x.mean(0)) * x.shape[0] + x
                if x.ndim == 2
                else x
            ),
            model,
        )
        for model in (a, b)
    )
    perms = align.weight_matching(spec, a, b, key=KEY).permutations
    found = align.singular_vector_alignment(spec, a, b, perms)
    assert found.distance_ratio < 1
    assert (found.after > found.before).all() and found.after[1] > found.after[0]


def test_products_of_singular_vectors_sum_to_the_inner_product():
    _, a, b = setup(6, 9, 3)
    ours, theirs = a["Dense_0"]["kernel"], b["Dense_0"]["kernel"]
    sigma_a, sigma_b, products = align.singular_vector_products(ours, theirs)
    total = jnp.einsum("i,j,ij->", sigma_a, sigma_b, products)
    np.testing.assert_allclose(total, jnp.vdot(ours, theirs), rtol=1e-5)


def test_vectors_of_one_singular_value_are_not_told_apart():
    """Singular values 2, 1, 1, 1: any basis of the last three is as good as another."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(2))
    turn = np.eye(4)
    turn[1:, 1:] = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    sigma = np.diag([2.0, 1.0, 1.0, 1.0])
    a = {"w": jnp.asarray(left @ sigma @ right.T, jnp.float32)}
    b = {"w": jnp.asarray(left @ turn @ sigma @ turn.T @ right.T, jnp.float32)}
    spec = align.PermutationSpec({"w": (None, "p")}, sizes={"p": 4})
    gammas = (0.5, 0.500001, 0.6, 1.0)
    found = align.singular_vector_alignment(spec, a, b, {}, gammas=gammas)
    # Rounding parts the three values; a threshold among them takes all or, beyond them, none.
    np.testing.assert_array_equal(found.layers["w"].ranks[2:], [1, 1])
    assert int(found.layers["w"].ranks[0]) in (1, 4)
    low = align.singular_vector_alignment(spec, a, b, {}, gammas=(0.499999,))
    assert int(low.layers["w"].ranks[0]) == 4
    np.testing.assert_allclose(low.after, 1.0, atol=1e-5)
    np.testing.assert_allclose(found.after, 1.0, atol=1e-5)


def test_vectors_of_zero_singular_values_are_left_out():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((8, 2)) @ rng.standard_normal((2, 6)), jnp.float32)
    spec = align.PermutationSpec({"w": (None, "p"), "z": ("p", None)}, sizes={"p": 6})
    params = {"w": w, "z": jnp.zeros((6, 3))}
    found = align.singular_vector_alignment(spec, params, params, {})
    assert found.layers["w"].ranks.tolist() == [2, 2]
    assert found.layers["z"].ranks.tolist() == [0, 0]
    assert found.layers["z"].after.tolist() == [0, 0]
    np.testing.assert_allclose(found.after, 1.0, atol=1e-5)
    assert found.distance_ratio == 1.0


def test_stacked_layers_are_matrices_of_their_own():
    config, _, a = library_model("llama3")
    spec, b = align.llama_permutations(config), random_like(a, seed=2)
    perms = random_permutations(spec)
    found = align.singular_vector_alignment(spec, a, b, perms, select=".*(q|down)/kernel")
    assert found.layers["layers/mlp/down/kernel"].after.shape == (3, 2)
    moved = align.apply_permutation(spec, b, perms)
    for name, part in (("q", "attn"), ("down", "mlp")):
        ours, theirs = (x["layers"][part][name]["kernel"] for x in (a, moved))
        got = found.layers[f"layers/{part}/{name}/kernel"].after
        for i in range(3):
            np.testing.assert_allclose(
                got[i, 1], numpy_alignment(ours[i], theirs[i], 0.3), atol=1e-5
            )


def test_a_convolution_is_the_matrix_that_its_layout_says():
    params = random_like({"conv": jnp.ones((3, 3, 4, 6))})
    spec = align.PermutationSpec({"conv": (None, None, None, "p")}, sizes={"p": 6})
    perms = random_permutations(spec)
    layout = Layout.of({"conv": Axes(inputs=(-4, -3, -2), outputs=(-1,), kind="conv")})
    other = random_like(params, seed=2)
    found = align.singular_vector_alignment(spec, params, other, perms, layout=layout)
    ours = np.asarray(params["conv"]).reshape(36, 6)
    theirs = np.asarray(other["conv"]).reshape(36, 6)[:, perms["p"]]
    expected = numpy_alignment(ours, theirs, 0.0)
    np.testing.assert_allclose(found.layers["conv"].after[0], expected, atol=1e-5)


def test_the_figure_has_a_row_a_matrix_and_a_panel_a_gamma(tmp_path):
    pytest.importorskip("matplotlib")
    config, _, a = library_model("llama3")
    spec, b = align.llama_permutations(config), random_like(a, seed=2)
    found = align.singular_vector_alignment(spec, a, b, {}, select=".*mlp.*", gammas=(0.3,))
    figure = align.alignment_figure(found)
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["R, γ = 0.3", "distance"]
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["layers/mlp/down/kernel[0]", "layers/mlp/down/kernel[1]"]
    assert len(labels) == 9
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_wrong_settings_and_models_are_refused():
    spec, a, b = setup(6, 9, 3)
    run = lambda *args, **options: align.singular_vector_alignment(spec, *args, **options)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"gammas=\[1\.5\] must be one or more numbers in \[0, 1\]"
    ):
        run(a, b, {}, gammas=(1.5,))
    with pytest.raises(ValueError, match=r"tie=1 must lie in \[0, 1\)"):
        run(a, b, {}, tie=1)
    with pytest.raises(ValueError, match="select='x' matches no leaf"):
        run(a, b, {}, select="x")
    with pytest.raises(ValueError, match=r"no leaf is a matrix: \{'Dense_0/bias'"):
        run(a, b, {}, select=".*bias")
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), b)
    with pytest.raises(ValueError, match="params_b: 'Dense_0/kernel': 9 of 54 values are not"):
        run(a, bad, {})
