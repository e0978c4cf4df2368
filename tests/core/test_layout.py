"""Axes by convention, by the trace, and by statement."""

import jax
import jax.numpy as jnp
import pytest

from jaxweights.core import Layout, conventional_layout
from jaxweights.core._apply import resolve_layout
from jaxweights.core._layout import is_default_target
from jaxweights.lift import infer_layout
from jaxweights.weights import CONV_HWIO, CONV_OIHW, EMBEDDING, OUTPUTS_FIRST, Axes, Masked


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "dense": {"kernel": leaf(4, 3), "bias": leaf(3)},
    "embed": {"embedding": leaf(9, 4)},
    "conv_1": {"kernel": leaf(3, 3, 4, 8)},
    "stack": {"kernel": leaf(2, 4, 3)},
    "layers": {"norm": leaf(2, 4), "scale": leaf(2, 4)},
    "steps": leaf(2, 2, dtype=jnp.int32),
    "name": "text",
}


def test_the_conventional_layout_reads_names_and_ranks_and_leaves_the_rest_open():
    assert dict(conventional_layout(PARAMS)) == {
        "dense/kernel": Axes(),
        "embed/embedding": EMBEDDING,
        "conv_1/kernel": CONV_HWIO,
    }


def test_leaves_called_weight_have_their_outputs_first_as_in_torch_and_equinox():
    tree = {
        "layers": [{"weight": leaf(3, 4), "bias": leaf(3)}],
        "conv": {"weight": leaf(8, 4, 3, 3)},
        "embed_tokens.weight": leaf(9, 4),
        "norm": {"weight": leaf(4)},
        "model.q_proj.weight": leaf(3, 4),
        "my_weight": leaf(4, 3),
    }
    assert dict(conventional_layout(tree)) == {
        "layers/0/weight": OUTPUTS_FIRST,
        "conv/weight": CONV_OIHW,
        "embed_tokens.weight": EMBEDDING,
        "model.q_proj.weight": OUTPUTS_FIRST,
        "my_weight": Axes(),
    }


def test_a_layout_prints_a_line_for_every_matrix():
    shown = str(conventional_layout(PARAMS)).splitlines()
    assert shown[0] == "Layout of 3 matrices, conventional or stated"
    assert "dense/kernel  inputs=(-2,) outputs=(-1,)" in shown


def test_represented_weights_have_the_layout_of_the_dense_ones():
    weight = Masked(jnp.ones((4, 3)), jnp.ones((4, 3), bool))
    assert dict(conventional_layout({"kernel": weight})) == {"kernel": Axes()}


def test_stated_axes_win_over_the_traced_and_the_traced_over_the_conventional():
    model = lambda p, x: x @ p["dense"]["kernel"].T  # noqa: E731
    traced = infer_layout(model, PARAMS | {"name": 0}, leaf(5, 3))
    assert dict(resolve_layout(PARAMS, traced)) == {"dense/kernel": Axes((-1,), (-2,))}
    stated = resolve_layout(PARAMS, {"(stack|dense)/.*kernel": Axes()})
    assert stated["stack/kernel"] == stated["dense/kernel"] == Axes()
    assert stated["embed/embedding"] == EMBEDDING


def test_a_stated_pattern_that_matches_nothing_is_refused_with_the_nearest_path():
    words = r"apply: layout: pattern 'stck/kernel' matches no leaf.*'stack/kernel'"
    with pytest.raises(ValueError, match=words):
        resolve_layout(PARAMS, {"stck/kernel": Axes()})


def test_a_layout_is_a_hashable_mapping_that_jit_takes_as_static():
    layout = Layout.of({"a": Axes(), "b": EMBEDDING})
    assert (len(layout), list(layout), "a" in layout, layout.get("c")) == (
        2,
        ["a", "b"],
        True,
        None,
    )
    assert hash(layout) == hash(Layout.of({"a": Axes(), "b": EMBEDDING}))
    run = jax.jit(lambda layout: layout["b"].kind == "embedding", static_argnums=0)
    assert bool(run(layout))


@pytest.mark.parametrize(
    "path, is_target",
    [
        ("decoder/layers/mlp/up/kernel", True),
        ("header/kernel", True),
        ("lm_head/kernel", False),
        ("tok_embeddings/weight", False),
        ("embedder/input_embedding", False),
        ("layers/0/moe/router/kernel", False),
        ("layers/attn_norm", False),
        ("transformer/ln_f/scale", False),
        ("enormous/kernel", True),
        ("multi_head_attention/query/kernel", True),
        ("vit/multi_head_attn/~/query/w", True),
        ("value_head/kernel", False),
        ("PreNormBlock_0/Dense_0/kernel", True),
        ("blocks/0/norm1/linear/weight", True),
        ("model.layers.0.input_layernorm.weight", False),
        ("layers/ln_1/offset/value", False),
        ("wte/embedding", False),
    ],
)
def test_embeddings_heads_routers_and_norms_are_left_for_rules_to_name(path, is_target):
    assert is_default_target(path) == is_target
