"""Tests of arcee fusion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout, apply
from jaxweights.merge import arcee_fusion
from jaxweights.merge._arcee_fusion import _cut, _divergence
from jaxweights.weights import Axes
from tests.merge._public import checkpoint, results

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(16, 12)).astype(np.float32)
MODEL = BASE + 0.3 * RNG.normal(size=(16, 12)).astype(np.float32) ** 3


def softmax(x):
    e = np.exp(x - x.max(axis=0))
    return e / e.sum(axis=0)


def oracle(base, model, whisker=1.5):
    """In float64, sorted; vectors run along the first axis."""
    base, model = base.astype(np.float64), model.astype(np.float64)
    p, q = softmax(model), softmax(base)
    scores = np.abs(model - base) * (p * np.log(p / q)).sum(axis=0)
    ranked = np.sort(scores.ravel())
    low, median, high = (ranked[int(s * (ranked.size - 1))] for s in (0.25, 0.5, 0.75))
    return np.where(scores >= median + whisker * (high - low), model, base)


def merge(tx, base=BASE, model=MODEL, **context):
    tree = {"w": jnp.asarray(base)}
    return np.asarray(apply(tx, tree, models=[{"w": jnp.asarray(model)}], **context)["w"])


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_it_agrees_with_mergekit(compat):
    merged, _ = results("arcee_fusion")
    base = checkpoint("base")
    layout = {p: Axes(inputs=(-1,), outputs=(-2,)) for p, x in base.items() if x.ndim == 2}
    got = apply(arcee_fusion(compat=compat), base, models=[checkpoint("ft2")], layout=layout)
    off = size = 0
    for path, want in merged["default"].items():
        off += int((np.abs(np.asarray(got[path]) - want) > 1e-6).sum())
        size += want.size
    assert off <= size // 1000  # entries at the threshold may round either way


@pytest.mark.parametrize("whisker", [0.0, 1.5, 3.0])
def test_entries_above_the_threshold_are_copied_and_no_others(whisker):
    got = merge(arcee_fusion(whisker=whisker))
    np.testing.assert_array_equal(got, oracle(BASE, MODEL, whisker).astype(np.float32))
    assert 0.02 < np.mean(got == MODEL) < 0.6


@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.1, 1.0, 5.0, 60.0])
def test_divergences_are_exact_for_small_and_large_deltas(size):
    old = RNG.normal(size=(400, 3)).astype(np.float32)
    delta = (size * RNG.normal(size=(400, 3))).astype(np.float32)
    got = np.asarray(_divergence(jnp.asarray(old), jnp.asarray(delta), (0,)))[0]
    wide, step = old.astype(np.longdouble), delta.astype(np.longdouble)
    p, q = softmax(wide + step), softmax(wide)
    want = (p * np.log(p / q)).sum(axis=0)
    np.testing.assert_allclose(got, want.astype(float), rtol=2e-5)
    if size == 1e-5:  # as it is usually computed, nothing of it is left
        p, q = softmax(old + delta), softmax(old)
        plain = (p * np.log(p / q)).sum(axis=0)
        assert np.all(np.abs(plain - want.astype(np.float32)) > 10 * want)


def test_layers_have_thresholds_of_their_own():
    layout = Layout.of({"w": Axes()}, traced=True)
    base, model = np.stack([BASE, BASE]), np.stack([MODEL, BASE + 1e-3 * (MODEL - BASE)])
    got = merge(arcee_fusion(), base, model, layout=layout)
    for i in range(2):
        np.testing.assert_array_equal(got[i], merge(arcee_fusion(), base[i], model[i]))
        assert 0.05 < np.mean(got[i] == model[i]) < 0.5


def test_a_model_equal_to_the_base_gives_the_base():
    np.testing.assert_array_equal(merge(arcee_fusion(), model=BASE.copy()), BASE)


def test_nan_that_is_not_copied_is_refused_all_the_same():
    bad = MODEL.copy()
    bad[0, 0] = np.nan
    with pytest.raises(
        ValueError, match=r"merge.arcee_fusion: 'w': 1 of 192 values of models\[0\]"
    ):
        merge(arcee_fusion(), model=bad)


def test_it_runs_under_jit():
    compiled = jax.jit(lambda a, b: apply(arcee_fusion(), {"w": a}, models=[{"w": b}])["w"])
    np.testing.assert_array_equal(compiled(BASE, MODEL), merge(arcee_fusion()))


@pytest.mark.parametrize("shift", [-3.0, -0.6, 0.0, 0.6, 3.0])
def test_quartiles_of_scores_that_noise_made_negative_keep_their_sign(shift):
    scores = (RNG.normal(size=(2, 203)) + shift).astype(np.float32)
    got = _cut(jnp.asarray(scores), jnp.float32(1.5), stack=(0,), compat="mergekit")
    low, median, high = np.sort(scores, axis=1)[:, [50, 101, 151]].T
    np.testing.assert_allclose(np.asarray(got)[:, 0], median + 1.5 * (high - low), rtol=1e-6)
