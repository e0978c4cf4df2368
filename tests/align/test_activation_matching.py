"""activation_matching pairs units by their correlations, computed over batches as over all data."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxweights import align
from tests.align._models import mlp_params, random_like, random_permutations

DATA = np.random.default_rng(0).standard_normal((96, 6)).astype(np.float32)


def hidden(params, x):
    """What the hidden layers of an MLP compute."""
    found = {}
    for name in sorted(params)[:-1]:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
        found[name] = x
    return found


def test_a_planted_permutation_is_undone_exactly():
    a = mlp_params(6, 24, 20, 3)
    spec = align.mlp_permutations(a)
    planted = random_permutations(spec)
    b = align.apply_permutation(spec, a, planted)
    found = align.activation_matching(spec, hidden, a, b, [DATA[:40], DATA[40:]])
    for name, expected in align.invert(spec, planted).items():
        np.testing.assert_array_equal(found.permutations[name], expected)
        assert found.before[name] < 0.5
        np.testing.assert_allclose(found.after[name], 1.0, rtol=1e-5)


@pytest.mark.parametrize("measure", ["correlation", "covariance", "product"])
def test_pairs_are_those_of_numpy_over_all_data(measure):
    a, b = mlp_params(6, 16, 12, 3, seed=1), mlp_params(6, 16, 12, 3, seed=2)
    spec = align.mlp_permutations(a)
    batches = [DATA[:7], DATA[7:50], DATA[50:]]
    found = align.activation_matching(spec, hidden, a, b, batches, measure=measure)
    for name in spec.names:
        ours, theirs = (np.float64(hidden(p, jnp.asarray(DATA))[name]) for p in (a, b))
        n = ours.shape[1]
        if measure == "product":
            similarity = ours.T @ theirs / len(DATA)
        elif measure == "covariance":
            similarity = np.cov(ours.T, theirs.T, bias=True)[:n, n:]
        else:
            similarity = np.corrcoef(ours.T, theirs.T)[:n, n:]
        expected = linear_sum_assignment(similarity, maximize=True)[1]
        np.testing.assert_array_equal(found.permutations[name], expected)
        after = similarity[np.arange(n), expected].mean()
        np.testing.assert_allclose(found.before[name], similarity.diagonal().mean(), atol=1e-5)
        np.testing.assert_allclose(found.after[name], after, rtol=1e-4)


def test_correlations_of_large_means_are_not_rounded_away():
    """Sums of squares in float32 would lose deviations of 0.05 around 1000."""
    spec = align.PermutationSpec({"shift": ("p",)}, sizes={"p": 4})
    a, b = {"shift": jnp.full(4, 1000.0)}, {"shift": jnp.full(4, -500.0)}
    units = lambda params, x: {"p": params["shift"][None] + 0.05 * x[:, :4]}  # noqa: E731
    found = align.activation_matching(spec, units, a, b, [DATA[:48], DATA[48:]])
    np.testing.assert_array_equal(found.permutations["p"], np.arange(4))
    # What is left of a deviation in float32 is good to 6e-5 / 0.05.
    np.testing.assert_allclose(found.after["p"], 1.0, atol=1e-3)


def test_constant_units_correlate_with_none():
    spec = align.PermutationSpec({"gain": ("p",)}, sizes={"p": 3})
    a, b = {"gain": jnp.array([0.0, 1.0, 2.0])}, {"gain": jnp.array([1.0, 2.0, 0.0])}
    # The unit of gain 0 is always 0.3.
    total = DATA.sum(axis=1, keepdims=True)
    units = lambda params, x: {"p": jnp.sin(params["gain"][None] * x) + 0.3}  # noqa: E731
    found = align.activation_matching(spec, units, a, b, [total[:50], total[50:]])
    np.testing.assert_array_equal(found.permutations["p"], [2, 0, 1])
    np.testing.assert_allclose(found.after["p"], 2 / 3, rtol=1e-5)


def test_layers_and_heads_are_matched_each_by_itself_and_inner_units_inside_them():
    spec = align.PermutationSpec(
        {"w": ("layers", None, ("heads", "values"))},
        sizes={"heads": 3, "values": 4},
        stacks={"layers": 2},
        over={"heads": ("layers",), "values": ("layers", "heads")},
    )
    a = random_like({"w": jnp.ones((2, 6, 12))})
    planted = random_permutations(spec)
    b = align.apply_permutation(spec, a, planted)

    def units(params, x):
        y = jnp.tanh(jnp.einsum("bi,lihv->lbhv", x, params["w"].reshape(2, 6, 3, 4)))
        strength = jnp.sum(jnp.square(y), axis=-1)  # (layers, batch, heads)
        return {"heads": strength, "values": y.transpose(0, 2, 1, 3)}

    found = align.activation_matching(spec, units, a, b, [DATA[:30], DATA[30:]])
    for name, expected in align.invert(spec, planted).items():
        np.testing.assert_array_equal(found.permutations[name], expected)


def test_what_is_not_returned_stays():
    a = mlp_params(6, 8, 8, 3)
    spec = align.mlp_permutations(a)
    b = align.apply_permutation(spec, a, random_permutations(spec))
    only = lambda params, x: {"Dense_0": hidden(params, x)["Dense_0"]}  # noqa: E731
    found = align.activation_matching(spec, only, a, b, [DATA])
    assert list(found.after) == ["Dense_0"]
    np.testing.assert_array_equal(found.permutations["Dense_1"], np.arange(8))


def test_wrong_data_and_activations_are_refused():
    a = mlp_params(6, 8, 3)
    spec = align.mlp_permutations(a)
    match = lambda fn, data, **options: align.activation_matching(  # noqa: E731
        spec, fn, a, a, data, **options
    )
    with pytest.raises(ValueError, match="batches is empty"):
        match(hidden, [])
    with pytest.raises(ValueError, match="batches is an iterator, which can be read only once"):
        match(hidden, iter([DATA]))
    with pytest.raises(ValueError, match="measure='cosine' is none of"):
        match(hidden, [DATA], measure="cosine")
    with pytest.raises(ValueError, match="activations_fn returned 'Dense_7', which is no perm"):
        match(lambda p, x: {"Dense_7": x}, [DATA])
    with pytest.raises(ValueError, match=r"'Dense_0': activations have shape \(96, 6\)"):
        match(lambda p, x: {"Dense_0": x}, [DATA])
    with pytest.raises(ValueError, match="'Dense_0': activations are not finite"):
        match(lambda p, x: {"Dense_0": hidden(p, x)["Dense_0"] / 0.0}, [DATA])
