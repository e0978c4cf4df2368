"""Known models compute the same after every permutation of their specs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights import align
from jaxweights.core import flatten
from tests.align._models import (
    assert_preserved,
    library_model,
    mlp,
    mlp_params,
    random_permutations,
)


@pytest.mark.promotion(dtypes="standard", ranks="allow")
@pytest.mark.parametrize(
    "case", ["llama3", "llama_biases", "smollm2", "mistral", "qwen2", "qwen3", "olmo2", "bert"]
)
def test_every_family_computes_the_same_after_all_permutations_at_once(case):
    config, model, params = library_model(case)
    spec_of = align.bert_permutations if case == "bert" else align.llama_permutations
    tokens = jnp.array([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])
    assert_preserved(
        lambda params, x: model.apply({"params": params}, x), spec_of(config), params, tokens
    )


@pytest.mark.promotion(dtypes="standard", ranks="allow")
def test_encodings_are_renumbered_with_the_features_between_the_layers():
    config, model, params = library_model("bert")
    spec = align.bert_permutations(config, residual=True)
    permutations = random_permutations(spec)
    moved = align.apply_permutation(spec, params, permutations)
    tokens = jnp.array([[3, 14, 15, 9, 2, 6]])
    expected, got = (model.apply({"params": x}, tokens) for x in (params, moved))
    np.testing.assert_allclose(got, expected[..., permutations["residual"]], atol=1e-5)


def test_permutations_differ_from_layer_to_layer_and_from_head_to_head():
    config, _, params = library_model("llama3")
    spec = align.llama_permutations(config)
    assert spec.shape_of("mlp") == (3, 40)
    assert spec.shape_of("queries") == (3, 2, 2)
    assert spec.shape_of("values") == (3, 2, 16)
    assert spec.shape_of("residual") == (24,)
    assert set(spec.axes) == set(flatten(params)[0])


def test_dense_layers_chain_in_the_order_of_their_numbers():
    sizes = [3, *range(4, 14), 2]
    params = mlp_params(*sizes)
    spec = align.mlp_permutations(params)
    assert list(spec.sizes) == [f"Dense_{i}" for i in range(10)]
    assert spec.axes["Dense_10/kernel"] == ("Dense_9", None)
    assert_preserved(lambda p, x: mlp_by_number(p, x), spec, params, jnp.ones((2, 3)))


def mlp_by_number(params, x):
    return mlp({f"{int(name[6:]):02}": layer for name, layer in params.items()}, x)


def test_stated_layers_are_taken_in_the_stated_order():
    params = mlp_params(3, 5, 2)
    params = {"b": params["Dense_0"], "a": params["Dense_1"]}
    assert align.mlp_permutations(params, layers=["b", "a"]).sizes == {"b": 5}
    with pytest.raises(ValueError, match=r"'a': gives 2 features, but 'b' takes 3\. State"):
        align.mlp_permutations(params)


def test_leaves_that_belong_to_no_layer_are_refused():
    params = mlp_params(3, 5, 2) | {"odd": jnp.ones(7)}
    with pytest.raises(ValueError, match="'odd': is in none of the layers"):
        align.mlp_permutations(params)
    with pytest.raises(ValueError, match=r"'c': its kernel has shape \(3, 3, 1, 4\)"):
        align.mlp_permutations({"c": {"kernel": jnp.ones((3, 3, 1, 4))}})
    with pytest.raises(ValueError, match="'missing': has no kernel"):
        align.mlp_permutations(mlp_params(3, 5, 2), layers=["missing"])
