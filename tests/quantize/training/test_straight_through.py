"""fake_quant trains what is stored afterwards."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.quantize import fake_quant, round_to_nearest, straight_through
from tests.contract._trees import LAYOUT, assert_same, make_params

Q = jw.quantize

TRANSFORMS = {
    "int8": round_to_nearest(bits=8),
    "int4 groups": round_to_nearest(bits=4, group_size=8),
    "int3 affine": round_to_nearest(bits=3, grid="affine"),
    "int2 half": round_to_nearest(bits=2, grid="half"),
    "int4 searched": round_to_nearest(bits=4, search="mse"),
    "ternary": Q.ternary(),
    "ternary fitted": Q.ternary(share="output", scale="least_squares"),
    "binary": Q.binary(),
    "pruned, then int4": jw.chain(jw.sparsify.magnitude(sparsity=0.5), round_to_nearest(bits=4)),
}


def forward(params, x):
    """Touches every matrix of the tree: heads, a plain kernel, a stack under scan."""
    dtype = params["dense"]["kernel"].dtype
    x = x.astype(dtype)
    heads = jnp.einsum("td,dhk->thk", x, params["attention"]["kernel"]).reshape(x.shape[0], -1)
    y = heads @ params["dense"]["kernel"] + params["dense"]["bias"][None]

    def block(carry, kernel):
        return carry + jnp.tanh(jnp.concatenate([carry, carry], axis=-1) @ kernel), None

    return jax.lax.scan(block, y, params["stack"]["kernel"])[0]


CASES = [(name, jnp.float32) for name in TRANSFORMS]
CASES += [("int4 groups", jnp.bfloat16), ("ternary fitted", jnp.bfloat16)]


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_what_is_trained_is_what_is_stored_to_the_bit(name, dtype):
    tx, params = TRANSFORMS[name], make_params(dtype)
    x = jax.random.normal(jax.random.key(3), (5, 32))
    fake = jax.jit(lambda p: fake_quant(p, tx, layout=LAYOUT))(params)
    stored = jw.apply(tx, params, layout=LAYOUT)
    assert_same(fake, jw.materialize(stored))
    assert not np.array_equal(fake["stack"]["kernel"], params["stack"]["kernel"])
    trained = jax.jit(lambda p: forward(fake_quant(p, tx, layout=LAYOUT), x))(params)
    assert_same(trained, jax.jit(forward)(jw.materialize(stored), x))


def test_gradients_are_those_at_the_rounded_weights():
    tx, params = TRANSFORMS["int4 groups"], make_params()
    floats = {k: v for k, v in params.items() if k != "steps"}
    x = jax.random.normal(jax.random.key(3), (5, 32))
    loss = lambda p: jnp.sum(forward(p, x) ** 2)  # noqa: E731
    layout = LAYOUT
    ours = jax.jit(jax.grad(lambda p: loss(fake_quant(p, tx, layout=layout))))(floats)
    expected = jax.grad(loss)(jw.materialize(jw.apply(tx, floats, layout=layout)))
    assert_same(ours, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(ours["dense"]["kernel"], jax.grad(loss)(floats)["dense"]["kernel"])


def test_learned_steps_clip_where_their_integers_end():
    kernel = jax.random.normal(jax.random.key(0), (32, 3))
    tx = jw.quantize.lsq(bits=2)
    grads = jax.grad(lambda p: fake_quant(p, tx, clipped="zero")["w"].sum())({"w": kernel})["w"]
    place = kernel / jw.apply(tx, {"w": kernel})["w"].step
    inside = (place >= -2.5) & (place <= 1.5)
    assert 0 < int(inside.sum()) < kernel.size
    np.testing.assert_array_equal(grads, inside.astype(jnp.float32))


def test_clipped_entries_get_no_gradient_where_that_is_asked_for():
    # Of "half" at 2 bits: scale = amax / 1.5, codes -2 to 1, so that levels are -2, -1, 0, 1 steps.
    # Of "signed_max": scale = 3 / 2, levels -3, -1.5, 0 and 1.5; 2.25 is the last that is in reach.
    kernel = jnp.array([[-3.0], [2.2], [2.3], [0.7]])
    tx = round_to_nearest(bits=2)
    grad = lambda **how: jax.grad(lambda p: fake_quant(p, tx, **how)["w"].sum())({"w": kernel})["w"]  # noqa: E731
    assert grad().ravel().tolist() == [1, 1, 1, 1]
    assert grad(clipped="zero").ravel().tolist() == [1, 1, 0, 1]
    values = fake_quant({"w": kernel}, tx, clipped="zero")["w"]
    assert values.ravel().tolist() == [-3, 1.5, 1.5, 0]


@pytest.mark.parametrize("grid", ["narrow", "full", "affine"])
def test_grids_that_span_the_range_clip_nothing(grid):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 8))}
    tx = round_to_nearest(bits=3, grid=grid, group_size=16)
    grads = jax.grad(lambda p: fake_quant(p, tx, clipped="zero")["w"].sum())(params)
    assert np.all(grads["w"] == 1)


def test_a_searched_range_clips_the_entries_outside_it():
    params = {"w": jax.random.normal(jax.random.key(0), (256, 4))}
    tx = round_to_nearest(bits=3, grid="affine", search="mse")
    stored = jw.apply(tx, params)["w"]
    step, zero = np.asarray(stored.scale)[0], np.asarray(stored.zero_point, np.float32)[0]
    position = np.asarray(params["w"]) / step + zero
    expected = (position >= -0.5) & (position <= 7.5)
    assert 0 < np.sum(~expected) < 200
    grads = jax.grad(lambda p: fake_quant(p, tx, clipped="zero")["w"].sum())(params)
    np.testing.assert_array_equal(grads["w"], expected.astype(np.float32))


def test_forward_mode_and_vmap_agree_with_reverse_mode():
    tx = TRANSFORMS["int2 half"]
    kernels = jax.random.normal(jax.random.key(0), (3, 8, 4))
    fn = lambda w: fake_quant({"w": w}, tx)["w"]  # noqa: E731
    one = jnp.stack([fn(w) for w in kernels])
    np.testing.assert_array_equal(jax.vmap(fn)(kernels), one)
    _, tangent = jax.jvp(fn, (kernels[0],), (kernels[1],))
    np.testing.assert_array_equal(tangent, kernels[1])


def test_stochastic_rounding_draws_anew_with_every_key():
    tx = Q.stochastic_rounding(bits=3)
    params = {"w": jax.random.normal(jax.random.key(0), (32, 4))}
    first, again, other = (fake_quant(params, tx, key=jax.random.key(i))["w"] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(ValueError, match=r"stochastic_rounding: 'key' is missing"):
        fake_quant(params, tx)


def test_leaves_that_the_transform_leaves_alone_keep_their_gradient_and_their_ties():
    table = jax.random.normal(jax.random.key(0), (6, 4))
    params = {"embedding": table, "head": {"kernel": table}, "dense": {"kernel": table * 2}}
    fake = fake_quant(params, round_to_nearest(bits=2))
    assert fake["embedding"] is table
    assert fake["head"]["kernel"] is table
    grads = jax.grad(lambda p: sum(x.sum() for x in jax.tree.leaves(p)))(fake)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.promotion(dtypes="standard", ranks="allow")
def test_linen_nnx_and_dataclass_modules_train():
    tx = round_to_nearest(bits=2)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    linen = nn.Dense(3)
    params = linen.init(jax.random.key(0), x)
    grads = jax.grad(lambda p: linen.apply(fake_quant(p, tx), x).sum())(params)
    np.testing.assert_allclose(grads["params"]["kernel"], x.sum(0)[:, None].repeat(3, 1), rtol=1e-5)

    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    grads = jax.grad(lambda s: nnx.merge(graph, fake_quant(s, tx))(x).sum())(state)
    np.testing.assert_allclose(jax.tree.leaves(grads)[1], x.sum(0)[:, None].repeat(3, 1), rtol=1e-5)
    merged = nnx.merge(graph, fake_quant(state, tx))
    assert len(np.unique(np.abs(merged.kernel[...][:, 0]))) <= 3

    module = Module(jnp.ones((4, 3)) * jnp.array([0.3, 1.0, 0.2]), jax.nn.relu)
    new = fake_quant(module, tx)
    assert new.activation is jax.nn.relu
    np.testing.assert_allclose(new.kernel, module.kernel, rtol=1e-6)


@pytest.mark.promotion(dtypes="standard", ranks="allow")
def test_nnx_modules_that_count_keep_their_counts_where_only_parameters_are_rounded():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    x = jax.random.normal(jax.random.key(1), (5, 4)) + 1

    def loss(model):
        nnx.update(model, fake_quant(nnx.state(model, nnx.Param), round_to_nearest(bits=2)))
        return jnp.sum(model(x) ** 3)

    model = Model(nnx.Rngs(0))
    kernel = nnx.state(model, nnx.Param)["dense"]["kernel"][...]
    rounded = fake_quant({"kernel": kernel}, round_to_nearest(bits=2))["kernel"]
    grads = nnx.grad(loss)(model)
    assert np.abs(grads["dense"]["kernel"][...]).max() > 0.1
    np.testing.assert_allclose(model.norm.mean[...], 0.01 * (x @ rounded).mean(0), rtol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """As Equinox has them: functions are leaves."""

    kernel: jax.Array
    activation: object


def test_refusals_name_the_path_and_the_remedy():
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(
        ValueError, match=r"clipped='none' is unknown. Choose one of 'pass', 'zero'"
    ):
        fake_quant(params, round_to_nearest(bits=4), clipped="none")
    with pytest.raises(TypeError, match=r"quantize.fake_quant: tx=4 is a int, not a transform"):
        fake_quant(params, 4)
    with pytest.raises(ValueError, match=r"'w': became a LowRank, whose levels .*clipped='pass'"):
        fake_quant(params, jw.adapt.lora(rank=1), clipped="zero", key=jax.random.key(0))
    widen = jw.stateless(lambda p, c: {"w": jnp.ones((4, 5))}, name="widen")
    with pytest.raises(ValueError, match=r"'w': became float32\[4, 5\] from float32\[4, 4\]"):
        fake_quant(params, widen)


def test_straight_through_returns_the_value_to_the_last_bit():
    latent, value = jnp.float32(1e8), jnp.float32(0.1)
    assert latent + (value - latent) != value  # what the usual formula gives
    assert straight_through(latent, value) == value
    assert jax.grad(lambda z, v: straight_through(z, v) * 3, argnums=(0, 1))(latent, value) == (
        3,
        0,
    )


def test_changes_of_integer_leaves_are_kept():
    """A transform may count, too, and leaves of whole numbers then are not what they were."""

    def count(params, context):
        del context
        return {**params, "count": params["count"] + 1}

    counting = jw.core.stateless(count, name="count")
    tx = jw.chain(counting, Q.round_to_nearest(bits=4))
    params = {"count": jnp.int32(3), "w": jax.random.normal(jax.random.key(0), (8, 4))}
    new = Q.fake_quant(params, tx)
    assert int(new["count"]) == 4
    assert bool(jnp.all(new["w"] == jw.materialize(jw.apply(tx, params))["w"]))
