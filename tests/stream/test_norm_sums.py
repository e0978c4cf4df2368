"""Norms from slices are those of the whole."""

import numpy as np
import pytest

from jaxweights.stream._norm_sums import norms_of_runs, run_norms

RUN = 64
NORMS = {
    "l1": lambda x: np.abs(x).sum(),
    "l2": lambda x: np.sqrt(np.square(x).sum()),
    "linf": lambda x: np.abs(x).max(),
}


def _norm(values, kind, piece):
    pieces = [values[i : i + piece] for i in range(0, values.size, piece)]
    return norms_of_runs([run_norms(x, RUN, kind)[None] for x in pieces], kind)[0]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30], ids=str)  # of which no float32 is the square
def test_they_are_those_of_the_definition_whatever_the_size(kind, size):
    values = (size * np.random.default_rng(0).normal(size=1024)).astype(np.float32)
    want = NORMS[kind](values.astype(np.float64))
    np.testing.assert_allclose(_norm(values, kind, 1024), want, rtol=1e-6)


@pytest.mark.parametrize("kind", NORMS)
def test_they_are_the_same_however_the_vector_is_cut(kind):
    values = np.random.default_rng(1).normal(size=1024).astype(np.float32)
    assert _norm(values, kind, 1024) == _norm(values, kind, 2 * RUN) > 0


@pytest.mark.parametrize("kind", NORMS)
def test_zeros_have_none(kind):
    assert _norm(np.zeros(128, np.float32), kind, RUN) == 0
