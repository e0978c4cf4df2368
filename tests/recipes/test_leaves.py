"""What became of each leaf agrees with slow arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout
from jaxweights.recipes import parse_recipe
from jaxweights.recipes._leaves import compare_leaves, error_grid, spectra, tree_bytes
from jaxweights.weights import EMBEDDING, Axes, Masked

LAYOUT = Layout.of(
    {"layers/up/kernel": Axes(), "embed/embedding": EMBEDDING, "head/kernel": Axes()}, traced=True
)


@pytest.fixture
def trees():
    rng = np.random.default_rng(0)
    before = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "head": {"kernel": jnp.ones((4, 5))},
        "layers": {
            "bias": jnp.ones((3, 6)),
            "steps": jnp.arange(3),
            "up": {"kernel": jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)},
        },
    }
    kernel = before["layers"]["up"]["kernel"]
    mask = jnp.asarray(rng.random(kernel.shape) < 0.5)
    up = {"kernel": Masked(kernel, mask)}
    after = {**before, "layers": {**before["layers"], "up": up}}
    return before, after, np.asarray(kernel), np.asarray(mask)


def recipe(**keys):
    step = "".join(f", {key}: '{value}'" for key, value in keys.items())
    return parse_recipe(
        "model: {path: x}\n"
        f"transforms: [{{method: sparsify.magnitude, sparsity: 0.5{step}}}]\n"
        "output: {directory: y}\n"
    )


def test_errors_and_zeros_are_those_of_each_layer(trees):
    before, after, kernel, mask = trees
    leaves = {leaf.path: leaf for leaf in compare_leaves(before, after, LAYOUT, recipe())}
    up = leaves["layers/up/kernel"]
    lost = np.where(mask, 0, kernel)
    expected = [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(lost, kernel, strict=True)]
    np.testing.assert_allclose(up.errors, expected, rtol=1e-6)
    np.testing.assert_allclose(up.error, np.sqrt(np.mean(np.square(expected))), rtol=1e-6)
    np.testing.assert_allclose(up.zeros, 1 - mask.mean())
    assert up.bytes_before == 4 * kernel.size
    assert up.bytes_after == 5 * kernel.size  # a float32 and a bool each
    assert error_grid(tuple(leaves.values())) == {"up": up.errors}


def test_each_leaf_that_stays_has_its_reason(trees):
    before, after, *_ = trees
    why = {leaf.path: leaf.why for leaf in compare_leaves(before, after, LAYOUT, recipe())}
    assert why["layers/up/kernel"] == ""
    assert why["embed/embedding"] == "an embedding: left alone unless a `match` names it"
    assert why["head/kernel"].startswith("an embedding, head, router or norm")
    assert why["layers/bias"].startswith("a vector")
    assert why["layers/steps"] == "holds int32, not real numbers"


def test_a_recipe_with_patterns_is_the_reason_itself(trees):
    before, after, *_ = trees
    chosen = recipe(match="layers/up/kernel")
    why = {leaf.path: leaf.why for leaf in compare_leaves(before, after, LAYOUT, chosen)}
    assert why["head/kernel"] == "no step's `match` names it"
    spared = recipe(**{"except": "head/.*"})
    why = {leaf.path: leaf.why for leaf in compare_leaves(before, after, LAYOUT, spared)}
    assert why["head/kernel"] == "excepted by the recipe: head/.*"


def test_spectra_are_singular_values_of_the_middle_layer(trees):
    before, after, kernel, mask = trees
    leaves = compare_leaves(before, after, LAYOUT, recipe())
    ((name, (old, new)),) = spectra(before, after, LAYOUT, leaves).items()
    assert name == "up, layer 1"
    # Through the Gram matrix in float64, of float32 weights.
    np.testing.assert_allclose(old, np.linalg.svd(kernel[1], compute_uv=False), rtol=1e-5)
    pruned = np.where(mask, kernel, 0)[1]
    np.testing.assert_allclose(new, np.linalg.svd(pruned, compute_uv=False), rtol=1e-4, atol=1e-6)


def test_tied_arrays_count_once():
    table = jnp.ones((8, 4))
    assert tree_bytes({"embed": table, "head": table, "other": jnp.ones(2)}) == 4 * 32 + 8
