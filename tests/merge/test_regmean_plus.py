"""RegMean on the inputs that the merged layers give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.merge import _regmean, regmean_plus

ALPHA = 0.7


def _named(params, x):
    return (
        jax.nn.relu(x @ params["one"]["kernel"] + params["one"]["bias"][None])
        @ params["two"]["kernel"]
    )


def _model(seed):
    draw = np.random.default_rng(seed).normal
    array = lambda *shape: jnp.asarray(draw(size=shape), jnp.float32)  # noqa: E731
    return {"one": {"kernel": array(5, 6), "bias": array(6)}, "two": {"kernel": array(6, 4)}}


def _data(seed, width=5):
    draw = np.random.default_rng(seed).normal
    # Inputs of another covariance for every model.
    return [jnp.asarray(draw(size=(30, width)) @ draw(size=(width, width)), jnp.float32)]


def _fit(inputs, kernels):
    """The closed form in float64."""
    grams = []
    for x in inputs:
        gram = x.T @ x / len(x)
        grams.append(ALPHA * gram + (1 - ALPHA) * np.diag(np.diag(gram)))
    pull = sum(gram @ kernel for gram, kernel in zip(grams, kernels, strict=True))
    return np.linalg.solve(sum(grams), pull)


def test_every_layer_is_fitted_on_what_the_merged_ones_give():
    models, data = [_model(i) for i in range(3)], [_data(10 + i) for i in range(3)]
    got = regmean_plus(_named, models, data, stages=["one/.*", "two/.*"], alpha=ALPHA)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (models, data))
    trees, inputs = wide[0], [x for [x] in wide[1]]
    first = _fit(inputs, [tree["one"]["kernel"] for tree in trees])
    bias = np.mean([tree["one"]["bias"] for tree in trees], axis=0)
    hidden = [np.maximum(x @ first + bias, 0) for x in inputs]
    second = _fit(hidden, [tree["two"]["kernel"] for tree in trees])
    np.testing.assert_allclose(got["one"]["kernel"], first, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got["one"]["bias"], bias, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["two"]["kernel"], second, rtol=0, atol=1e-4)
    own = [np.maximum(x @ t["one"]["kernel"] + t["one"]["bias"], 0) for x, t in zip(inputs, trees)]
    plain = _fit(own, [tree["two"]["kernel"] for tree in trees])
    assert np.abs(plain - second).max() > 1e-2  # the case can fail


def test_stacked_layers_are_merged_one_after_the_other():
    draw = np.random.default_rng(0).normal
    kernels = jnp.asarray(draw(size=(2, 3, 4, 4)), jnp.float32)  # models, layers
    data = [_data(i, width=4) for i in range(2)]

    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"]["kernel"])[0]

    def named(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    stacked = [{"layers": {"kernel": kernel}} for kernel in kernels]
    apart = [{f"l{i}": {"kernel": layer} for i, layer in enumerate(kernel)} for kernel in kernels]
    got = regmean_plus(scanned, stacked, data, stages=["layers/kernel"])["layers"]["kernel"]
    want = regmean_plus(named, apart, data, stages=["l0/.*", "l1/.*", "l2/.*"])
    for i in range(3):
        np.testing.assert_allclose(got[i], want[f"l{i}"]["kernel"], rtol=0, atol=1e-5)


def _scanned(params, x):
    x = x @ params["embed_proj"]
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]


def test_each_layer_of_a_stack_is_solved_once(monkeypatch):
    seen = []
    solve = _regmean._regmean_of_leaves
    counted = lambda leaves, *a, **k: (seen.append(leaves[0].shape), solve(leaves, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(_regmean, "_regmean_of_leaves", counted)
    draw = np.random.default_rng(0).normal
    models = [
        {"embed_proj": jnp.eye(4), "layers": jnp.asarray(draw(size=(3, 4, 4)), jnp.float32)}
        for _ in range(2)
    ]
    regmean_plus(_scanned, models, [_data(i, width=4) for i in range(2)], stages=["layers"])
    assert seen == [(1, 4, 4)] * 3


def test_a_stated_layout_may_name_what_is_in_no_stage():
    models = [{"embed_proj": jnp.eye(4), "layers": i * jnp.ones((2, 4, 4))} for i in (0.1, 0.2)]
    data = [_data(i, width=4) for i in range(2)]
    layout = {"embed_proj": jw.Axes(), "layers": jw.Axes()}
    got = regmean_plus(_scanned, models, data, stages=["layers"], layout=layout)
    want = regmean_plus(_scanned, models, data, stages=["layers"])
    np.testing.assert_array_equal(got["layers"], want["layers"])


def test_copies_of_one_model_merge_to_it_bit_for_bit():
    model = _model(0)
    got = regmean_plus(_named, [model] * 2, [_data(1), _data(2)], stages=["one/.*", "two/.*"])
    assert jax.tree.all(jax.tree.map(np.array_equal, got, model))


def test_one_stage_of_all_matrices_of_one_layer_is_regmean():
    model = lambda params, x: x @ params["kernel"]  # noqa: E731
    models = [{"kernel": _model(i)["one"]["kernel"]} for i in range(2)]
    data = [_data(i) for i in range(2)]
    needs = jw.merge.regmean_needs(models[0])
    stats = [jw.calibrate(model, m, x, needs=needs) for m, x in zip(models, data)]
    want = jw.apply(jw.merge.regmean(stats=stats), models[0], models=models)["kernel"]
    got = regmean_plus(model, models, data, stages=["kernel"])["kernel"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"batches": [_data(0)]}, ValueError, "1 sets of batches were given for 2 models"),
        ({"batches": [iter(_data(0))] * 2}, TypeError, "Pass lists, not generators"),
        ({"stages": "one/.*"}, TypeError, r"stages='one/\.\*' is one pattern"),
        ({"stages": ["three/.*"]}, ValueError, r"'three/.\*' matches no matrix. There are \['one"),
        ({"stages": ["one/.*", ".*kernel"]}, ValueError, r"is in the stages 'one/.\*' and"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, words):
    settings = {"batches": [_data(0)] * 2, "stages": ["one/.*"]} | change
    with pytest.raises(error, match=words):
        regmean_plus(_named, [_model(0), _model(1)], settings.pop("batches"), **settings)


def test_embeddings_and_missing_models_are_refused():
    model = {"embed": jnp.ones((5, 2)), "head": jnp.eye(2)}
    run = lambda params, ids: params["embed"][ids] @ params["head"]  # noqa: E731
    data = [[jnp.arange(5)]] * 2
    with pytest.raises(ValueError, match=r"'embed': the model multiplies none .* Leave them out"):
        regmean_plus(run, [model] * 2, data, stages=["embed", "head"])
    with pytest.raises(ValueError, match="models is empty"):
        regmean_plus(run, [], [], stages=["head"])
