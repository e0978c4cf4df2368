"""Coefficients learned by gradient descent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxweights.core import apply
from jaxweights.merge import adamerging, learned_soup, mean, task_arithmetic
from tests.merge._trees import assert_close, finetuned, tree

pytestmark = pytest.mark.promotion(dtypes="standard")  # optax multiplies floats by integers

BASE = tree(0)
MODELS = [finetuned(BASE, seed, 0.5) for seed in (1, 2, 3)]
X = jnp.asarray(np.random.default_rng(9).normal(size=(16, 7)), jnp.float32)


def logits(params, x):
    return x @ params["dense"]["kernel"] + params["dense"]["bias"][None]


LABELS = jnp.argmax(logits(MODELS[1], X), axis=-1)


def cross_entropy(params, x, labels, logit_scale=1.0):
    scaled = logit_scale * logits(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(scaled, labels).mean()


def test_a_soup_that_learned_nothing_is_uniform():
    found = learned_soup(MODELS, cross_entropy, [(X, LABELS)], epochs=0)
    assert_close(found.params, apply(mean(), BASE, models=MODELS), ulps=4)
    np.testing.assert_allclose(found.coefficients, 1 / 3, rtol=1e-6)
    assert found.losses == [] and found.groups == ("dense/bias", "dense/kernel")


def test_a_soup_learns_which_model_the_data_wants():
    found = learned_soup(MODELS, cross_entropy, [(X, LABELS)], epochs=40)
    assert found.losses[-1] < found.losses[0] - 0.01
    np.testing.assert_allclose(found.coefficients.sum(0), 1, rtol=1e-6)
    assert (np.argmax(found.coefficients, axis=0) == 1).all()
    uniform = float(cross_entropy(apply(mean(), BASE, models=MODELS), X, LABELS))
    assert float(cross_entropy(found.params, X, LABELS)) < uniform


def test_the_first_step_follows_the_gradient_of_the_shares():
    found = learned_soup(
        MODELS, cross_entropy, [(X, LABELS)], epochs=1, groups="tree", optimizer=optax.sgd(0.1)
    )

    def of(a):
        shares = jax.nn.softmax(a)
        mixed = jax.tree.map(lambda *x: sum(s * y for s, y in zip(shares, x)),
                             *[m["dense"] for m in MODELS])  # fmt: skip
        return cross_entropy({"dense": mixed}, X, LABELS)

    want = jax.nn.softmax(-0.1 * jax.grad(of)(jnp.zeros(3)))
    np.testing.assert_allclose(found.coefficients[:, 0], want, rtol=0, atol=1e-6)
    assert np.ptp(np.asarray(want)) > 1e-4


def test_the_scale_of_the_logits_can_be_learned_beside():
    found = learned_soup(MODELS, cross_entropy, [(X, LABELS)], epochs=20, learn_scale=True)
    plain = learned_soup(MODELS, cross_entropy, [(X, LABELS)], epochs=20)
    assert found.losses[0] == plain.losses[0] and found.losses[-1] < plain.losses[-1]


def test_no_step_of_adamerging_is_task_arithmetic():
    found = adamerging(BASE, MODELS, logits, [], start=0.3)
    assert_close(found.params, apply(task_arithmetic(scale=0.3), BASE, models=MODELS))


@pytest.mark.parametrize("groups, shape", [("tree", (3, 1)), ("leaf", (3, 2))])
def test_adamerging_makes_predictions_more_certain(groups, shape):
    second = lambda params, x: -logits(params, x)  # noqa: E731
    found = adamerging(
        BASE,
        MODELS,
        [logits, second],
        [(X, X[:8])] * 30,
        groups=groups,
        optimizer=optax.adam(1e-2),
    )
    assert found.coefficients.shape == shape
    assert all(b <= a + 1e-6 for a, b in zip(found.losses, found.losses[1:]))
    assert found.losses[-1] < found.losses[0] - 1e-3
    entropies = [
        -(jax.nn.softmax(fn(found.params, x)) * jax.nn.log_softmax(fn(found.params, x))).sum(-1)
        for fn, x in ((logits, X), (second, X[:8]))
    ]
    assert float(sum(e.mean() for e in entropies) / 2) < found.losses[0]


def test_coefficients_stay_between_zero_and_one():
    found = adamerging(BASE, MODELS, logits, [X] * 20, optimizer=optax.sgd(100.0))
    values = np.asarray(found.coefficients)
    assert values.min() >= 0 and values.max() <= 1 and (values == 1).any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a step has 1 batches, but there are 2 tasks"):
        adamerging(BASE, MODELS, [logits, logits], [(X,)])
    with pytest.raises(ValueError, match=r"start=1.3 must lie in \[0, 1\]"):
        adamerging(BASE, MODELS, logits, [X], start=1.3)
    with pytest.raises(ValueError, match="models is empty"):
        learned_soup([], cross_entropy, [])
    with pytest.raises(ValueError, match="epochs=-1 must be a number of passes"):
        learned_soup(MODELS, cross_entropy, [], epochs=-1)
