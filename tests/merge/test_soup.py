"""Greedy soup never gets worse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import greedy_soup, mean
from tests._fixtures import fixture
from tests.merge._trees import assert_close, assert_same_bits, finetuned, tree

BASE = tree(0)
MODELS = [finetuned(BASE, seed, 0.5) for seed in (1, 2, 3, 4)]


def nearness(params):
    """Falls with the distance to the base, which the mean of random changes is nearest to."""
    return -float(jnp.square(params["dense"]["kernel"] - BASE["dense"]["kernel"]).sum())


def test_it_takes_the_ingredients_that_the_authors_take():
    arrays = fixture("merge/greedy_soup.npz")
    with jax.enable_x64(True):
        models = [
            {name: jnp.asarray(arrays[f"model_{i}/{name}"]) for name in ("weight", "bias")}
            for i in range(6)
        ]

        def accuracy(params):
            logits = arrays["x"] @ np.asarray(params["weight"]).T + np.asarray(params["bias"])
            return float((logits.argmax(-1) == arrays["y"]).mean())

        soup, history = greedy_soup(models, accuracy, accept="gt")
        np.testing.assert_allclose([s.own_score for s in sorted(history)], arrays["accuracies"])
        kept = [step.model for step in history if step.kept]
        assert kept == arrays["ingredients"].tolist()
        assert max(step.soup_score for step in history if step.kept) == arrays["best_accuracy"]
        for name in ("weight", "bias"):
            assert soup[name].dtype == jnp.float64
            np.testing.assert_allclose(soup[name], arrays[f"soup/{name}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("accept", ["ge", "gt"])
def test_the_soup_is_at_least_as_good_as_the_best_model(accept):
    soup, history = greedy_soup(MODELS, nearness, accept=accept)
    assert nearness(soup) >= max(map(nearness, MODELS))
    assert [s.own_score for s in history] == sorted(map(nearness, MODELS), reverse=True)
    kept = [step.model for step in history if step.kept]
    assert 1 < len(kept)
    assert_close(soup, apply(mean(), BASE, models=[MODELS[i] for i in kept]))


def test_a_score_that_does_not_care_gives_all_or_one():
    soup, history = greedy_soup(MODELS, lambda params: 1.0)
    assert_close(soup, apply(mean(), BASE, models=MODELS))
    assert [step.model for step in history] == [0, 1, 2, 3]
    soup, history = greedy_soup(MODELS, lambda params: 1.0, accept="gt")
    assert_same_bits(soup, MODELS[0])
    assert [step.kept for step in history] == [True, False, False, False]


def test_one_model_is_its_own_soup():
    soup, history = greedy_soup(MODELS[:1], nearness)
    assert_same_bits(soup, MODELS[0])
    assert len(history) == 1


def test_models_are_loaded_one_at_a_time_and_known_scores_are_used():
    loaded = []

    def source(i):
        def load():
            loaded.append(i)
            return MODELS[i]

        return load

    scores = [nearness(m) for m in MODELS]
    soup, history = greedy_soup([source(i) for i in range(4)], nearness, scores=scores)
    assert loaded == [step.model for step in history]
    assert_same_bits(soup, greedy_soup(MODELS, nearness)[0])


def test_errors_name_the_model():
    with pytest.raises(ValueError, match="models is empty"):
        greedy_soup([], nearness)
    with pytest.raises(ValueError, match=r"the score of models\[1\] \('b'\) is NaN"):
        greedy_soup(MODELS[:2], nearness, scores=[1.0, float("nan")], names=["a", "b"])
    short = {"dense": {"kernel": MODELS[0]["dense"]["kernel"][:3]}}
    with pytest.raises(ValueError, match=r"merge.greedy_soup: models\[1\] lacks \['dense/bias'\]"):
        greedy_soup([MODELS[0], short], nearness, scores=[2.0, 1.0])
    with pytest.raises(ValueError, match="accept='best' is not one of"):
        greedy_soup(MODELS, nearness, accept="best")
    with pytest.raises(ValueError, match="scores has 1 entries, but 4 models were given"):
        greedy_soup(MODELS, nearness, scores=[1.0])
