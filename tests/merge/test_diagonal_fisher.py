"""The Fisher information is that of every example by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint import load_tree, save_tree
from jaxweights.core import apply
from jaxweights.merge import diagonal_fisher, fisher

DRAW = np.random.default_rng(0).normal
PARAMS = {
    "kernel": jnp.asarray(DRAW(size=(3, 4)), jnp.float32),
    "bias": jnp.asarray(DRAW(size=4), jnp.float32),
    "step": jnp.asarray(3, jnp.int32),
}
X = jnp.asarray(DRAW(size=(7, 3)), jnp.float32)
LABELS = jnp.asarray([0, 1, 2, 3, 0, 1, 2])


def classifier(params, x, labels=None):
    del labels
    logits = x @ params["kernel"]
    return logits + jnp.broadcast_to(params["bias"], logits.shape)


def closed_form(x):
    """Of a linear classifier: E x_i² p_j (1 - p_j)."""
    p = np.asarray(jax.nn.softmax(classifier(PARAMS, x)), np.float64)
    p = p.reshape(-1, 4)
    x = np.asarray(x, np.float64).reshape(-1, 3)
    spread = p * (1 - p)
    return {"kernel": (x**2).T @ spread, "bias": spread.sum(0)}


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_the_exact_information_of_a_linear_classifier_is_its_closed_form(at_once):
    got = diagonal_fisher(
        classifier, PARAMS, [X[:4], X[4:]], variant="exact", examples_at_once=at_once
    )
    for name, want in closed_form(X).items():
        np.testing.assert_allclose(got[name], want / 7, rtol=1e-5)
    assert got["step"].dtype == jnp.float32 and float(got["step"]) == 0


def test_empirical_labels_give_the_squares_of_their_own_gradients():
    got = diagonal_fisher(
        classifier, PARAMS, [(X, LABELS)], variant="empirical", labels=lambda batch: batch[1]
    )
    p = np.asarray(jax.nn.softmax(classifier(PARAMS, X)), np.float64)
    residual = np.eye(4)[np.asarray(LABELS)] - p
    each = np.asarray(X, np.float64)[:, :, None] * residual[:, None]
    np.testing.assert_allclose(got["kernel"], (each**2).mean(0), rtol=1e-5)
    # The square of the batch's gradient is another thing.
    assert np.abs(each.sum(0) ** 2 - 7 * (each**2).mean(0)).max() > 0.1


def test_sampled_labels_approach_the_exact_information():
    sampled = diagonal_fisher(classifier, PARAMS, [X], key=jax.random.key(0), samples=4000)
    want = closed_form(X)["kernel"] / 7
    # Each of 28,000 draws errs by no more than a few times the mean: 5σ is within 10 percent.
    np.testing.assert_allclose(sampled["kernel"], want, rtol=0.1)
    same = diagonal_fisher(classifier, PARAMS, [X], key=jax.random.key(0), samples=4)
    other = diagonal_fisher(classifier, PARAMS, [X], key=jax.random.key(1), samples=4)
    assert np.abs(np.asarray(same["kernel"] - other["kernel"])).max() > 1e-3


def test_positions_of_a_sequence_add_up_and_masked_ones_do_not_count():
    tokens = jnp.asarray(DRAW(size=(2, 5, 3)), jnp.float32)
    whole = diagonal_fisher(classifier, PARAMS, [tokens], variant="exact")
    np.testing.assert_allclose(whole["kernel"], closed_form(tokens)["kernel"] / 2, rtol=1e-5)
    keep = jnp.asarray([[True] * 3 + [False] * 2, [True] * 5])
    part = diagonal_fisher(classifier, PARAMS, [tokens], variant="exact", mask=lambda _: keep)
    kept = jnp.concatenate([tokens[0, :3], tokens[1]])
    np.testing.assert_allclose(part["kernel"], closed_form(kept)["kernel"] / 2, rtol=1e-5)


def test_narrow_parameters_have_their_gradients_squared_in_float32():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, PARAMS)
    got = diagonal_fisher(
        lambda p, x: classifier(p, x.astype(jnp.bfloat16)), narrow, [X], variant="exact"
    )
    assert got["kernel"].dtype == jnp.float32
    assert len(np.unique(np.asarray(got["kernel"]).view(np.uint32) & 0xFFFF)) > 4


def test_saved_information_merges_without_data(tmp_path):
    models = [PARAMS, jax.tree.map(lambda x: x + jnp.ones((), x.dtype), PARAMS)]
    fishers = [diagonal_fisher(classifier, m, [X], variant="exact") for m in models]
    for i, tree in enumerate(fishers):
        save_tree(tmp_path / str(i), tree)
    loaded = [load_tree(tmp_path / str(i)).tree for i in range(2)]
    got = apply(fisher(fishers=loaded), PARAMS, models=models)
    want = apply(fisher(fishers=fishers), PARAMS, models=models)
    np.testing.assert_array_equal(got["kernel"], want["kernel"])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "'key' is missing: variant='sampled' draws labels"),
        ({"variant": "true"}, "variant='true' is not one of"),
        ({"variant": "empirical"}, "labels=, a function of the batch"),
        ({"variant": "exact", "labels": lambda b: b}, "labels=, a function of the batch"),
        ({"variant": "exact", "examples_at_once": 0}, "examples_at_once=0 must be a positive"),
        ({"variant": "exact", "batches": []}, "there is no example"),
    ],
)
def test_what_is_missing_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        diagonal_fisher(classifier, PARAMS, **({"batches": [X]} | settings))
