"""Tests of RAM and RAM+."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import apply
from jaxweights.merge import ram, ram_plus
from tests.merge._public import assert_merged, checkpoint, models, results

RNG = np.random.default_rng(0)
DELTAS = np.where(RNG.random((3, 60)) < 0.4, RNG.normal(size=(3, 60)), 0)


def merge(tx, deltas, shape=(-1,)):
    trees = [{"kernel": jnp.asarray(x, jnp.float32).reshape(shape)} for x in deltas]
    base = {"kernel": jnp.zeros_like(trees[0]["kernel"])}
    return np.asarray(apply(tx, base, models=trees)["kernel"]).reshape(-1)


def oracle(deltas, epsilon=0.0, gain=0.0, most=0.0):
    """Entry by entry, in float64."""
    changed = np.abs(deltas) > epsilon
    out = np.zeros(deltas.shape[1])
    for j in range(deltas.shape[1]):
        having = np.flatnonzero(changed[:, j])
        if len(having) == 1:
            [i] = having
            alone = sum(changed[i, k] and changed[:, k].sum() == 1 for k in range(len(out)))
            shared = sum(changed[i, k] and changed[:, k].sum() > 1 for k in range(len(out)))
            out[j] = (1 + gain * min(shared / alone, most)) * deltas[i, j]
        elif len(having) > 1:
            out[j] = deltas[having, j].mean()
    return out


@pytest.mark.parametrize("file, make", [("ram", ram), ("ramplus_tl", ram_plus)])
def test_it_agrees_with_mergekit(file, make):
    leaves = ("1.self_attn.k_proj.weight", "1.mlp.down_proj.weight", "norm.weight")
    merged, cases = results(file, leaves)
    got = apply(make(epsilon=0.01), checkpoint("base"), models=models(cases["default"]))
    assert_merged(got, merged["default"], 1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("gain, most", [(0.0, 1.0), (0.5, 0.1), (0.5, 10.0)])
def test_own_deltas_are_enlarged_and_shared_ones_averaged(epsilon, gain, most):
    want = oracle(DELTAS, epsilon, gain, most)
    assert gain == 0 or np.abs(want - oracle(DELTAS, epsilon)).max() > 0.01
    got = merge(ram_plus(epsilon=epsilon, gain=gain, most=most), DELTAS)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    if gain == 0:
        np.testing.assert_array_equal(got, merge(ram(epsilon=epsilon), DELTAS))


def test_models_that_share_no_entry_are_added_and_equal_ones_give_themselves():
    apart = DELTAS * (np.arange(60) % 3 == np.arange(3)[:, None])
    np.testing.assert_allclose(merge(ram(), apart), apart.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(merge(ram_plus(), [DELTAS[0]] * 3), DELTAS[0], rtol=1e-6)
    assert np.all(merge(ram_plus(), 0 * DELTAS) == 0)


def test_each_layer_of_a_stack_counts_by_itself():
    first, second = DELTAS[:2, :24], DELTAS[:2, 24:48]
    stacked = np.concatenate([first, second], axis=1)
    tx = ram_plus(gain=1.0, most=100.0)
    one_by_one = np.concatenate([merge(tx, first, (4, 6)), merge(tx, second, (4, 6))])
    from jaxweights.core import Layout
    from jaxweights.weights import Axes

    trees = [{"kernel": jnp.asarray(x, jnp.float32).reshape(2, 4, 6)} for x in stacked]
    base = {"kernel": jnp.zeros((2, 4, 6))}
    layout = Layout.of({"kernel": Axes()})
    got = apply(tx, base, models=trees, layout=layout)["kernel"]
    np.testing.assert_allclose(np.asarray(got).reshape(-1), one_by_one, rtol=1e-6)
    assert np.abs(merge(tx, stacked) - one_by_one).max() > 0.01


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ram(epsilon=-1.0), "merge.ram: epsilon=-1.0 must be finite and not negative"),
        (lambda: ram_plus(gain=-0.1), "merge.ram_plus: gain=-0.1 must be"),
        (lambda: ram_plus(most=float("nan")), "merge.ram_plus: most=nan must be"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()
