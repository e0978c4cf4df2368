"""Frozen weights stand still to the bit, and swinging ones are counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxweights as jw
from jaxweights.quantize import (
    binary,
    confidence_annealing,
    fake_quant,
    lsq,
    nf4,
    oscillation_monitor,
    round_to_nearest,
    settle,
    statsq,
    ternary,
)
from jaxweights.quantize.training._thresholds import levels_of, threshold_distance

pytestmark = pytest.mark.promotion(dtypes="standard", ranks="allow")  # optax


def statsq_free(weight, bits, boundary):
    """Which weights the authors' code leaves free, by its own formula."""
    w = np.asarray(weight, np.float32)
    n = 2 ** (bits - 1)
    u = np.clip(w / (2 * np.abs(w).mean(0)), -1, np.float32(1 - 1e-6))
    t = u * n - 1
    nearest = np.round(t)
    return (np.abs(t - nearest) <= boundary) & (nearest >= -n) & (nearest <= n - 2)


def changed_by(tx, weight, boundary, optimizer=None):
    """Which weights a step with gradients of 1 moves."""
    chain = optax.chain(optimizer or optax.sgd(1.0), confidence_annealing(tx, boundary=boundary))
    params = {"w": weight}
    updates, _ = chain.update({"w": jnp.ones_like(weight)}, chain.init(params), params)
    return np.asarray(optax.apply_updates(params, updates)["w"] != weight)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("boundary", [0.0, 0.01, 0.2])
def test_free_weights_are_those_of_the_public_code(bits, boundary):
    weight = jax.random.normal(jax.random.key(0), (600, 4))
    expected = statsq_free(weight, bits, boundary)
    np.testing.assert_array_equal(changed_by(statsq(bits=bits), weight, boundary), expected)
    share = expected.mean()
    assert share == 0 if boundary == 0 else 0.002 < share < 0.5


def test_a_weight_on_a_threshold_is_free_whatever_the_boundary():
    weight = jnp.array([[0.0], [1.0], [-1.0], [2.0]])  # mean 1: levels at 1/2 and 3/2
    assert changed_by(statsq(bits=2), weight, 0.0).ravel().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "tx",
    [
        round_to_nearest(bits=3),
        round_to_nearest(bits=3, group_size=16),
        round_to_nearest(bits=4, grid="affine"),
        round_to_nearest(bits=2, grid="narrow"),
        nf4(group_size=16),
        statsq(bits=3),
    ],
    ids=["signed_max", "groups", "affine", "narrow", "nf4", "statsq"],
)
def test_distances_are_those_to_midpoints_of_levels_that_exist(tx):
    """Against the levels of every group, listed one by one."""
    weight = jax.random.normal(jax.random.key(1), (64, 3))
    leaf = jw.apply(tx, {"w": weight})["w"]
    found = np.asarray(threshold_distance(weight, leaf))
    rows = leaf.scale.shape[-2]
    for r in range(rows):
        for c in range(3):
            part = slice(r * 64 // rows, (r + 1) * 64 // rows)
            scale = float(leaf.scale[r, c])
            if hasattr(leaf, "table"):
                levels = np.asarray(leaf.table, np.float64) * scale
            elif leaf.zero_point is not None:
                levels = (np.arange(2**leaf.bits) - float(leaf.zero_point[r, c])) * scale
            else:
                lowest = min(int(leaf.codes_matrix().min()), 1 - 2 ** (leaf.bits - 1))
                levels = np.arange(lowest, 2 ** (leaf.bits - 1)) * scale
            levels = np.sort(levels)
            middle, gap = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
            far = np.abs(np.asarray(weight)[part, c, None] - middle) / gap
            np.testing.assert_allclose(found[part, c], far.min(-1), atol=2e-5)
    assert found.min() < 0.05


@pytest.mark.promotion(dtypes="strict", ranks="raise")
@pytest.mark.parametrize("grid", ["affine", "narrow"])
def test_distances_need_no_promotion(grid):
    weight = jax.random.normal(jax.random.key(1), (64, 3))
    leaf = jw.apply(round_to_nearest(bits=4, grid=grid), {"w": weight})["w"]
    assert float(threshold_distance(weight, leaf).min()) < 0.05


def test_half_a_step_frees_everything_between_the_outermost_levels():
    weight = jax.random.normal(jax.random.key(0), (100, 4))
    assert changed_by(round_to_nearest(bits=3, grid="narrow"), weight, 0.5001).all()


@pytest.mark.parametrize("leaf", ["dense", "heads", "stack", "lsq"])
def test_frozen_weights_are_bit_identical_under_decay_and_momentum(leaf):
    shapes = {"dense": (32, 8), "heads": (32, 2, 4), "stack": (3, 32, 8), "lsq": (32, 8)}
    axes = jw.Axes(inputs=(-3,), outputs=(-2, -1)) if leaf == "heads" else jw.Axes()
    params = {"w": jax.random.normal(jax.random.key(0), shapes[leaf]), "bias": jnp.ones(8)}
    tx, latent = statsq(bits=2), (lambda p: p)
    if leaf == "lsq":
        params, tx, latent = jw.apply(lsq(bits=2), params), settle, (lambda p: p.latent)
    annealing = confidence_annealing(
        tx, boundary=0.1, layout={"w": axes} if leaf != "lsq" else None
    )
    optimizer = optax.chain(optax.adamw(1e-3, weight_decay=0.1), optax.trace(0.9))
    frozen_last = optax.chain(optimizer, annealing)
    state, plain_state = frozen_last.init(params), optimizer.init(params)
    step = jax.jit(lambda p, s: frozen_last.update(jax.tree.map(jnp.ones_like, p), s, p))
    # After steps whose momentum goes on moving weights that have meanwhile been frozen:
    for _ in range(3):
        updates, state = step(params, state)
        before, params = params, optax.apply_updates(params, updates)
    plain, _ = optimizer.update(jax.tree.map(jnp.ones_like, before), plain_state, before)
    moved = np.asarray(latent(params["w"]) != latent(before["w"]))
    assert 0.02 < moved.mean() < 0.5
    assert np.all(np.asarray(latent(plain["w"])) != 0)  # all of them would have moved
    assert np.all(np.asarray(params["bias"] != before["bias"]))
    if leaf == "lsq":
        assert np.all(np.asarray(params["w"].step != before["w"].step))


def swinging(annealed, steps=400):
    """Flips of a linear model's 2-bit weights under SGD on small batches, after a warm-up."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (512, 24))
    target = x @ jax.random.normal(keys[1], (24, 6))
    tx = statsq(bits=2)
    warm = optax.chain(optax.sgd(0.05, momentum=0.9), oscillation_monitor(tx))
    late = optax.chain(confidence_annealing(tx, boundary=0.02), warm)
    late = optax.chain(late, confidence_annealing(tx, boundary=0.02)) if annealed else warm

    def train(optimizer, params, key):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (16,), 0, 512)
            loss = lambda p: jnp.mean((x[rows] @ fake_quant(p, tx)["w"] - target[rows]) ** 2)  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (params, optimizer.init(params))
        return jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(key, steps))[0])(start)

    params, _ = train(warm, {"w": jnp.zeros((24, 6)) + 0.1}, jax.random.key(1))
    _, state = train(late, params, jax.random.key(2))
    return optax.tree_utils.tree_get(state, "flips")["w"]


def test_annealing_reduces_the_flips_of_weights():
    plain, annealed = (np.asarray(swinging(flag)) for flag in (False, True))
    assert plain.mean() > 2
    assert annealed.mean() < plain.mean() / 2


def test_levels_keep_their_direction_where_scales_are_negative():
    tx = round_to_nearest(bits=3)
    up, down = (jw.apply(tx, {"w": s * jnp.array([[4.0], [1.0], [-2.0]])})["w"] for s in (1, -1))
    assert up.scale[0, 0] < 0 < down.scale[0, 0]
    assert levels_of(up).ravel().tolist() == [4, 1, -2]
    assert levels_of(down).ravel().tolist() == [-4, -1, 2]


def test_the_moving_average_is_that_of_the_definition():
    tx = round_to_nearest(bits=2, grid="narrow")
    monitor = oscillation_monitor(tx, momentum=0.25)
    params, state = {"w": jnp.array([[1.0], [0.4]])}, None
    state = monitor.init(params)
    moves = [0.2, -0.2, 0.2, 0.1, -0.3, -1.0]  # levels 0 1 0 1 1 0 -1: flips at 2, 3 and 5
    frequency, flips = 0.0, [0, 1, 1, 0, 1, 0]
    for move, flip in zip(moves, flips, strict=True):
        updates = {"w": jnp.array([[0.0], [move]])}
        same, state = monitor.update(updates, state, params)
        assert same is updates
        params = optax.apply_updates(params, updates)
        frequency = 0.25 * flip + 0.75 * frequency
    np.testing.assert_allclose(state.frequency["w"].ravel(), [0, frequency], rtol=1e-6)
    assert state.flips["w"].ravel().tolist() == [0, 3]
    assert state.changes["w"].ravel().tolist() == [0, 5]
    assert int(state.count) == 6
    assert float(state.oscillating()["w"]) == 0.5


def test_refusals():
    tx, params = statsq(bits=2), {"w": jnp.ones((4, 4))}
    for make in (confidence_annealing, oscillation_monitor):
        name = f"quantize.{make.__name__}"
        with pytest.raises(TypeError, match=rf"{name}: quantizer=3 is a int. Pass the transform"):
            make(3)
        with pytest.raises(ValueError, match=rf"{name}: the quantizer quantizes nothing"):
            make(jw.identity()).init(params)
        with pytest.raises(ValueError, match=rf"{name}: params is missing"):
            make(tx).update(params, make(tx).init(params))
    with pytest.raises(ValueError, match=r"boundary=-1 must be at least 0"):
        confidence_annealing(tx, boundary=-1)
    with pytest.raises(ValueError, match=r"momentum=0 must lie above 0, up to 1"):
        oscillation_monitor(tx, momentum=0)


@pytest.mark.parametrize("share", ["tensor", "output"])
def test_the_threshold_of_two_levels_is_where_the_signs_are_divided(share):
    """At the mean, which is far from halfway between the levels here, and from their 0."""
    weight = jax.random.normal(jax.random.key(0), (400, 3)) + jnp.array([2.0, -1.0, 0.5])
    tx = binary(share=share)
    leaf = jw.apply(tx, {"w": weight})["w"]
    axis = 0 if share == "output" else None
    mean = np.mean(np.asarray(weight, np.float64), axis=axis, keepdims=True)
    beta = np.mean(np.abs(np.asarray(weight, np.float64)), axis=axis, keepdims=True)
    expected = np.abs(np.asarray(weight) - mean) / (2 * beta)
    # The entries show where they are divided no more finely than they lie.
    np.testing.assert_allclose(threshold_distance(weight, leaf), expected, atol=0.01)
    free = changed_by(tx, weight, 0.02)
    assert 0.002 < free.mean() < 0.1 and (expected[free] < 0.03).all()


@pytest.mark.parametrize("share", ["tensor", "output"])
@pytest.mark.parametrize("scale", ["absmean", "least_squares"])
def test_ternary_weights_have_two_thresholds_and_none_below(share, scale):
    weight = jax.random.normal(jax.random.key(1), (500, 3)) * jnp.array([1.0, 2.0, 0.3])
    leaf = jw.apply(ternary(share=share, scale=scale), {"w": weight})["w"]
    axis = 0 if share == "output" else None
    step = np.mean(np.abs(np.asarray(weight, np.float64)), axis=axis, keepdims=True)
    ratio = step / np.asarray(leaf.scale, np.float64)  # a fitted scale is not what was divided by
    place = np.asarray(weight) / step
    expected = np.abs(np.abs(place) - 0.5) * ratio
    np.testing.assert_allclose(threshold_distance(weight, leaf), expected, atol=0.01)
    assert (np.abs(place + 1.5) < 0.02).any()  # where a level of -2 would be rounded to


def test_a_narrow_grid_whose_range_was_shrunk_has_no_threshold_below_its_last_level():
    weight = jax.random.normal(jax.random.key(2), (300, 2)).at[0].set(-9.0)
    tx = round_to_nearest(bits=3, grid="narrow", search=99.0)
    leaf = jw.apply(tx, {"w": weight})["w"]
    place = np.asarray(weight) / np.asarray(leaf.scale)
    assert (place < -4).any()  # would stand by a threshold at -3.5 if there were a level of -4
    far = np.abs(place[..., None] - (np.arange(-3, 3) + 0.5)).min(-1)
    np.testing.assert_allclose(threshold_distance(weight, leaf), far, atol=1e-4)
