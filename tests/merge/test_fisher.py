"""The Fisher-weighted mean."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, apply
from jaxweights.merge import fisher, mean
from jaxweights.weights import Axes
from tests._fixtures import fixture
from tests.merge._public import NAMES, whole_checkpoint
from tests.merge._trees import assert_close, assert_same_bits, copy, finetuned, floats, tree

BASE = tree(0)
MODELS = [finetuned(BASE, seed) for seed in (1, 2, 3)]
FISHERS = [jax.tree.map(lambda x: jnp.square(x) * 1e-9, tree(seed)) for seed in (4, 5, 6)]


@pytest.mark.parametrize("case", ["fisher_plain", "fisher_coeffs", "fisher_norm_param"])
def test_it_agrees_with_public_code(case):
    arrays = fixture("merge/regmean_fisher.npz")
    settings = json.loads(str(arrays["meta"]))["cases"][case]
    want = {k.removeprefix(f"{case}/"): v for k, v in arrays.items() if k.startswith(f"{case}/")}
    models = [{path: whole_checkpoint(name)[path] for path in want} for name in NAMES]
    # The fixture's ε is absolute and added before the norm is taken.
    fishers = [
        {path: arrays[f"fisher/{i}/{path}"] + settings["fisher_smooth"] for path in want}
        for i in range(3)
    ]
    tx = fisher(
        fishers=fishers,
        weights=settings["model_coeffs"],
        normalize="leaf" if settings["fisher_normalize"] else "none",
        damping=0.0,
    )
    got = apply(tx, models[0], models=models)
    for path, expected in want.items():
        np.testing.assert_allclose(got[path], expected, rtol=0, atol=1e-6)


def test_entries_are_weighted_by_their_information():
    got = apply(fisher(fishers=FISHERS, weights=[1, 2, 3]), BASE, models=MODELS)
    shares = [w * np.asarray(f["dense"]["kernel"], np.float64) for w, f in zip([1, 2, 3], FISHERS)]
    # ε is 1e-6 of the mean, the same for all models before their weights.
    level = np.mean([np.asarray(f["dense"]["kernel"], np.float64).mean() for f in FISHERS])
    shares = [s + w * 1e-6 * level for s, w in zip(shares, [1, 2, 3])]
    kernels = [np.asarray(m["dense"]["kernel"], np.float64) for m in MODELS]
    want = sum(s * k for s, k in zip(shares, kernels)) / sum(shares)
    np.testing.assert_allclose(got["dense"]["kernel"], want, rtol=0, atol=1e-6)


def test_equal_information_gives_the_weighted_mean():
    got = apply(fisher(fishers=[FISHERS[0]] * 3, weights=[1, 2, 1]), BASE, models=MODELS)
    assert_close(got, apply(mean(weights=[1, 2, 1]), BASE, models=MODELS))


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_entries_that_matter_to_nobody_take_the_weighted_mean(damping):
    fishers = [jax.tree.map(jnp.array, f) for f in FISHERS]
    for f in fishers:
        f["dense"]["kernel"] = f["dense"]["kernel"].at[2].set(0)
        f["dense"]["bias"] = jnp.zeros(5)
    tx = fisher(fishers=fishers, weights=[1, 2, 1], damping=damping)
    got = apply(tx, BASE, models=MODELS)["dense"]
    want = apply(mean(weights=[1, 2, 1]), BASE, models=MODELS)["dense"]
    np.testing.assert_allclose(got["bias"], want["bias"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["kernel"][2], want["kernel"][2], rtol=0, atol=1e-6)
    assert np.abs(np.asarray(got["kernel"] - want["kernel"])[:2]).max() > 1e-3


def test_models_that_agree_keep_their_bits():
    tx = fisher(fishers=FISHERS)
    assert_same_bits(apply(tx, MODELS[0], models=[copy(MODELS[0])] * 3), MODELS[0])


def test_the_result_lies_between_the_models_and_near_the_one_that_cares():
    got = apply(fisher(fishers=FISHERS), BASE, models=MODELS)
    for ours, *theirs in zip(floats(got), *map(floats, MODELS), strict=True):
        step = 2e-7 * np.abs(theirs).max()
        assert (ours >= np.min(theirs, axis=0) - step).all()
        assert (ours <= np.max(theirs, axis=0) + step).all()
    strong = jax.tree.map(lambda x: jnp.full(x.shape, 1e4), FISHERS[0])
    weak = jax.tree.map(lambda x: jnp.full(x.shape, 1e-4), FISHERS[0])
    got = apply(fisher(fishers=[weak, strong, weak]), BASE, models=MODELS)
    # ε is 1e-6 of the mean information, so that each weak model keeps 3e-7 of the weight.
    assert_close(got, MODELS[1])


@pytest.mark.parametrize("normalize", ["none", "leaf", "model"])
def test_the_unit_of_the_information_does_not_matter(normalize):
    got = apply(fisher(fishers=FISHERS, normalize=normalize), BASE, models=MODELS)
    # Down to what a float32 square of a gradient can still hold.
    small = [jax.tree.map(lambda x: x * jnp.asarray(1e-18, x.dtype), f["dense"]) for f in FISHERS]
    small = [{"dense": f} for f in small]
    again = apply(fisher(fishers=small, normalize=normalize), BASE, models=MODELS)
    assert_close(again, got)


@pytest.mark.parametrize("normalize", ["leaf", "model"])
def test_normalising_lets_every_data_set_count_alike(normalize):
    got = apply(fisher(fishers=FISHERS, normalize=normalize), BASE, models=MODELS)
    loud = [jax.tree.map(lambda x: x * jnp.asarray(100, x.dtype), FISHERS[0]), *FISHERS[1:]]
    again = apply(fisher(fishers=loud, normalize=normalize), BASE, models=MODELS)
    assert_close(again, got, ulps=4)
    plain = apply(fisher(fishers=loud), BASE, models=MODELS)
    assert max(np.abs(x - y).max() for x, y in zip(floats(plain), floats(got))) > 1e-3


def test_layers_of_a_stack_have_an_epsilon_and_a_norm_of_their_own():
    draw = np.random.default_rng(0).normal
    kernels = [{"up/kernel": jnp.asarray(draw(size=(2, 4, 3)), jnp.float32)} for _ in range(2)]
    scale = jnp.asarray([1.0, 1e6], jnp.float32).reshape(2, 1, 1)
    fishers = [{"up/kernel": jnp.asarray(draw(size=(2, 4, 3)) ** 2, jnp.float32) * scale}
               for _ in range(2)]  # fmt: skip
    tx = fisher(fishers=fishers, normalize="leaf", damping=0.1)
    layout = Layout.of({"up/kernel": Axes()}, traced=True)
    got = apply(tx, kernels[0], models=kernels, layout=layout)["up/kernel"]
    for layer in range(2):
        part = lambda trees, i=layer: [{"up/kernel": t["up/kernel"][i]} for t in trees]  # noqa: E731
        alone = fisher(fishers=part(fishers), normalize="leaf", damping=0.1)
        want = apply(alone, part(kernels)[0], models=part(kernels))["up/kernel"]
        np.testing.assert_allclose(got[layer], want, rtol=0, atol=1e-6)


def test_errors_name_the_leaf_and_the_model():
    lacking = [FISHERS[0], {"dense": {"kernel": FISHERS[1]["dense"]["kernel"][:3]}}, FISHERS[2]]
    with pytest.raises(ValueError) as error:
        apply(fisher(fishers=lacking, names=["a", "b", "c"]), BASE, models=MODELS)
    assert "'dense/bias': is missing from the Fisher information of models[1] ('b')" in str(
        error.value
    )
    assert "'dense/kernel': is (3, 5) in the Fisher information" in str(error.value)
    negative = [*FISHERS[:2], jax.tree.map(lambda x: -x, FISHERS[2])]
    with pytest.raises(ValueError, match=r"'dense/bias'.* models\[2\] has entries .*negative"):
        apply(fisher(fishers=negative), BASE, models=MODELS)
    with pytest.raises(ValueError, match="fishers has 2 entries, but 3 models were given"):
        apply(fisher(fishers=FISHERS[:2]), BASE, models=MODELS)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"fishers": []}, "fishers is empty"),
        ({"normalize": "layer"}, "normalize='layer' is not one of 'none', 'leaf', 'model'"),
        ({"damping": -1e-6}, "damping=-1e-06 must not be negative"),
        ({"weights": [1, 1, -1]}, "must not be negative"),
    ],
)
def test_bad_settings_are_refused_when_built(settings, words):
    with pytest.raises(ValueError, match=words):
        fisher(**({"fishers": FISHERS} | settings))
