"""Weights make up for the errors of the layers before them: against NumPy, layer by layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import gptq, gptq_matrix
from jaxweights.quantize._error_propagation import propagation_matrix

KEY = jax.random.key(0)
BITS = {"bits": 3, "group_size": 4}


def inputs(seed, tokens=5):
    """Correlated activations, as real ones are."""
    keys = jax.random.split(jax.random.fold_in(KEY, seed))
    mix = jax.random.normal(jax.random.key(9), (8, 8)) + 2 * jnp.ones((8, 8))
    return jax.random.normal(keys[0], (2, tokens, 8)) @ mix / 4


@pytest.fixture
def params():
    keys = jax.random.split(KEY, 4)
    return {
        "first": 0.3 * jax.random.normal(keys[0], (8, 8)),
        "layers": {
            "up": 0.5 * jax.random.normal(keys[1], (3, 8, 12)),
            "down": 0.5 * jax.random.normal(keys[2], (3, 12, 8)),
        },
        "last": 0.3 * jax.random.normal(keys[3], (8, 4)),
    }


@pytest.fixture
def batches():
    return [inputs(i) for i in range(4)]


def model(params, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    h, _ = jax.lax.scan(layer, x @ params["first"], params["layers"])
    return h @ params["last"]


def made_up(weight, rows, original, share, damping=0.01):
    """The published formula, in NumPy's float64."""
    weight, rows, original = (np.asarray(x, np.float64) for x in (weight, rows, original))
    gram = rows.T @ rows
    ridge = damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    return weight + share * np.linalg.solve(gram + ridge, rows.T @ (original - rows)) @ weight


def flat(states):
    return np.concatenate([np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in states])


@pytest.mark.filterwarnings("ignore:.*tokens were seen")
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_every_layer_makes_up_for_the_layers_before_it(params, batches, share):
    tx = gptq(**BITS, error_propagation=share)
    new = jw.pipeline(model, params, batches, [tx], block_by_block=True)
    layers = params["layers"]
    quantized = [np.asarray(x) @ np.asarray(params["first"]) for x in batches]
    floats = list(quantized)
    for i in range(3):
        up, down = (np.asarray(layers[name][i]) for name in ("up", "down"))
        middle = [[np.tanh(h @ up) for h in states] for states in (quantized, floats)]
        for name, weight, (rows, original) in (
            ("up", up, (flat(quantized), flat(floats))),
            ("down", down, map(flat, middle)),
        ):
            moved = jnp.asarray(made_up(weight, rows, original, share), jnp.float32)
            expected = gptq_matrix(moved, jnp.asarray(rows.T @ rows), **BITS).codes
            got = jax.tree.map(lambda field, i=i: field[i], new["layers"][name])
            np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-3)
            assert np.mean(got.codes_matrix() == expected.codes) > 0.98
            # What gptq alone makes of the same inputs is something else, but in the first layer.
            alone = gptq_matrix(jnp.asarray(weight), jnp.asarray(rows.T @ rows), **BITS).codes
            same = np.mean(alone.codes == expected.codes)
            assert (same == 1.0) if i == 0 else (same < 0.9)
        one = {n: np.asarray(new["layers"][n].materialize()[i]) for n in ("up", "down")}
        quantized = [h + np.tanh(h @ one["up"]) @ one["down"] for h in quantized]
        floats = [h + np.tanh(h @ up) @ down for h in floats]
    # Outside of the layers, too.
    rows, original = flat(quantized), flat(floats)
    moved = jnp.asarray(made_up(params["last"], rows, original, share), jnp.float32)
    expected = gptq_matrix(moved, jnp.asarray(rows.T @ rows), **BITS).codes
    assert np.mean(new["last"].codes_matrix() == expected.codes) > 0.95


def test_the_matrix_is_that_of_numpy_and_least_squares_without_damping():
    rng = np.random.default_rng(0)
    original = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    rows = original + 0.3 * rng.normal(size=original.shape)
    gram, cross = rows.T @ rows, rows.T @ original
    args = (jnp.asarray(gram, jnp.float32), jnp.asarray(cross, jnp.float32))
    for damping in (0.0, 0.05):
        got = propagation_matrix(*args, jnp.float32(damping))
        expected = made_up(np.eye(6), rows, original, 1.0, damping) - np.eye(6)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    weight = rng.normal(size=(6, 3))
    best = np.linalg.lstsq(rows, original @ weight, rcond=None)[0]
    got = weight + propagation_matrix(*args, jnp.float32(0)) @ weight
    np.testing.assert_allclose(got, best, rtol=1e-3, atol=1e-4)


def test_dead_inputs_and_matrices_without_tokens_stay(params):
    rows = np.array([[1.0, 0, 2], [3, 0, 1]], np.float32)
    original = rows + np.float32(0.5)
    gram, cross = jnp.asarray(rows.T @ rows), jnp.asarray(rows.T @ original)
    matrix = propagation_matrix(gram, cross, jnp.float32(0.01))
    assert np.all(matrix[1] == 0) and np.abs(matrix[0]).max() > 0.01
    assert np.all(propagation_matrix(gram * 0, cross * 0, jnp.float32(0.01)) == 0)
    assert np.all(propagation_matrix(gram, cross, jnp.float32(jnp.nan)) == 0)


@pytest.mark.filterwarnings("ignore:.*tokens were seen")
def test_half_of_it_brings_a_deep_model_nearer_to_the_original():
    depth, width = 6, 16
    keys = jax.random.split(KEY, 4)
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
    for share in (0.0, 0.5):
        tx = gptq(bits=2, group_size=8, error_propagation=share)
        new = jw.pipeline(deep, weights, data, [tx], block_by_block=True)
        errors[share] = float(jnp.linalg.norm(jw.lift(deep)(new, held) - deep(weights, held)))
    assert errors[0.5] < 0.95 * errors[0.0], errors


def test_weights_that_read_the_same_input_share_it_and_padding_is_left_out(batches):
    keys = jax.random.split(KEY, 2)
    params = {n: jax.random.normal(k, (2, 8, 8)) / 3 for n, k in zip("qk", keys, strict=True)}

    def attend(params, x):
        step = lambda h, w: (h + jnp.tanh(h @ w["q"]) * (h @ w["k"]), None)  # noqa: E731
        return jax.lax.scan(step, x, params)[0]

    tx = gptq(bits=2, group_size=8, error_propagation=0.5)
    run = lambda data, **rest: jw.pipeline(  # noqa: E731
        attend, params, data, [tx], block_by_block=True, **rest
    )
    plain = run(batches)
    padded = [jnp.concatenate([x, 50 * jnp.ones_like(x)], axis=1) for x in batches]
    masked = run(padded, mask=lambda batch: jnp.broadcast_to(jnp.arange(10) < 5, (2, 10)))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_reference_model_gives_the_same_statistic_without_a_scan(batches, unrolled):
    params = {"w": jax.random.normal(KEY, (2, 8, 8)) / 3}
    if not unrolled:
        params = {"a": params["w"][0], "b": params["w"][1]}
    pick = lambda params: params["w"] if unrolled else (params["a"], params["b"])  # noqa: E731

    def two(params, x):
        first, second = pick(params)[0], pick(params)[1]
        return jnp.tanh(x @ first) @ second

    changed = jax.tree.map(lambda w: jnp.round(4 * w) / 4, params)
    needs = {path: frozenset({"cross_gram", "gram"}) for path in params}
    stats = jw.calibrate(two, changed, batches, needs=needs, reference=params)
    rows, original = (
        flat([np.tanh(np.asarray(x) @ np.asarray(pick(p)[0])) for x in batches])
        for p in (changed, params)
    )
    got = stats.get("w", "cross_gram")[1] if unrolled else stats.get("b", "cross_gram")
    np.testing.assert_allclose(got, rows.T @ original, rtol=1e-4, atol=1e-4)
    assert np.abs(rows.T @ original - rows.T @ rows).max() > 0.1
    first = stats.get("w", "cross_gram")[0] if unrolled else stats.get("a", "cross_gram")
    np.testing.assert_allclose(first, flat(batches).T @ flat(batches), rtol=1e-4)


def test_what_cannot_be_compared_is_refused(params, batches):
    tx = gptq(**BITS, error_propagation=0.5)
    needs = tx.needs(params)
    assert all("cross_gram" in names for names in needs.values())
    assert not any("cross_gram" in names for names in gptq(**BITS).needs(params).values())
    words = r"'layers/up': 'cross_gram' compares two models. Go through the layers by pipeline\("
    with pytest.raises(ValueError, match=words):
        jw.calibrate(model, params, batches, needs=needs)
    with pytest.raises(ValueError, match=words):
        jw.pipeline(model, params, batches, [tx])
    words = r"'layers/.*': is used inside a loop.*gone through by pipeline\(block_by_block=True\)"
    with pytest.raises(ValueError, match=words):
        jw.calibrate(model, params, batches, needs=needs, reference=params)
    other = params | {"last": params["last"][:, :2]}
    words = r"calibrate: reference: 'last': is \(8, 2\), but params has \(8, 4\)"
    with pytest.raises(ValueError, match=words):
        jw.calibrate(model, params, batches, needs=needs, reference=other)
    with pytest.raises(ValueError, match=r"gptq: error_propagation=1.5 must lie in \[0, 1\]"):
        gptq(**BITS, error_propagation=1.5)
    words = r"'experts': has inputs of their own for the matrices of a stack"
    with pytest.raises(ValueError, match=words):
        experts = {"experts": jnp.ones((2, 8, 4))}
        run = lambda p, x: jnp.einsum("eti,eio->eto", x, p["experts"])  # noqa: E731
        need = {"experts": frozenset({"cross_gram"})}
        jw.calibrate(run, experts, [jnp.ones((2, 5, 8))], needs=need, reference=experts)


@pytest.mark.parametrize("around, settings", [("refine", {}), ("low_rank_residual", {"rank": 1})])
def test_what_approximates_the_weight_as_it_was_refuses_it(params, around, settings):
    tx = getattr(jw.quantize, around)(gptq(**BITS, error_propagation=0.5), **settings)
    words = rf"{around}: 'layers/up': .* would undo. Set error_propagation=0"
    with pytest.raises(ValueError, match=words):
        tx.needs(params)
