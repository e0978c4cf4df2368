"""weight_matching finds planted permutations, and what Git Re-Basin found."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights import align
from jaxweights.align._assignment import best_assignment
from jaxweights.align._similarity import Similarity
from jaxweights.core import flatten
from tests._fixtures import fixture
from tests.align._models import library_model, mlp_params, random_like, random_permutations

KEY = jax.random.key(0)


def objective(a, b):
    a, b = flatten(a)[0], flatten(b)[0]
    return sum(float(np.vdot(np.float64(a[path]), np.float64(b[path]))) for path in a)


def fixture_case(case):
    arrays = fixture("merge/git_re_basin.npz")

    def tree(which):
        found = {}
        for name, array in arrays.items():
            if name.startswith(f"{case}/{which}/"):
                layer, leaf = name.split("/")[2:]
                found.setdefault(layer, {})[leaf] = array
        return found

    a, b, permuted = tree("a"), tree("b"), tree("b_permuted")
    spec = align.mlp_permutations(a)
    order = [[f"Dense_{i}" for i in row] for row in arrays[f"{case}/visit_order"]]
    perms = {name: arrays[f"{case}/perm/P_{name[6:]}"] for name in spec.names}
    return spec, a, b, order, perms, permuted


@pytest.mark.parametrize("case", ["planted", "one_hidden", "independent"])
def test_in_the_same_order_the_authors_permutations_are_found(case):
    spec, a, b, order, perms, permuted = fixture_case(case)
    found = align.weight_matching(spec, a, b, order=order)
    assert found.converged
    for name, expected in perms.items():
        np.testing.assert_array_equal(found.permutations[name], expected)
    moved = align.apply_permutation(spec, b, found.permutations)
    jax.tree.map(np.testing.assert_array_equal, moved, permuted)


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_the_objective_is_close_to_the_authors(seed):
    spec, a, b, _, _, permuted = fixture_case("independent")
    found = align.weight_matching(spec, a, b, key=jax.random.key(seed))
    # Local optima differ: over many orders theirs is not the best either.
    assert found.objective[-1] > 0.97 * objective(a, permuted)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_permutation_of_an_mlp_is_undone_exactly(seed):
    a = mlp_params(6, 24, 20, 16, 4)
    spec = align.mlp_permutations(a)
    planted = random_permutations(spec, seed)
    found = align.weight_matching(
        spec, a, align.apply_permutation(spec, a, planted), key=jax.random.key(seed)
    )
    expected = align.invert(spec, planted)
    for name in spec.names:
        np.testing.assert_array_equal(found.permutations[name], expected[name])
    assert found.converged and found.sweeps < 10


@pytest.mark.parametrize("case", ["llama3", "bert"])
def test_a_planted_permutation_of_a_transformer_is_undone_exactly(case):
    config, _, a = library_model(case)
    if case == "bert":
        spec = align.bert_permutations(config, residual=True)
    else:
        spec = align.llama_permutations(config)
    b = align.apply_permutation(spec, a, random_permutations(spec))
    assert objective(a, b) < 0.5 * objective(a, a)
    found = align.weight_matching(spec, a, b, key=KEY)
    jax.tree.map(
        np.testing.assert_array_equal, align.apply_permutation(spec, b, found.permutations), a
    )


def test_stacked_layers_are_matched_as_layers_apart_are():
    rng = np.random.default_rng(0)
    shapes = {"up": (3, 5, 8), "bias": (3, 8), "down": (3, 8, 5)}
    a, b = (
        {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}
        for _ in range(2)
    )
    axes = {
        "up": ("layers", None, "mlp"),
        "bias": ("layers", "mlp"),
        "down": ("layers", "mlp", None),
    }
    stacked = align.PermutationSpec.of(a, axes, stacks=("layers",), over={"mlp": ("layers",)})
    found = align.weight_matching(stacked, a, b, key=KEY).permutations["mlp"]
    axes = {"up": (None, "mlp"), "bias": ("mlp",), "down": ("mlp", None)}
    for i in range(3):
        ours, theirs = ({k: x[i] for k, x in tree.items()} for tree in (a, b))
        spec = align.PermutationSpec.of(ours, axes)
        alone = align.weight_matching(spec, ours, theirs, key=KEY).permutations["mlp"]
        np.testing.assert_array_equal(found[i], alone)


def test_large_stacks_are_matched_one_by_one_with_the_same_result(monkeypatch):
    config, _, a = library_model("llama3")
    spec, b = align.llama_permutations(config), random_like(a, seed=2)
    together = align.weight_matching(spec, a, b, key=KEY)
    monkeypatch.setattr(sys.modules[Similarity.__module__], "_AT_ONCE", 0)
    apart = align.weight_matching(spec, a, b, key=KEY)
    for name in spec.names:
        np.testing.assert_array_equal(apart.permutations[name], together.permutations[name])


def test_the_objective_never_falls_and_is_that_of_the_permuted_model():
    a, b = mlp_params(6, 20, 20, 20, 4, seed=1), mlp_params(6, 20, 20, 20, 4, seed=2)
    spec = align.mlp_permutations(a)
    found = align.weight_matching(spec, a, b, key=KEY)
    assert (np.diff(found.objective) > 0).all() and len(found.objective) > 3
    moved = align.apply_permutation(spec, b, found.permutations)
    scale = np.sqrt(objective(a, a) * objective(b, b))
    # Gains are differences of float32 products.
    np.testing.assert_allclose(found.objective[0], objective(a, b), atol=1e-6 * scale)
    np.testing.assert_allclose(found.objective[-1], objective(a, moved), atol=1e-6 * scale)
    distance = [objective(*(jax.tree.map(jnp.subtract, a, x),) * 2) for x in (b, moved)]
    rise = found.objective[-1] - found.objective[0]
    np.testing.assert_allclose(distance[0] - distance[1], 2 * rise, rtol=1e-5)


def test_no_single_permutation_can_be_improved_by_any_other():
    a, b = mlp_params(3, 4, 4, 2, seed=1), mlp_params(3, 4, 4, 2, seed=2)
    spec = align.mlp_permutations(a)
    found = align.weight_matching(spec, a, b, key=KEY)
    for name in spec.names:
        values = [
            objective(
                a, align.apply_permutation(spec, b, found.permutations | {name: np.array(other)})
            )
            for other in itertools.permutations(range(4))
        ]
        assert max(values) <= found.objective[-1] + 1e-5


def test_a_model_matches_itself_as_it_is_also_where_units_tie():
    a = mlp_params(4, 8, 8, 3)
    spec = align.mlp_permutations(a)
    for tree in (a, jax.tree.map(jnp.ones_like, a), jax.tree.map(jnp.zeros_like, a)):
        found = align.weight_matching(spec, tree, tree, key=KEY)
        assert found.sweeps == 1 and len(found.objective) == 1
        for name, array in spec.identity().items():
            np.testing.assert_array_equal(found.permutations[name], array)


def test_a_single_assignment_does_not_depend_on_how_the_other_model_is_numbered():
    a, b = mlp_params(5, 12, 3, seed=1), mlp_params(5, 12, 3, seed=2)
    spec = align.mlp_permutations(a)
    relabelled = align.apply_permutation(spec, b, random_permutations(spec))
    first, second = (
        align.apply_permutation(spec, x, align.weight_matching(spec, a, x, key=KEY).permutations)
        for x in (b, relabelled)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_start_is_improved_and_reported_whole():
    a = mlp_params(6, 24, 20, 4)
    spec = align.mlp_permutations(a)
    planted = random_permutations(spec)
    b = align.apply_permutation(spec, a, planted)
    found = align.weight_matching(spec, a, b, key=KEY, start=align.invert(spec, planted))
    assert len(found.objective) == 1
    half = {"Dense_0": align.invert(spec, planted)["Dense_0"]}
    found = align.weight_matching(spec, a, b, key=KEY, start=half)
    jax.tree.map(
        np.testing.assert_array_equal, align.apply_permutation(spec, b, found.permutations), a
    )


def test_bfloat16_models_are_matched_in_float32():
    a = mlp_params(6, 24, 20, 4)
    spec = align.mlp_permutations(a)
    planted = random_permutations(spec)
    a16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), a)
    b16 = align.apply_permutation(spec, a16, planted)
    found = align.weight_matching(spec, a16, b16, key=KEY)
    for name, expected in align.invert(spec, planted).items():
        np.testing.assert_array_equal(found.permutations[name], expected)


def test_sweeps_are_limited():
    a, b = mlp_params(6, 20, 20, 20, 4, seed=1), mlp_params(6, 20, 20, 20, 4, seed=2)
    found = align.weight_matching(align.mlp_permutations(a), a, b, key=KEY, max_sweeps=1)
    assert found.sweeps == 1 and not found.converged


@pytest.mark.parametrize("n", [1, 2, 5])
def test_an_assignment_is_the_best_of_all(n):
    rng = np.random.default_rng(n)
    similarity = rng.standard_normal((n, n)).astype(np.float32)
    best, gain = best_assignment(similarity)
    values = [
        sum(similarity[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(n))
    ]
    np.testing.assert_allclose(similarity[np.arange(n), best].sum(), max(values), rtol=1e-6)
    np.testing.assert_allclose(gain, max(values) - similarity.trace(), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_matched_is_refused():
    a = mlp_params(4, 8, 3)
    spec = align.mlp_permutations(a)
    with pytest.raises(ValueError, match="key is missing: the order"):
        align.weight_matching(spec, a, a)
    with pytest.raises(ValueError, match=r"order\[0\]=\['x'\] must name every permutation once"):
        align.weight_matching(spec, a, a, order=[["x"]])
    with pytest.raises(ValueError, match="order is empty"):
        align.weight_matching(spec, a, a, order=[])
    with pytest.raises(ValueError, match="max_sweeps=0"):
        align.weight_matching(spec, a, a, key=KEY, max_sweeps=0)
    with pytest.raises(ValueError, match=r"params_b: 'Dense_1/kernel': axis 0 has length 9"):
        align.weight_matching(spec, a, mlp_params(4, 9, 3), key=KEY)
    with pytest.raises(ValueError, match=r"'Dense_0/kernel': is \(5, 8\) in params_b but \(4, 8\)"):
        align.weight_matching(spec, a, mlp_params(5, 8, 3), key=KEY)
    bad = jax.tree.map(lambda x: x, a)
    bad["Dense_0"]["bias"] = bad["Dense_0"]["bias"].at[2].set(jnp.nan)
    with pytest.raises(ValueError, match="params_b: 'Dense_0/bias': 1 of 8 values are not finite"):
        align.weight_matching(spec, a, bad, key=KEY)
