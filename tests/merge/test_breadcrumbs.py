"""Tests of Model Breadcrumbs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import breadcrumbs, breadcrumbs_ties, delta_merge, task_arithmetic
from jaxweights.weights import Axes
from tests.merge._public import results, whole_checkpoint

RNG = np.random.default_rng(0)


def merge(tx, *deltas):
    models = [{"w": jnp.asarray(delta, jnp.float32)} for delta in deltas]
    return np.asarray(apply(tx, {"w": jnp.zeros_like(models[0]["w"])}, models=models)["w"])


@pytest.mark.parametrize("scope", ["leaf", "tree"])
@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("density, outliers", [(0.15, 0.006), (0.5, 0.3), (0.9, 0.4), (0.3, 0.0)])
def test_the_kept_number_is_right_for_every_size(scope, n, density, outliers):
    delta = RNG.permutation(np.arange(1.0, n + 1))
    got = merge(breadcrumbs(density=density, outliers=outliers, scope=scope), delta)
    kept = max(round(density * n), 1)
    dropped = min(round(outliers * n), n - kept)  # where shares exceed 1, fewer outliers go
    # Values are their own ranks: what is kept lies between the two cuts.
    want = np.arange(n - dropped, n - dropped - kept, -1)
    np.testing.assert_array_equal(np.sort(got[got != 0])[::-1], want)


def test_no_outliers_is_trimming():
    delta = RNG.normal(size=50)
    trimmed = delta_merge(sparsifier="magnitude", density=0.3)
    np.testing.assert_array_equal(
        merge(breadcrumbs(density=0.3, outliers=0.0), delta), merge(trimmed, delta)
    )


def test_keeping_all_is_task_arithmetic():
    deltas = RNG.normal(size=(2, 50))
    got = merge(breadcrumbs(density=1.0, outliers=0.5), *deltas)
    np.testing.assert_array_equal(got, merge(task_arithmetic(), *deltas))


def test_tied_outliers_are_dropped_from_the_lowest_index():
    got = merge(breadcrumbs(density=0.5, outliers=0.25), np.ones(8))
    np.testing.assert_array_equal(np.flatnonzero(got), [2, 3, 4, 5])


def test_shares_may_differ_by_model():
    delta = np.arange(1.0, 11.0)
    tx = breadcrumbs(density=[0.1, 0.2], outliers=[0.0, 0.5])
    np.testing.assert_array_equal(merge(tx, delta, delta), [0, 0, 0, 4, 5, 0, 0, 0, 0, 10])


def test_signs_may_be_elected_afterwards():
    tx = breadcrumbs_ties(density=1.0, outliers=0.0, normalize=True)
    np.testing.assert_array_equal(merge(tx, [1.0, 2.0], [3.0, -5.0]), [2.0, -5.0])


@pytest.mark.parametrize(
    "case, model, density, outliers",
    [("middle_a", "ft1", 0.8, 0.02), ("topk_keep", "ft2", 0.25, 0)],
)
def test_rows_are_ranked_as_its_authors_do(case, model, density, outliers):
    wanted = results("breadcrumbs_original", ("down_proj.weight", "model.norm.weight"))[0][case]
    base, tuned = ({p: whole_checkpoint(m)[p] for p in wanted} for m in ("base", model))
    tx = breadcrumbs(density=density, outliers=outliers, scope="row", compat="mergekit")
    # Torch's orientation: the last axis holds the inputs of one output.
    layout = {p: Axes(inputs=(-1,), outputs=(-2,)) for p, x in base.items() if x.ndim == 2}
    got = apply(tx, base, models=[tuned], layout=layout)
    for path, want in wanted.items():
        np.testing.assert_allclose(got[path] - base[path], want, rtol=0, atol=1e-6, err_msg=path)


def test_every_row_keeps_its_own_share():
    delta = RNG.normal(size=(20, 3)) * np.array([1.0, 10.0, 100.0])
    got = merge(breadcrumbs(density=0.3, outliers=0.1, scope="row"), delta)
    for column in range(3):
        order = np.argsort(-np.abs(delta[:, column]))
        np.testing.assert_array_equal(np.flatnonzero(got[:, column]), np.sort(order[2:8]))
