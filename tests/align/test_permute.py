"""Permutations form a group, and move leaves as NumPy indexing does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights import align
from jaxweights.core import apply, flatten
from tests.align._models import assert_preserved, mlp, mlp_params, random_like, random_permutations

SPEC = align.PermutationSpec(
    {
        "embed": (None, "residual"),
        "q": ("layers", "residual", ("heads", "queries", 2)),
        "o": ("layers", ("heads", "queries", 2), "residual"),
        "experts": ("layers", "expert", "residual", "mlp"),
        "router": ("layers", "residual", "expert"),
        "step": (),
    },
    sizes={"residual": 5, "heads": 3, "queries": 4, "expert": 3, "mlp": 6},
    stacks={"layers": 2},
    over={
        "heads": ("layers",),
        "queries": ("layers", "heads"),
        "expert": ("layers",),
        "mlp": ("layers", "expert"),
    },
)
PARAMS = random_like(
    {
        "embed": jnp.ones((7, 5)),
        "q": jnp.ones((2, 5, 24)),
        "o": jnp.ones((2, 24, 5)),
        "experts": jnp.ones((2, 3, 5, 6)),
        "router": jnp.ones((2, 5, 3)),
    }
) | {"step": jnp.int32(3)}


def test_every_entry_comes_from_where_its_permutations_point():
    perms = random_permutations(SPEC)
    moved = jax.tree.map(np.asarray, align.apply_permutation(SPEC, PARAMS, perms))
    r, h, u, e, m = (perms[name] for name in ("residual", "heads", "queries", "expert", "mlp"))
    q, experts = np.asarray(PARAMS["q"]).reshape(2, 5, 3, 4, 2), np.asarray(PARAMS["experts"])
    for layer in range(2):
        for i in range(5):
            for head in range(3):
                for query in range(4):
                    # The query's permutation is that of the head's new place.
                    source = q[layer, r[i], h[layer, head], u[layer, head, query]]
                    got = moved["q"].reshape(q.shape)[layer, i, head, query]
                    np.testing.assert_array_equal(got, source)
            for expert in range(3):
                for k in range(6):
                    source = experts[layer, e[layer, expert], r[i], m[layer, expert, k]]
                    assert moved["experts"][layer, expert, i, k] == source
    np.testing.assert_array_equal(moved["embed"], np.asarray(PARAMS["embed"])[:, r])
    assert moved["step"] == 3


def test_an_inverse_undoes_and_a_composition_does_one_after_the_other():
    first, second = random_permutations(SPEC, 1), random_permutations(SPEC, 2)
    once = align.apply_permutation(SPEC, PARAMS, first)
    twice = align.apply_permutation(SPEC, once, second)
    both = align.compose(SPEC, first, second)
    back = align.invert(SPEC, first)
    for path, leaf in flatten(PARAMS)[0].items():
        np.testing.assert_array_equal(
            align.apply_permutation(SPEC, PARAMS, both)[path], twice[path]
        )
        np.testing.assert_array_equal(align.apply_permutation(SPEC, once, back)[path], leaf)
    for name, array in SPEC.identity().items():
        np.testing.assert_array_equal(align.compose(SPEC, first, back)[name], array)
        np.testing.assert_array_equal(align.compose(SPEC, back, first)[name], array)


def test_permutations_that_are_not_listed_stay():
    perms = random_permutations(SPEC)
    moved = align.apply_permutation(SPEC, PARAMS, {"expert": perms["expert"]})
    np.testing.assert_array_equal(moved["q"], PARAMS["q"])
    assert not np.array_equal(moved["router"], PARAMS["router"])


def test_permutations_may_be_traced_and_trees_abstract():
    perms = random_permutations(SPEC)
    plain = align.apply_permutation(SPEC, PARAMS, perms)
    traced = jax.jit(lambda tree, perms: align.apply_permutation(SPEC, tree, perms))(PARAMS, perms)
    jax.tree.map(np.testing.assert_array_equal, traced, plain)
    shapes = jax.eval_shape(lambda tree: align.apply_permutation(SPEC, tree, perms), PARAMS)
    assert shapes["q"].shape == (2, 5, 24)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn])
def test_narrow_leaves_are_moved_bit_for_bit(dtype):
    spec = align.PermutationSpec({"x": (None, "p")}, sizes={"p": 4})
    x = jnp.arange(12).reshape(3, 4).astype(dtype)
    moved = align.apply_permutation(spec, {"x": x}, {"p": [3, 1, 0, 2]})["x"]
    assert moved.dtype == dtype
    np.testing.assert_array_equal(np.asarray(moved), np.asarray(x)[:, [3, 1, 0, 2]])


def test_a_renumbered_mlp_computes_the_same_and_keeps_its_singular_values():
    params = mlp_params(4, 9, 7, 3)
    spec = align.mlp_permutations(params)
    assert_preserved(mlp, spec, params, jnp.linspace(-1, 1, 8).reshape(2, 4))
    moved = align.apply_permutation(spec, params, random_permutations(spec))
    for name, layer in params.items():
        ours, theirs = (np.linalg.svd(x[name]["kernel"])[1] for x in (params, moved))
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
        assert layer["kernel"].dtype == moved[name]["kernel"].dtype


def test_all_that_is_wrong_with_permutations_is_one_message():
    with pytest.raises(ValueError) as error:
        align.apply_permutation(
            SPEC,
            PARAMS,
            {
                "residual": [0, 1, 2, 3, 3],
                "heads": np.arange(3),
                "expert": np.zeros((2, 3)),
                "mpl": [0],
            },
        )
    text = str(error.value)
    for words in (
        "'residual': is no permutation: some of 0 to 4 occur twice, others never",
        "'heads': has shape (3,). The spec asks for (2, 3)",
        "'expert': has dtype float64. Indices are integers",
        "'mpl' is no permutation of the spec. Its permutations are 'mlp'",
    ):
        assert words in text, (words, text)


def test_the_transform_moves_leaves_in_a_tree_and_one_by_one():
    perms = random_permutations(SPEC)
    tx = align.permute(SPEC, perms)
    assert tx.moves_inputs and tx.scope == "leaf"
    expected = align.apply_permutation(SPEC, PARAMS, perms)
    jax.tree.map(np.testing.assert_array_equal, apply(tx, PARAMS), expected)
    for path, leaf in PARAMS.items():
        np.testing.assert_array_equal(apply(tx, {path: leaf})[path], expected[path])
    other = apply(tx, {"unknown": jnp.arange(3)})
    np.testing.assert_array_equal(other["unknown"], np.arange(3))
    with pytest.raises(ValueError, match="permute: 'q': axis 1 has length 4, but 'residual' has 5"):
        apply(tx, {"q": jnp.ones((2, 4, 24))})
    with pytest.raises(ValueError, match="permute: 'mpl' is no permutation of the spec"):
        align.permute(SPEC, {"mpl": [0]})
