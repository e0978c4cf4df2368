"""Ask and tell."""

from __future__ import annotations

import pickle
import sys

import jax
import numpy as np
import pytest

from jaxweights.merge import evolution, genome

SETTINGS = {"weights": np.array([[0.1, 0.7], [0.3, 0.3]]), "density": 0.9}
GENOME = genome(SETTINGS, bounds={"weights": (-1, 2)})


def quadratic(vector):
    return -float(np.square(vector - np.array([0.5, 0.2, -0.3, 1.0, 0.4])).sum())


def search(key=0, generations=3, **settings):
    found = evolution(GENOME, SETTINGS, key=jax.random.key(key), **settings)
    asked = []
    for _ in range(generations):
        candidates = found.ask()
        asked.append(candidates)
        found.tell([quadratic(x) for x in candidates])
    return found, np.stack(asked)


def test_encoding_and_decoding_undo_each_other_exactly():
    vector = GENOME.encode(SETTINGS)
    assert vector.shape == (5,) and GENOME.size == 5
    back = GENOME.decode(vector)
    assert list(back) == ["weights", "density"]
    for name, want in SETTINGS.items():
        np.testing.assert_array_equal(back[name], want)
    draw = np.random.default_rng(0).uniform(0, 1, 5)
    np.testing.assert_array_equal(GENOME.encode(GENOME.decode(draw)), draw)
    np.testing.assert_array_equal(GENOME.limits(), [[-1, 2]] * 4 + [[0, 1]])


@pytest.fixture(autouse=True)
def _needs_cmaes():
    pytest.importorskip("cmaes")


def test_the_same_key_takes_the_same_path_and_another_key_another():
    np.testing.assert_array_equal(search()[1], search()[1])
    assert np.abs(search()[1] - search(key=1)[1]).max() > 1e-3


def test_it_finds_the_best_settings_within_the_bounds():
    found, asked = search(generations=60, population=12)
    assert found.best_score > -1e-3
    np.testing.assert_allclose(found.best["weights"].ravel(), [0.5, 0.2, -0.3, 1.0], atol=0.05)
    limits = GENOME.limits()
    assert (asked >= limits[:, 0]).all() and (asked <= limits[:, 1]).all()
    assert asked.shape == (60, 12, 5)


def test_a_search_goes_on_where_it_was_saved():
    found, _ = search()
    again = pickle.loads(pickle.dumps(found))
    # Half of the symmetric covariance is pickled, and its square root taken anew.
    np.testing.assert_allclose(found.ask(), again.ask(), rtol=0, atol=1e-12)
    assert again.best_score == found.best_score


def test_scores_are_maximised_and_failures_rank_last():
    found = evolution(GENOME, SETTINGS, key=jax.random.key(0))
    scores = np.full(len(found.ask()), -np.inf)
    scores[2] = 4.0
    found.tell(scores)
    assert found.best_score == 4.0


def test_misuse_is_refused(monkeypatch):
    found = evolution(GENOME, SETTINGS, key=jax.random.key(0))
    with pytest.raises(ValueError, match="tell without ask"):
        found.tell([1.0])
    found.ask()
    with pytest.raises(ValueError, match="one number for each of the 8 candidates"):
        found.tell([1.0])
    with pytest.raises(ValueError, match=r"'density'=2.0 must lie in \[0.0, 1.0\]"):
        GENOME.encode(SETTINGS | {"density": 2.0})
    with pytest.raises(ValueError, match="differ from"):
        GENOME.encode({"weights": SETTINGS["weights"]})
    with pytest.raises(ValueError, match=r"shape \(3,\) was given, but the settings have 5"):
        GENOME.decode(np.zeros(3))
    with pytest.raises(ValueError, match=r"bounds of \['sigma'\]"):
        genome(SETTINGS, bounds={"sigma": (0, 1)})
    with pytest.raises(ValueError, match="must be in order"):
        genome(SETTINGS, bounds={"density": (1, 0)})
    with pytest.raises(ValueError, match="sigma=0 must be positive"):
        evolution(GENOME, SETTINGS, key=jax.random.key(0), sigma=0)
    with pytest.raises(ValueError, match="has 1 entries, and covariances need two"):
        evolution(genome({"t": 0.5}), {"t": 0.5}, key=jax.random.key(0))
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ImportError, match=r"pip install jaxweights\[search\]"):
        evolution(GENOME, SETTINGS, key=jax.random.key(0))
