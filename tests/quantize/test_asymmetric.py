"""Rows make up for the errors of earlier rows' inputs: against NumPy, row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import gptq
from jaxweights.quantize._asymmetric import asymmetric_factor
from jaxweights.quantize._damped_factor import damped_factor

IN, OUT, TOKENS = 24, 10, 200
RNG = np.random.default_rng(3)
WEIGHT = RNG.normal(size=(IN, OUT)).astype(np.float32)
ORIGINAL = (RNG.normal(size=(TOKENS, 6)) @ RNG.normal(size=(6, IN))).astype(np.float32)
ORIGINAL += 0.5 * RNG.normal(size=ORIGINAL.shape).astype(np.float32)
INPUTS = ORIGINAL + (0.4 * RNG.normal(size=(TOKENS, IN)) * (1 + (np.arange(IN) % 3))).astype(
    np.float32
)
INPUTS = (INPUTS * 0.9).astype(np.float32)


def stats_of(rows=INPUTS, original=ORIGINAL):
    return jw.Stats(
        {
            "kernel": {
                "gram": jnp.asarray(rows.T @ rows),
                "count": jnp.asarray(len(rows), jnp.int32),
                "cross_gram": jnp.asarray(rows.T @ original),
            }
        }
    )


def codes_of(tx, weight=WEIGHT, **stats):
    return jw.apply(tx, {"kernel": jnp.asarray(weight)}, stats=stats_of(**stats))["kernel"]


def affine(rows, bits):
    """Step and zero of groups `(n, out)`, asymmetric, in NumPy."""
    low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
    step = (high - low).astype(np.float32) / np.float32(2**bits - 1)
    step = np.where(step == 0, 1, step)
    return step, np.clip(np.round(-low / step), 0, 2**bits - 1)


def oracle(weight, rows, original, *, bits, share, size=None, static=False, ordered=False):
    """The published algorithm, row after row, in float64: what is rounded is handed on as it is."""
    weight, rows, original = (np.asarray(x, np.float64) for x in (weight, rows, original))
    gram, change = rows.T @ rows, (original - rows).T @ rows
    n = len(gram)
    size = size or n
    order = np.argsort(-np.diag(gram), kind="stable") if ordered else np.arange(n)
    steps = [affine(weight[i : i + size], bits) for i in range(0, n, size)]
    gram, change = (x[order][:, order] for x in (gram, change))
    gram = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(n)
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    passed = share * np.triu(change @ upper.T, 1) @ upper
    now, codes = weight[order].copy(), np.zeros(weight.shape, int)
    for i in range(n):
        if not static and size < n and i % size == 0:
            # What the group's rows become if none of them is rounded.
            ahead = now.copy()
            for j in range(i, i + size):
                ahead[j + 1 :] += np.outer(passed[j, j + 1 :], ahead[j])
            steps[i // size] = affine(ahead[i : i + size], bits)
        step, zero = steps[(order[i] if static else i) // size]
        codes[i] = np.clip(np.round(now[i] / step) + zero, 0, 2**bits - 1)
        error = (now[i] - (codes[i] - zero) * step) / upper[i, i]
        row = now[i].copy()
        now[i + 1 :] += np.outer(passed[i, i + 1 :], row) - np.outer(upper[i, i + 1 :], error)
    return codes[np.argsort(order)], np.stack([step for step, _ in steps])


@pytest.mark.parametrize("share, block_size", [(0.25, 128), (1.0, 4)])
@pytest.mark.parametrize(
    "size, static, ordered",
    [(None, False, False), (None, False, True), (8, True, True), (8, False, False)],
)
def test_codes_are_those_of_the_recursion_in_numpy(share, size, static, ordered, block_size):
    tx = gptq(
        bits=3,
        group_size=size,
        static_groups=static,
        act_order=ordered,
        block_size=block_size,
        asymmetric_calibration=share,
    )
    settings = {"bits": 3, "size": size, "static": static, "ordered": ordered}
    expected, steps = oracle(WEIGHT, INPUTS, ORIGINAL, share=share, **settings)
    got = codes_of(tx)
    np.testing.assert_allclose(got.scale, steps, rtol=1e-4)
    assert np.mean(np.asarray(got.codes_matrix()) == expected) > 0.99
    symmetric, _ = oracle(WEIGHT, INPUTS, ORIGINAL, share=0.0, **settings)
    assert np.mean(symmetric == expected) < 0.9  # it would be noticed


def test_codes_are_those_of_the_authors_code():
    # Of `GPTAQ.fasterquant(actorder=True, alpha=1.0)` in fake_quant/gptaq_utils.py at 883afc6 of
    # github.com/Intelligent-Computing-Lab-Yale/GPTAQ, for the first outputs, all rows in one block.
    authors = """7043 5332 4643 2355 4521 4246 3516 4351 7547 3435 3436 6603
                 1326 7322 2574 5330 4327 6645 6724 3522 6435 4241 0317 3223"""
    got = codes_of(gptq(bits=3, act_order=True, asymmetric_calibration=1.0))
    rows = ["".join(map(str, row)) for row in got.codes_matrix()[:, :4].tolist()]
    assert rows == authors.split()


def test_without_errors_of_inputs_it_is_gptq():
    tx = gptq(bits=3, group_size=8, asymmetric_calibration=1.0)
    plain = codes_of(gptq(bits=3, group_size=8))
    same = codes_of(tx, original=INPUTS)
    np.testing.assert_array_equal(same.codes_matrix(), plain.codes_matrix())
    np.testing.assert_array_equal(same.scale, plain.scale)
    assert np.any(codes_of(tx).codes_matrix() != plain.codes_matrix())


def test_outputs_are_nearer_to_those_of_the_original_model():
    wanted = ORIGINAL @ WEIGHT

    def error(tx):
        return float(np.linalg.norm(INPUTS @ np.asarray(codes_of(tx).materialize()) - wanted))

    symmetric = error(gptq(bits=4))
    errors = [error(gptq(bits=4, asymmetric_calibration=share)) for share in (0.25, 0.5, 1.0)]
    assert errors[2] < errors[1] < errors[0] < symmetric


def test_the_solved_recursion_is_the_recursion():
    n = 7
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, n))
    change = rng.normal(size=(n, n)).astype(np.float32)
    gram = jnp.asarray(x.T @ x / np.mean(np.diag(x.T @ x)), jnp.float32)
    factor = damped_factor(gram, 0.01)
    found = asymmetric_factor(factor, jnp.asarray(change), 0.7)
    spread, diagonal = np.asarray(factor.spread, np.float64), np.asarray(factor.diagonal)
    upper = (spread * diagonal[:, None]).T
    passed_on = 0.7 * np.tril(np.linalg.solve(upper, change) / diagonal[:, None], -1)
    weight, levels = rng.normal(size=(n, 3)), rng.normal(size=(n, 3))
    rounded = weight.copy()
    for k in range(n):
        rounded[k] += spread[k, :k] @ (weight - levels)[:k] + passed_on[k, :k] @ rounded[:k]
    start = weight + np.asarray(found.carry) @ weight
    together = np.asarray(found.factor.spread)
    np.testing.assert_allclose(np.diag(together), 1, atol=1e-6)
    got = start + np.tril(together, -1) @ (start - levels)
    np.testing.assert_allclose(got, rounded, rtol=1e-3, atol=1e-4)


def test_matrices_without_a_factor_are_rounded_to_nearest():
    nothing = jnp.zeros((4, 4))
    factor = damped_factor(jnp.full((4, 4), jnp.nan), 0.01)
    found = asymmetric_factor(factor, nothing + 1, 1.0)
    assert not np.any(found.carry)
    np.testing.assert_array_equal(found.factor.spread, np.eye(4))
    weight = RNG.normal(size=(IN, OUT)).astype(np.float32)
    tx = gptq(
        bits=4, asymmetric_calibration=1.0, on_failure="round_to_nearest", report=lambda *_: None
    )
    none = np.zeros((0, IN), np.float32)
    got = codes_of(tx, weight, rows=none, original=none)
    step, zero = affine(weight, 4)
    np.testing.assert_array_equal(
        got.codes_matrix(), np.clip(np.round(weight / step) + zero, 0, 15)
    )


def test_an_input_that_the_quantized_model_lost_is_made_up_for():
    rows = INPUTS.copy()
    rows[:, 5] = 0
    original = ORIGINAL.copy()
    errors = {}
    for share in (0.0, 1.0):
        got = codes_of(gptq(bits=8, asymmetric_calibration=share), rows=rows)
        lost = rows @ np.asarray(got.materialize()) - original @ WEIGHT
        errors[share] = np.linalg.norm(lost)
    assert errors[1.0] < 0.95 * errors[0.0]
    got = codes_of(gptq(bits=4, asymmetric_calibration=1.0), rows=rows).materialize()
    np.testing.assert_allclose(got[5], WEIGHT[5], atol=0.3)  # keeps its plain rounding


def test_pruned_weights_stay_zero():
    mask = RNG.random(WEIGHT.shape) > 0.5
    leaf = jw.Masked(jnp.asarray(WEIGHT), jnp.asarray(mask))
    tx = gptq(bits=4, asymmetric_calibration=0.5)
    got = jw.apply(tx, {"kernel": leaf}, stats=stats_of())["kernel"].materialize()
    assert np.all(np.asarray(got)[~mask] == 0) and np.any(np.asarray(got)[mask] != 0)


@pytest.mark.filterwarnings("ignore:.*tokens were seen")
def test_a_deep_model_comes_nearer_to_the_original_layer_by_layer():
    depth, width = 6, 16
    keys = jax.random.split(jax.random.key(0), 3)
    mix = jax.random.normal(keys[0], (4, width))
    draw = lambda seed: jnp.tanh(jax.random.normal(jax.random.key(seed), (64, 4)) @ mix)  # noqa: E731
    weights = {
        "up": jax.random.normal(keys[1], (depth, width, 2 * width)) / 4,
        "down": jax.random.normal(keys[2], (depth, 2 * width, width)) / 4,
    }

    def deep(params, x):
        step = lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None)  # noqa: E731
        return jax.lax.scan(step, x, params)[0]

    data, held = [draw(i) for i in range(8)], draw(99)
    errors = {}
    for share in (0.0, 0.25):
        tx = gptq(bits=2, group_size=8, asymmetric_calibration=share)
        new = jw.pipeline(deep, weights, data, [tx], block_by_block=True)
        errors[share] = float(jnp.linalg.norm(jw.lift(deep)(new, held) - deep(weights, held)))
    assert errors[0.25] < 0.95 * errors[0.0], errors


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"gptq: asymmetric_calibration=2 must lie in \[0, 1\]"):
        gptq(bits=4, asymmetric_calibration=2)
    words = r"gptq: error_propagation=0.5 and asymmetric_calibration=0.25 both make up.*to 0"
    with pytest.raises(ValueError, match=words):
        gptq(bits=4, asymmetric_calibration=0.25, error_propagation=0.5)
    words = r"gptq: compat=True repeats code that knows no asymmetric_calibration=0.25"
    with pytest.raises(ValueError, match=words):
        gptq(bits=4, asymmetric_calibration=0.25, compat=True)
    params = {"kernel": jnp.ones((4, 4))}
    needs = gptq(bits=4, asymmetric_calibration=0.25).needs(params)
    assert needs["kernel"] == {"gram", "count", "cross_gram"}
    words = r"refine: 'kernel': .* would undo. Set .*asymmetric_calibration=0"
    with pytest.raises(ValueError, match=words):
        jw.quantize.refine(gptq(bits=4, asymmetric_calibration=0.25)).needs(params)
