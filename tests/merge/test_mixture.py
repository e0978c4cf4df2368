"""Merges as functions of their coefficients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, apply
from jaxweights.merge import _mixture, mixture, task_arithmetic
from jaxweights.weights import Axes
from tests.merge._trees import assert_close, finetuned, tree

BASE = tree(0)
MODELS = [finetuned(BASE, seed, 0.5) for seed in (1, 2, 3)]
X = jnp.asarray(np.random.default_rng(9).normal(size=(6, 7)), jnp.float32)


def loss(params, x):
    hidden = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    return jnp.mean(jnp.tanh(hidden) ** 2 + jnp.sin(hidden))


def draws(*shape):
    return jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)


def test_one_group_is_task_arithmetic():
    weights = jnp.asarray([0.5, -0.2, 1.0])
    want = apply(task_arithmetic(weights=[0.5, -0.2, 1.0]), BASE, models=MODELS)
    assert_close(mixture(BASE, MODELS).merge(weights[:, None]), want)


def test_every_leaf_and_group_takes_its_own_coefficient():
    mix = mixture(BASE, MODELS, groups="leaf")
    assert mix.names == ("dense/bias", "dense/kernel") and mix.shape == (3, 2)
    coefficients = draws(3, 2)
    got = mix.merge(coefficients)["dense"]
    for g, name in enumerate(("bias", "kernel")):
        base = np.asarray(BASE["dense"][name])
        want = base + sum(
            float(c) * (np.asarray(m["dense"][name]) - base)
            for c, m in zip(coefficients[:, g], MODELS)
        )
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-5)
    own = mixture(BASE, MODELS, groups=lambda path: path.split("/")[1][0])
    assert own.names == ("b", "k")


@pytest.mark.parametrize("groups", ["tree", "leaf"])
def test_the_gradient_is_that_of_the_merge_and_of_finite_differences(groups):
    mix = mixture(BASE, MODELS, groups=groups)
    coefficients = draws(*mix.shape)
    value, grad = mix.value_and_grad(loss)(coefficients, X)
    of = lambda c: loss(mix.merge(c), X)  # noqa: E731
    np.testing.assert_allclose(value, of(coefficients), rtol=1e-6)
    np.testing.assert_allclose(grad, jax.grad(of)(coefficients), rtol=1e-5, atol=1e-6)
    for index in np.ndindex(*mix.shape):
        step = jnp.zeros(mix.shape).at[index].set(1e-2)
        slope = (of(coefficients + step) - of(coefficients - step)) / 2e-2
        # The third derivative leaves 1e-4, float32 differences of 1e-7 over 2e-2 leave 1e-5.
        np.testing.assert_allclose(grad[index], slope, rtol=0, atol=2e-3)
    assert np.abs(grad).max() > 0.05


def test_stacked_layers_have_coefficients_of_their_own():
    normal = np.random.default_rng(3).normal
    make = lambda: {  # noqa: E731
        "layers": {
            "kernel": jnp.asarray(normal(size=(2, 3, 4)), jnp.float32),
            "norm": jnp.asarray(normal(size=(2, 4)), jnp.float32),
        },
        "head": jnp.asarray(normal(size=(4,)), jnp.float32),
    }
    base, *models = [make() for _ in range(3)]
    layout = Layout.of({"layers/kernel": Axes()}, traced=True)
    mix = mixture(base, models, groups="layer", layout=layout)
    assert mix.names == (
        "head",
        "layers/kernel[0]",
        "layers/kernel[1]",
        "layers/norm[0]",
        "layers/norm[1]",
    )
    coefficients = draws(2, 5)
    got = mix.merge(coefficients)["layers"]
    for layer in range(2):
        for name, group in (("kernel", 1 + layer), ("norm", 3 + layer)):
            start = base["layers"][name][layer]
            want = start + sum(
                coefficients[i, group] * (m["layers"][name][layer] - start)
                for i, m in enumerate(models)
            )
            np.testing.assert_allclose(got[name][layer], want, rtol=0, atol=1e-5)
    of = lambda p: jnp.sum(jnp.sin(p["layers"]["kernel"])) + jnp.sum(p["layers"]["norm"] ** 2)  # noqa: E731
    grad = mix.value_and_grad(of)(coefficients)[1]
    want = jax.grad(lambda c: of(mix.merge(c)))(coefficients)
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(grad[:, 0], 0)


def test_memory_does_not_grow_with_the_number_of_models(monkeypatch):
    base = {f"w{i}": np.zeros((32, 32), np.float32) for i in range(8)}
    models = [
        jax.tree.map(lambda x, i=i: np.full(x.shape, i, np.float32), base) for i in range(1, 17)
    ]
    alive = []
    dot = _mixture._dot_delta

    def watched(*args, **kwargs):
        result = dot(*args, **kwargs)
        alive.append(sum(x.nbytes for x in jax.live_arrays()))
        return result

    monkeypatch.setattr(_mixture, "_dot_delta", watched)
    peaks = []
    for count in (2, 16):
        alive.clear()
        mix = mixture(base, models[:count])
        run = mix.value_and_grad(lambda p: sum(jnp.sum(x) for x in p.values()))
        _, grad = run(mix.full(0.1))
        np.testing.assert_allclose(grad[:, 0], 8 * 1024 * np.arange(1, count + 1), rtol=1e-6)
        peaks.append(max(alive))
    # The merged model and its gradient are 64 KiB; fourteen more models would be 448 KiB.
    assert peaks[1] - peaks[0] < 4096


def test_narrow_models_can_be_merged_into_float32():
    narrow = lambda t: jax.tree.map(lambda x: x.astype(jnp.bfloat16), t["dense"])  # noqa: E731
    mix = mixture(narrow(BASE), [narrow(m) for m in MODELS], out_dtype=jnp.float32)
    assert mix.merge(mix.full(0.1))["kernel"].dtype == jnp.float32
    plain = mixture(narrow(BASE), [narrow(m) for m in MODELS])
    assert plain.merge(plain.full(0.1))["kernel"].dtype == jnp.bfloat16
    got = plain.value_and_grad(lambda p: jnp.sum(p["kernel"].astype(jnp.float32)))(plain.full(0.1))
    want = [
        jnp.sum((narrow(m)["kernel"] - narrow(BASE)["kernel"]).astype(jnp.float32)) for m in MODELS
    ]
    np.testing.assert_allclose(got[1][:, 0], want, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_population_scores_as_its_members_do(at_once):
    mix = mixture(BASE, MODELS, groups="leaf")
    population = draws(5, *mix.shape)
    got = mix.evaluate(loss, at_once=at_once)(population, X)
    want = [loss(mix.merge(c), X) for c in population]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_it_can_be_an_argument_of_a_jitted_function():
    mix = mixture(BASE, MODELS)
    run = jax.jit(lambda m, c: loss(m.merge(c), X))
    np.testing.assert_allclose(
        run(mix, mix.full(0.3)), loss(mix.merge(mix.full(0.3)), X), rtol=1e-5
    )


def test_what_does_not_fit_is_refused():
    mix = mixture(BASE, MODELS)
    with pytest.raises(ValueError, match=r"shape \(3,\), but there are 3 models and 1 groups"):
        mix.merge(jnp.ones(3))
    with pytest.raises(ValueError, match="groups='layers' is not one of"):
        mixture(BASE, MODELS, groups="layers")
    with pytest.raises(ValueError, match=r"merge.mixture: models\[0\] lacks \['dense/bias'\]"):
        mixture(BASE, [{"dense": {"kernel": BASE["dense"]["kernel"]}}])
    with pytest.raises(ValueError, match="at_once=0 must be a positive integer"):
        mix.evaluate(loss, at_once=0)
