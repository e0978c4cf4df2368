"""Represented weights pass through jit, loops, branches, remat, custom derivatives, shard_map."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxweights as jw
from jaxweights.lift import lift
from jaxweights.weights import materialize
from tests.lift._weights import REPRESENTATIONS, assert_same, int8, low_rank, normal

LAZY = {"int8": int8, "low_rank": low_rank}
TINY = np.float32(0.3)


def params(represent, layers=3, width=4):
    return {
        "first": represent(TINY * normal(0, width, width)),
        "rest": represent(TINY * normal(1, layers, width, width)),
    }


X = normal(2, 5, 4)


@jax.jit
def _layer(x, w):
    return jnp.tanh(x @ w)


def scanned(p, x):
    """One weight is a constant of the scan, the other is sliced by it."""
    return jax.lax.scan(lambda h, w: (_layer(h, w) @ p["first"], h.sum()), x, p["rest"])


def reverse_unrolled(p, x):
    step = lambda h, w: (_layer(h, w), h[0])  # noqa: E731
    return jax.lax.scan(step, x, p["rest"], reverse=True, unroll=2)


def nested_scans(p, x):
    inner = lambda h, w: (_layer(h, w), None)  # noqa: E731
    outer = lambda h, _: (jax.lax.scan(inner, h, p["rest"])[0] @ p["first"], None)  # noqa: E731
    return jax.lax.scan(outer, x, length=2)[0]


def fori(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: _layer(h, p["rest"][i]) @ p["first"], x)


def while_loop(p, x):
    condition = lambda state: (state[0] < 3) & (state[1].sum() < 1e6)  # noqa: E731
    body = lambda state: (state[0] + 1, _layer(state[1], p["first"]))  # noqa: E731
    return jax.lax.while_loop(condition, body, (0, x))


def while_condition(p, x):
    condition = lambda h: jnp.square(h @ p["first"]).sum() < 1000  # noqa: E731
    return jax.lax.while_loop(condition, lambda h: h * 1.5, x)


def cond(p, x):
    yes, no = (lambda h: h @ p["first"]), (lambda h: h @ p["rest"][1])
    return jax.lax.cond(x[0, 0] > 0, yes, no, x), jax.lax.cond(x[0, 0] < 0, yes, no, x)


def switch_on_operand(p, x):
    branches = [lambda w, h: h @ w, lambda w, h: h @ w.T, lambda w, h: h]
    return jax.lax.switch(jnp.argmax(x[0]) % 3, branches, p["first"], x)


def remat(p, x):
    block = jax.checkpoint(lambda h, w: _layer(h, w), policy=jax.checkpoint_policies.dots_saveable)
    return jax.lax.scan(lambda h, w: (block(h, w), None), x, p["rest"])[0]


@jax.custom_jvp
def _squash(x):
    return jnp.tanh(x)


_squash.defjvp(lambda x, t: (jnp.tanh(x[0]), 10 * t[0]))


@jax.custom_vjp
def _scaled_product(x, w):
    return x @ w


_scaled_product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda res, g: (7 * (g @ res[1].T), 3 * (res[0].T @ g))
)


def custom_derivatives(p, x):
    return _squash(_scaled_product(_squash(x @ p["first"]), p["first"]))


def inner_vmap(p, x):
    experts = jax.vmap(lambda w, h: h @ w, in_axes=(0, None))(p["rest"], x)
    return experts + jax.vmap(lambda h: h @ p["first"])(x)[None]


def inner_grad(p, x):
    return jax.grad(lambda h: jnp.sum(jnp.tanh(h @ p["first"]) @ p["rest"][0]))(x)


def inner_jvp(p, x):
    return jax.jvp(lambda h: jnp.tanh(h @ p["first"]), (x,), (x,))


LAZY_EVERYWHERE = [
    scanned,
    reverse_unrolled,
    nested_scans,
    fori,
    while_loop,
    cond,
    switch_on_operand,
    remat,
    inner_vmap,
    inner_grad,
    inner_jvp,
]


@pytest.mark.parametrize("represent", LAZY.values(), ids=LAZY)
@pytest.mark.parametrize("fn", LAZY_EVERYWHERE)
def test_the_answer_is_the_dense_one_and_no_weight_is_materialised(fn, represent):
    p = params(represent)
    both = jax.jit(lambda p, x: (lift(fn, on_materialize="error")(p, x), fn(materialize(p), x)))
    assert_same(*both(p, X))


@pytest.mark.parametrize("fn", [custom_derivatives, while_condition])
@pytest.mark.parametrize("represent", REPRESENTATIONS.values(), ids=REPRESENTATIONS)
def test_where_weights_are_materialised_the_answer_is_still_the_dense_one(fn, represent):
    p = params(represent)
    assert_same(*jax.jit(lambda p, x: (lift(fn)(p, x), fn(materialize(p), x)))(p, X))


def test_weights_carried_by_a_loop_become_dense():
    def fn(p, x):
        swap = lambda i, state: (state[1], state[0], state[2] @ state[0])  # noqa: E731
        return jax.lax.fori_loop(0, 2, swap, (p["first"], p["second"], x))[2]

    p = {"first": int8(normal(0, 4, 4)), "second": int8(normal(1, 4, 4))}
    assert_same(lift(fn)(p, X), fn(materialize(p), X))
    with pytest.raises(ValueError, match=r"'first': the primitive 'scan' has no rule"):
        lift(fn, on_materialize="error")(p, X)


def test_a_stack_of_transposed_matrices_is_scanned():
    fn = lambda w, x: jax.lax.scan(lambda h, m: (h @ m.T, None), x, w)[0]  # noqa: E731
    for represent in LAZY.values():
        w = represent(TINY * normal(0, 3, 4, 4))
        assert_same(lift(fn, on_materialize="error")(w, X), fn(materialize(w), X))


def test_gradient_rules_of_custom_functions_are_kept():
    """The rules are false on purpose: plain differentiation would give other numbers."""
    p = params(low_rank)
    dense = materialize(p)
    loss = lambda fn: lambda p, x: jnp.sum(jnp.square(fn(p, x)))  # noqa: E731
    lifted = jax.grad(loss(lift(custom_derivatives)), argnums=1)(p, X)
    expected = jax.grad(loss(custom_derivatives), argnums=1)(dense, X)
    honest = jax.grad(
        loss(lambda p, x: jnp.tanh(jnp.tanh(x @ p["first"]) @ p["first"])), argnums=1
    )(dense, X)
    assert_same(lifted, expected)
    assert not np.allclose(lifted, honest, rtol=0.1)


def _as_function_of_factors(fn, p):
    """The dense weight of a `LowRank` as a plain function of its factors."""

    def loss(factors, x):
        dense = {
            k: materialize(w.base) + 0.5 * jnp.matmul(factors[k][0], factors[k][1])
            for k, w in p.items()
        }
        return jnp.sum(jnp.square(jax.tree.leaves(fn(dense, x))[0]))

    return loss


@pytest.mark.parametrize("fn", [scanned, remat, custom_derivatives, inner_vmap, cond, inner_grad])
def test_gradients_reach_the_factors_through_every_construct(fn):
    p = params(low_rank)

    def lifted_loss(factors, x):
        weights = {
            k: dataclasses.replace(w, down=factors[k][0], up=factors[k][1]) for k, w in p.items()
        }
        return jnp.sum(jnp.square(jax.tree.leaves(lift(fn)(weights, x))[0]))

    factors = {k: (w.down, w.up) for k, w in p.items()}
    both = jax.jit(
        lambda f, x: (jax.grad(lifted_loss)(f, x), jax.grad(_as_function_of_factors(fn, p))(f, x))
    )
    actual, expected = both(factors, X)
    assert_same(actual, expected, tolerance=2e-4)  # sums of squares, of order 10
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(expected))


@pytest.mark.parametrize("represent", REPRESENTATIONS.values(), ids=REPRESENTATIONS)
def test_vmap_outside_maps_over_activations_and_over_stacked_weights(represent):
    p = params(represent)
    fn = lift(lambda w, x: jnp.tanh(x @ w))
    x = normal(3, 3, 5, 4)
    per_layer = jax.vmap(fn)(p["rest"], x)
    assert_same(per_layer, jnp.tanh(jnp.matmul(x, materialize(p["rest"]))))
    per_example = jax.vmap(fn, in_axes=(None, 0))(p["first"], x)
    assert_same(per_example, jnp.tanh(jnp.matmul(x, materialize(p["first"])[None])))


def test_jvp_and_jacobian_outside_differentiate_the_activations():
    p = params(int8)
    fn = lambda x: lift(scanned)(p, x)[0]  # noqa: E731
    dense = lambda x: scanned(materialize(p), x)[0]  # noqa: E731
    assert_same(jax.jvp(fn, (X,), (X,)), jax.jvp(dense, (X,), (X,)))
    assert_same(jax.jacrev(fn)(X[:1]), jax.jacfwd(dense)(X[:1]))


def test_inner_jit_with_shardings_of_its_own_is_respected(mesh):
    sharding = NamedSharding(mesh, P("data"))
    inner = jax.jit(lambda x, w: x @ w, out_shardings=sharding)
    x = normal(0, 8, 4)
    w = int8(normal(1, 4, 4))
    y = jax.jit(lift(lambda w, x: inner(x, w)))(w, x)
    assert_same(y, x @ materialize(w))
    assert y.sharding.is_equivalent_to(sharding, 2)


SPECS = [
    (P(None, None, "model"), P("data", None), P(None, "data", "model")),  # columns split
    (P(None, "model", None), P("data", "model"), P(None, "data", None)),  # rows split
    (P("model", None, None), P(None, None), P("model", None, None)),  # experts split
    (P(), P("data"), P(None, "data")),  # replicated weight
]


@pytest.mark.parametrize("w_spec, x_spec, y_spec", SPECS)
@pytest.mark.parametrize("represent", REPRESENTATIONS.values(), ids=REPRESENTATIONS)
def test_shard_map_splits_the_parts_of_a_weight_as_the_dense_one(
    mesh, represent, w_spec, x_spec, y_spec
):
    weight, x = represent(normal(0, 4, 8, 4)), normal(1, 6, 8)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=y_spec)
    def fn(w, x):
        y = jnp.einsum("td,edf->etf", x, w)
        return jax.lax.psum(y, "model") if w_spec == SPECS[1][0] else y

    mode = "ok" if represent is REPRESENTATIONS["masked"] else "error"
    lifted = lift(fn, on_materialize=mode)
    both = jax.jit(lambda w, x: (lifted(w, x), fn(materialize(w), x)))
    assert_same(*both(weight, x))


def test_lift_inside_shard_map_takes_each_devices_experts(mesh):
    weight, x = int8(normal(0, 4, 8, 4)), normal(1, 6, 8)

    def fn(w, x):
        return jnp.einsum("td,edf->etf", x, w)

    specs = {"in_specs": (P("model"), P("data")), "out_specs": P("model", "data")}
    run = jax.shard_map(lift(fn, on_materialize="error"), mesh=mesh, **specs)
    assert_same(jax.jit(run)(weight, x), fn(materialize(weight), x))


def test_arrays_with_shardings_in_their_types_keep_them():
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(explicit, explicit))
    w, x = int8(normal(0, 8, 4)), normal(1, 6, 8)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        split = NamedSharding(mesh, P(None, "model"))
        w = dataclasses.replace(w, codes=jax.device_put(w.codes, split))
        y = jax.jit(lift(lambda w, x: jnp.tanh(x @ w)))(w, x)
        assert jax.typeof(y).sharding.spec == P("data", "model")
        assert_same(y, jnp.tanh(jnp.matmul(x, materialize(w))))


GRIDS = {
    "packed groups": {"bits": 4, "group_size": 2},
    "affine groups": {"bits": 3, "group_size": 4, "grid": "affine"},
    "channels": {"bits": 8},
    "one scale": {"bits": 8, "group_size": "tensor"},
}


@pytest.mark.parametrize("w_spec, x_spec, y_spec", SPECS)
@pytest.mark.parametrize("grid", GRIDS)
def test_shard_map_splits_quantized_weights_with_their_groups(mesh, grid, w_spec, x_spec, y_spec):
    dense = {"w": normal(0, 4, 16, 4)}
    tx = jw.quantize.round_to_nearest(**GRIDS[grid])
    weight, x = jw.apply(tx, dense, layout={"w": jw.Axes()})["w"], normal(1, 6, 16)

    def fn(w, x):
        y = jnp.einsum("td,edf->etf", x, w)
        return jax.lax.psum(y, "model") if w_spec == SPECS[1][0] else y

    split = jax.shard_map(fn, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=y_spec)
    lifted = lift(split, on_materialize="error")
    assert_same(*jax.jit(lambda w, x: (lifted(w, x), split(materialize(w), x)))(weight, x))


def test_groups_that_a_split_would_cut_are_materialised(mesh):
    tx = jw.quantize.round_to_nearest(bits=8, group_size=8)
    weight = jw.apply(tx, {"w": normal(0, 16, 4)})["w"]
    x = normal(1, 6, 16)
    fn = jax.shard_map(
        lambda w, x: jax.lax.psum(x @ w, "model"),
        mesh=mesh,
        in_specs=(P("model"), P(None, "model")),
        out_specs=P(),
    )
    assert_same(jax.jit(lift(fn))(weight, x), x @ materialize(weight))
    with pytest.raises(ValueError, match=r"the primitive 'shard_map' has no rule for a Quantized"):
        lift(fn, on_materialize="error")(weight, x)


def scan_pairs(p, x):
    pair = lambda h, ws: (_layer(_layer(h, ws[0]), ws[1]), None)  # noqa: E731
    return jax.lax.scan(pair, x, p.reshape(2, 2, 4, 4))[0]


def scan_halves(p, x):
    step = lambda h, w: (_layer(h, w), None)  # noqa: E731
    return jax.lax.scan(step, jax.lax.scan(step, x, p[:2])[0], p[2:])[0]


@pytest.mark.parametrize("fn", [scan_pairs, scan_halves])
@pytest.mark.parametrize("represent", LAZY.values(), ids=LAZY)
def test_stacks_are_cut_and_grouped_before_they_are_scanned(represent, fn):
    p = represent(TINY * normal(1, 4, 4, 4))
    both = jax.jit(lambda p, x: (lift(fn, on_materialize="error")(p, x), fn(materialize(p), x)))
    assert_same(*both(p, X))
