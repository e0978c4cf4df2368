import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.align import PermutationSpec, bert_permutations, llama_permutations
from jaxweights.core import flatten
from jaxweights.models import build
from jaxweights.quantize import (
    Fold,
    Rotation,
    check_same_function,
    fuse_norms,
    llama_folds,
    random_rotation,
    rotate,
    untie_head,
)
from jaxweights.weights import Rotated
from tests.quantize._fold_models import BERT, LLAMAS, TOKENS, model

KEY = jax.random.key(3)


def case(name):
    """A model whose head is its own, with spec, folds and layout."""
    config, (fn, params, _) = LLAMAS[name], model(name)
    if config.tie_embeddings:
        params, config = untie_head(params, config)
        module = build(config)
        fn = lambda params, tokens: module.apply({"params": params}, tokens)  # noqa: E731
    return fn, params, llama_permutations(config), llama_folds(config), layout_of(fn, params)


def layout_of(fn, params):
    return jw.infer_layout(fn, params, TOKENS)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "centred"])
@pytest.mark.parametrize("size", [1, 12, 32])
def test_rotations_are_orthogonal_and_what_is_centred_keeps_the_mean(kind, size):
    rotation = random_rotation(KEY, size, kind)
    q = np.asarray(rotation.dense(), np.float64)
    assert rotation.size == size
    assert np.abs(q @ q.T - np.eye(size)).max() < 1e-6
    x = jax.random.normal(jax.random.key(1), (3, size))
    np.testing.assert_allclose(rotation(x), x @ q, atol=1e-5)
    np.testing.assert_allclose(rotation(rotation(x), transposed=True), x, atol=1e-5)
    if kind == "centred":
        np.testing.assert_allclose(rotation(x).mean(1), x.mean(1), atol=1e-5)
    elif size == 32:
        assert np.abs(rotation(x).mean(1) - x.mean(1)).max() > 0.05
    if size == 32:
        assert not np.allclose(q, random_rotation(jax.random.key(4), size, kind).dense(), atol=0.1)


@pytest.mark.parametrize("name", ["gqa", "biases", "tied"])
def test_llamas_compute_what_they_did_and_the_inverse_restores_the_weights(name):
    fn, params, spec, folds, layout = case(name)
    settings = {"widths": ("residual", "values"), "online": ("mlp",)}
    turned = jw.apply(rotate(spec, folds=folds, **settings), params, key=KEY, layout=layout)
    assert check_same_function(fn, params, turned, [TOKENS]) < 2e-5
    flat = flatten(turned)[0]
    wrapped = [path for path, leaf in flat.items() if isinstance(leaf, Rotated)]
    assert wrapped == ["layers/mlp/down/kernel"]
    for path in ("embed/embedding", "layers/attn/q/kernel", "layers/attn/o/kernel", "head/kernel"):
        assert np.abs(flat[path] - flatten(params)[0][path]).max() > 0.05
    np.testing.assert_array_equal(flat["layers/attn_norm/scale"], 1)
    fused = jw.apply(fuse_norms(folds), params, layout=layout)
    assert check_same_function(fn, params, fused, [TOKENS]) < 1e-5
    back = jw.apply(rotate(spec, **settings, inverse=True), turned, key=KEY, layout=layout)
    for a, b in zip(*map(jax.tree.leaves, (fused, back)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()))
    # Rows keep their norms: turns, not scales.
    table = flatten(fused)[0]["embed/embedding"]
    np.testing.assert_allclose(
        *(jnp.linalg.norm(x, axis=1) for x in (flat["embed/embedding"], table)), rtol=1e-5
    )


def test_bert_turns_its_values_and_refuses_its_residual_stream():
    fn, params, _ = model("bert")
    turned = jw.apply(
        rotate(bert_permutations(BERT), widths=["values"], online=["mlp"]),
        params,
        key=KEY,
        layout=layout_of(fn, params),
    )
    assert check_same_function(fn, params, turned, [TOKENS]) < 1e-5
    assert not np.allclose(
        turned["layers"]["attn"]["v"]["bias"], params["layers"]["attn"]["v"]["bias"]
    )
    with pytest.raises(
        ValueError,
        match=r"quantize.rotate: cannot turn 'residual': 'embed/norm/scale' scales it entry by",
    ):
        jw.apply(rotate(bert_permutations(BERT, residual=True)), params, key=KEY)


def test_post_norms_and_tied_heads_are_refused_with_the_remedy():
    for name in ("tied", "post"):
        fn, params, folds = model(name)
        tx = rotate(llama_permutations(LLAMAS[name]), folds=folds)
        path = {"tied": "final_norm/scale", "post": "layers/attn_post_norm/scale"}[name]
        with pytest.raises(ValueError, match=rf"{path}' scales it .* untie_head\(params, config\)"):
            jw.apply(tx, params, key=KEY, layout=layout_of(fn, params))
    with pytest.raises(ValueError, match=r"tie_embeddings is False. Nothing is tied"):
        untie_head({}, LLAMAS["gqa"])


def pre_layer_norm():
    """Two residual blocks behind LayerNorms with gains and biases, and a final one."""
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)  # noqa: E731
    block = lambda i: {  # noqa: E731
        "norm": {"scale": 1 + 0.3 * draw(i, 16), "bias": draw(i + 1, 16)},
        "up": {"kernel": draw(i + 2, 16, 24), "bias": draw(i + 3, 24)},
        "down": {"kernel": draw(i + 4, 24, 16), "bias": draw(i + 5, 16)},
    }
    params = {"embed": {"kernel": draw(0, 5, 16)}, "b0": block(10), "b1": block(20)}
    axes = {"embed/kernel": (None, "stream")}
    for b in ("b0", "b1"):
        axes |= {f"{b}/norm/{x}": ("stream",) for x in ("scale", "bias")}
        axes |= {f"{b}/up/kernel": ("stream", None), f"{b}/up/bias": (None,)}
        axes |= {f"{b}/down/kernel": (None, "stream"), f"{b}/down/bias": ("stream",)}
    params["b2"] = {"norm": block(30)["norm"], "up": block(30)["up"]}
    axes |= {
        f"b2/{p}": axes[f"b1/{p}"] for p in ("norm/scale", "norm/bias", "up/kernel", "up/bias")
    }
    folds = [
        Fold(
            r"(b\d)/up/kernel",
            r"(b\d)/norm/scale",
            shifts=r"(b\d)/norm/bias",
            biases=r"(b\d)/up/bias",
        )
    ]

    def fn(p, x):
        x = x @ p["embed"]["kernel"]
        for b in ("b0", "b1", "b2"):
            n = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
            n = n * p[b]["norm"]["scale"][None] + p[b]["norm"]["bias"][None]
            h = n @ p[b]["up"]["kernel"] + p[b]["up"]["bias"][None]
            if b == "b2":
                return h
            x = x + jnp.tanh(h) @ p[b]["down"]["kernel"] + p[b]["down"]["bias"][None]

    return fn, params, PermutationSpec.of(params, axes), folds


def test_models_with_layer_norm_keep_it_when_rotations_keep_the_mean():
    fn, params, spec, folds = pre_layer_norm()
    x = jax.random.normal(jax.random.key(9), (7, 5))
    fused = jw.apply(fuse_norms(folds), params)
    assert check_same_function(fn, params, fused, [x]) < 1e-5
    assert not np.asarray(fused["b0"]["norm"]["bias"]).any()
    tx = rotate(spec, folds=folds, widths=["stream"], kind="centred")
    turned = jw.apply(tx, params, key=KEY)
    assert check_same_function(fn, params, turned, [x]) < 1e-5
    assert np.abs(turned["embed"]["kernel"] - params["embed"]["kernel"]).max() > 0.1
    with pytest.raises(ValueError, match=r"'b0/norm/bias': belongs to a LayerNorm.*kind='centred'"):
        jw.apply(rotate(spec, folds=folds, widths=["stream"]), params, key=KEY)
    wrong = {"stream": random_rotation(KEY, 16)}
    forced = jw.apply(
        rotate(spec, folds=folds, widths=["stream"], kind="centred", rotations=wrong), params
    )
    with pytest.raises(ValueError, match="differs by"):
        check_same_function(fn, params, forced, [x])


def test_a_bias_that_no_reader_can_take_is_refused():
    _, params, _, folds = pre_layer_norm()
    short = [dataclasses.replace(folds[0], biases=None)]
    with pytest.raises(
        ValueError, match=r"'b0/norm/bias': is not zero, and its reader 'b0/up/kern"
    ):
        jw.apply(fuse_norms(short), params)
    for b in ("b0", "b1", "b2"):
        params[b]["norm"]["bias"] = jnp.zeros(16)
    np.testing.assert_array_equal(jw.apply(fuse_norms(short), params)["b0"]["norm"]["scale"], 1)
    with pytest.raises(ValueError, match="none of the folds has a norm's gain as its writer"):
        jw.apply(fuse_norms(Fold("b0/down/kernel", "b0/up/kernel")), params)


def test_gains_stored_less_one_become_zero():
    params = {"norm": jnp.array([1.0, -0.5]), "kernel": jnp.ones((2, 1))}
    fused = jw.apply(fuse_norms(Fold("kernel", "norm", one_plus=True)), params)
    assert fused["norm"].tolist() == [0, 0]
    assert fused["kernel"].tolist() == [[2.0], [0.5]]


def test_fusing_is_the_same_under_jit_and_works_on_abstract_values():
    _, params, _, folds, layout = case("gqa")
    run = lambda p: jw.apply(fuse_norms(folds), p, layout=layout)  # noqa: E731
    for a, b in zip(*map(jax.tree.leaves, (run(params), jax.jit(run)(params))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert jax.eval_shape(run, params)["head"]["kernel"].shape == (32, 64)


def test_rotated_activations_have_no_outliers_and_quantize_better():
    key_w, key_x = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(key_w, (64, 32))
    x = jax.random.normal(key_x, (128, 64)).at[:, 5].mul(60.0)
    rotation = random_rotation(KEY, 64)

    def fake(a, axis):
        scale = jnp.abs(a).max(axis, keepdims=True) / 7
        return jnp.round(a / scale) * scale

    def error(x, w):
        return float(jnp.linalg.norm(fake(x, 1) @ fake(w, 0) - x @ w) / jnp.linalg.norm(x @ w))

    def kurtosis(a):
        return float(jnp.mean(a**4) / jnp.mean(a**2) ** 2)

    turned = rotation(x), rotation(weight.T).T
    np.testing.assert_allclose(turned[0] @ turned[1], x @ weight, atol=2e-2)
    assert kurtosis(turned[0]) < 0.2 * kurtosis(x)
    assert error(*turned) < error(x, weight)


def test_settings_and_trees_that_cannot_be_are_refused():
    _, params, spec, folds, layout = case("gqa")
    for settings, message in (
        ({"widths": ["resid"]}, r"'resid' is no width of the spec. Its widths are \['residual'"),
        ({"kind": "qr"}, "kind='qr' is unknown"),
        ({"online": ["values"]}, "'values' is both in widths and in online"),
        ({"rotations": {"mlp": Rotation(jnp.ones(48))}}, "'mlp' is not among widths="),
        ({"rotations": {"values": Rotation(jnp.ones(3))}}, r"has size 3, but the width has 8"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate(spec, **settings)
    tx = rotate(spec, folds=folds)
    with pytest.raises(ValueError, match=r"quantize.rotate: 'key' is missing"):
        jw.apply(tx, params, layout=layout)
    quantized = jw.apply(jw.quantize.round_to_nearest(bits=8), params, layout=layout)
    with pytest.raises(ValueError, match=r"'layers/attn/q/kernel': is a Quantized, and only dense"):
        jw.apply(tx, quantized, key=KEY, layout=layout)
    with pytest.raises(ValueError, match=r"the tree has none of the leaves that carry 'residual'"):
        jw.apply(rotate(spec), {"other": jnp.ones(3)}, key=KEY)
    with pytest.raises(ValueError, match=r"online=\['mlp'\]: no weight of the layout has such inp"):
        jw.apply(rotate(spec, widths=[], online=["mlp"]), params)
