"""Learned steps against the authors' code, a slow NumPy definition, and their own integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxweights as jw
from jaxweights.quantize import lsq, lsq_round, lsq_step, settle
from jaxweights.weights import LearnedStep
from tests._fixtures import fixture
from tests.contract._trees import LAYOUT, assert_same, make_params
from tests.quantize.training.test_straight_through import forward


def oracle(x, step, smallest, largest, out_gradient, count):
    """Values and gradients of one matrix with one step, in float64."""
    x, g = np.asarray(x, np.float64), np.asarray(out_gradient, np.float64)
    place = x / step
    inside = (place >= smallest) & (place <= largest)
    codes = np.clip(np.round(place), smallest, largest)
    per_step = np.where(inside, codes - place, codes) * g
    return codes * step, np.where(inside, g, 0), per_step / np.sqrt(count * largest)


@pytest.mark.parametrize("case", ["b2_row", "b2_tensor", "b4_row", "b4_tensor"])
def test_values_and_gradients_are_those_of_the_public_code(case):
    arrays = fixture("quantize/ofq_statsq_lsq.npz")
    weight = jnp.asarray(arrays["statsq/W2"].T)  # stored (out, in)
    tx = lsq(bits=int(case[1]), group_size=None if case.endswith("row") else "tensor")
    latent = jw.apply(tx, {"w": weight})["w"]
    expected = {
        name: arrays[f"lsq_weight/{case}/{name}"] for name in ("dq", "s", "grad_w", "grad_s")
    }
    np.testing.assert_allclose(latent.step[0], expected["s"], rtol=1e-6)
    probe = jnp.linspace(-1, 1, weight.size).reshape(weight.shape[::-1]).T
    grads = jax.grad(lambda w: jnp.sum(w.materialize() * probe))(latent)
    np.testing.assert_allclose(latent.materialize().T, expected["dq"], atol=1e-6)
    np.testing.assert_allclose(grads.latent.T, expected["grad_w"], atol=1e-5)
    np.testing.assert_allclose(grads.step[0], expected["grad_s"], atol=1e-5)


@pytest.mark.parametrize("group_size", [4, None, "tensor"])
def test_every_group_has_a_step_and_a_gradient_of_its_own(group_size):
    keys = jax.random.split(jax.random.key(0))
    weight = jax.random.normal(keys[0], (12, 5)) * jnp.arange(1.0, 13)[:, None]
    probe = jax.random.normal(keys[1], (12, 5))
    latent = jw.apply(lsq(bits=3, group_size=group_size), {"w": weight})["w"]
    grads = jax.grad(lambda w: jnp.sum(w.materialize() * probe))(latent)
    rows, cols = latent.step.shape
    assert (rows, cols) == {4: (3, 5), None: (1, 5), "tensor": (1, 1)}[group_size]
    for r in range(rows):
        for c in range(cols):
            part = (
                slice(r * 12 // rows, (r + 1) * 12 // rows),
                slice(c * 5 // cols, (c + 1) * 5 // cols),
            )
            start = 2 * np.abs(weight[part]).mean() / np.sqrt(3)
            np.testing.assert_allclose(latent.step[r, c], start, rtol=1e-6)
            values, d_latent, d_step = oracle(
                weight[part], latent.step[r, c], -4, 3, probe[part], weight[part].size
            )
            np.testing.assert_allclose(latent.materialize()[part], values, rtol=1e-6)
            np.testing.assert_allclose(grads.latent[part], d_latent, rtol=1e-6)
            np.testing.assert_allclose(grads.step[r, c], d_step.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_settled_integers_compute_what_training_ended_at(dtype):
    params = make_params(dtype)
    latent = jw.apply(lsq(bits=3, group_size=None), params, layout=LAYOUT)
    stored = settle(latent)
    assert isinstance(stored["attention"]["kernel"], jw.Quantized)
    assert_same(jax.jit(jw.materialize)(latent), jw.materialize(stored))
    x = jax.random.normal(jax.random.key(3), (5, 32))
    run = jax.jit(lambda p: forward(jw.materialize(p), x))
    assert_same(run(latent), run(stored))


def test_a_tree_trains_as_a_whole_and_its_steps_move():
    x = jax.random.normal(jax.random.key(1), (64, 16))
    target = x @ jax.random.normal(jax.random.key(2), (16, 4))
    params = {"kernel": jax.random.normal(jax.random.key(3), (16, 4))}
    latent = jw.apply(lsq(bits=3), params)
    model = jw.lift(lambda p, x: x @ p["kernel"])
    optimizer = optax.adam(1e-2)

    def loss(p):
        return jnp.mean((model(p, x) - target) ** 2)

    def step(carry, _):
        p, state = carry
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = optimizer.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), value

    with jax.numpy_dtype_promotion("standard"):
        run = jax.jit(lambda c: jax.lax.scan(step, c, length=300))
        (trained, _), losses = run((latent, optimizer.init(latent)))
    assert losses[-1] < losses[0] / 5
    assert not np.array_equal(trained["kernel"].step, latent["kernel"].step)
    np.testing.assert_allclose(loss(settle(trained)), loss(trained), rtol=1e-5)


def test_a_stack_is_scanned_and_lifted_with_a_step_for_every_layer():
    stack = (
        jax.random.normal(jax.random.key(0), (3, 8, 8)) * jnp.array([1.0, 10, 100])[:, None, None]
    )
    latent = jw.apply(lsq(bits=4), {"w": stack}, layout={"w": jw.Axes()})
    assert latent["w"].step.shape == (3, 1, 1)
    model = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]  # noqa: E731
    x = jnp.ones((2, 8))
    lifted = jax.jit(jw.lift(model, on_materialize="error"))(latent, x)
    np.testing.assert_allclose(lifted, model(jw.materialize(latent), x), rtol=1e-5)
    grads = jax.grad(lambda p: jw.lift(model)(p, x).sum())(latent)
    dense = jax.grad(lambda p: model(jw.materialize(p), x).sum())(latent)
    assert_same(grads, dense, rtol=1e-4, atol=1e-6)


def test_zeros_and_steps_that_left_the_positive_numbers_do_no_harm():
    latent = jw.apply(lsq(bits=4), {"w": jnp.zeros((4, 2))})["w"]
    assert np.all(latent.step == 1)
    for step in (0.0, -1.0):
        weight = LearnedStep(
            jnp.array([[0.0, 2.0]]), jnp.full((1, 1), step), 4, view=jw.weights.View.of((1, 2))
        )
        grads = jax.grad(lambda w: w.materialize().sum())(weight)
        assert np.all(np.isfinite(weight.materialize()))
        assert np.isfinite(grads.step).all()
        np.testing.assert_array_equal(weight.quantized().materialize(), weight.materialize())


@pytest.mark.parametrize("bits, signed", [(3, True), (2, False), (1, False)])
def test_activations_are_rounded_with_a_step_for_every_token_position(bits, signed):
    smallest, largest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x = jax.random.normal(jax.random.key(0), (6, 3, 8))
    step = lsq_step(x, bits=bits, signed=signed, axis=(0, 2))
    np.testing.assert_allclose(
        step[0, :, 0], 2 * np.abs(x).mean(axis=(0, 2)) / np.sqrt(largest), rtol=1e-6
    )
    probe = jax.random.normal(jax.random.key(1), x.shape)
    fn = lambda x, s: lsq_round(x, s, bits=bits, signed=signed)  # noqa: E731
    d_x, d_step = jax.grad(lambda x, s: jnp.sum(fn(x, s) * probe), argnums=(0, 1))(x, step)
    for t in range(3):
        values, expected_x, expected_step = oracle(
            x[:, t], step[0, t, 0], smallest, largest, probe[:, t], 48
        )
        np.testing.assert_allclose(fn(x, step)[:, t], values, rtol=1e-6)
        np.testing.assert_allclose(d_x[:, t], expected_x, rtol=1e-6)
        np.testing.assert_allclose(d_step[0, t, 0], expected_step.sum(), rtol=1e-4, atol=1e-5)
    assert fn(x.astype(jnp.bfloat16), step).dtype == jnp.bfloat16


def test_settings_are_refused():
    with pytest.raises(ValueError, match=r"quantize.lsq: bits=1 must lie between 2 and 8"):
        lsq(bits=1)
    with pytest.raises(ValueError, match=r"quantize.lsq: 'w': group_size=5 does not divide"):
        jw.apply(lsq(bits=4, group_size=5), {"w": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match=r"'w': is already a LearnedStep"):
        jw.apply(lsq(bits=4), jw.apply(lsq(bits=4), {"w": jnp.ones((4, 4))}))
    with pytest.raises(ValueError, match=r"quantize.lsq_round: bits=1 must lie between 2 and 8"):
        lsq_round(jnp.ones(3), jnp.array(1.0), bits=1)
    with pytest.raises(ValueError, match=r"quantize.lsq_step: bits=9 must lie between 1 and 8"):
        lsq_step(jnp.ones(3), bits=9, signed=False)


def test_activations_take_a_plain_number_as_their_step():
    x = jnp.array([0.2, 0.7, 9.0])
    np.testing.assert_array_equal(lsq_round(x, 0.5, bits=2), lsq_round(x, jnp.array(0.5), bits=2))
    with pytest.raises(TypeError, match=r"quantize.lsq_round: bits=2.5 must be an integer"):
        lsq_round(x, 0.5, bits=2.5)
