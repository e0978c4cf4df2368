"""to_optax: projection after the optimizer's step, inside optax's own machinery."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxweights.adapt import factors
from jaxweights.core import Transform, between, every, split, stateless, to_optax
from jaxweights.weights import LowRank, Masked

# optax multiplies its own dtypes as it likes.
pytestmark = pytest.mark.promotion(dtypes="standard", ranks="allow")


def keep_top_half() -> Transform:
    """Keeps, of every leaf, the entries above the median magnitude: a mask that moves."""

    def mask(x):
        return Masked(x, jnp.abs(x) > jnp.median(jnp.abs(x)))

    return stateless(lambda p, _: {k: mask(v) for k, v in p.items()}, name="keep_top_half")


def to_grid(step: float) -> Transform:
    return stateless(
        lambda p, _: {k: (jnp.round(v / step) * step).astype(v.dtype) for k, v in p.items()},
        name="to_grid",
    )


def params(dtype=jnp.float32):
    draw = np.random.default_rng(0).standard_normal
    return {"a": jnp.asarray(draw((8, 6)), dtype), "b": jnp.asarray(draw((5,)), dtype)}


def grads(seed, tree):
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(draw(x.shape), x.dtype), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True])
def test_what_the_transform_zeroes_is_exactly_zero_and_the_rest_is_the_optimizers(dtype, jit):
    inner = optax.adam(0.1)
    optimizer = optax.chain(inner, to_optax(keep_top_half()))
    update = jax.jit(optimizer.update) if jit else optimizer.update
    inner_update = jax.jit(inner.update) if jit else inner.update
    p = params(dtype)
    state, inner_state = optimizer.init(p), inner.init(p)
    for i in range(4):
        g = grads(i, p)
        plain, inner_state = inner_update(g, inner_state, p)
        stepped = optax.apply_updates(p, plain)
        updates, state = update(g, state, p)
        p = optax.apply_updates(p, updates)
        for path in p:
            kept = jnp.abs(stepped[path]) > jnp.median(jnp.abs(stepped[path]))
            expected = jnp.where(kept, stepped[path], 0)
            np.testing.assert_array_equal(np.asarray(p[path]), np.asarray(expected))
            assert p[path].dtype == dtype
    assert int(state[1].count) == 4


def test_values_lie_on_the_grid_to_the_last_bit_but_one():
    optimizer = optax.chain(optax.sgd(0.1), to_optax(to_grid(0.25)))
    p = params()
    updates, _ = optimizer.update(grads(1, p), optimizer.init(p), p)
    steps = optax.apply_updates(p, updates)["a"] / 0.25
    # p + (q - p) rounds twice.
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_schedules_inside_go_by_the_optimizers_count(jit):
    optimizer = to_optax(between(2, 5, every(2, keep_top_half())))
    update = jax.jit(optimizer.update) if jit else optimizer.update
    p = params()
    nothing = jax.tree.map(jnp.zeros_like, p)
    state, sparse_after = optimizer.init(p), []
    with pytest.raises(ValueError, match=r"turns an array .* into a Masked .*materialized\("):
        update(nothing, state, p)
    from jaxweights.core import materialized

    optimizer = to_optax(between(2, 5, every(2, materialized(keep_top_half()))))
    update = jax.jit(optimizer.update) if jit else optimizer.update
    state = optimizer.init(p)
    for i in range(7):
        updates, state = update(nothing, state, p)
        zeros = int(jnp.sum(optax.apply_updates(p, updates)["a"] == 0))
        sparse_after += [i] if zeros else []
    assert sparse_after == [2, 4]


def test_it_lives_inside_multi_steps_and_inject_hyperparams():
    def build(learning_rate):
        return optax.chain(optax.sgd(learning_rate), to_optax(keep_top_half()))

    optimizer = optax.MultiSteps(optax.inject_hyperparams(build)(learning_rate=0.1), 2)
    p = params()
    state = optimizer.init(p)
    update = jax.jit(optimizer.update)
    first, second = grads(1, p), grads(2, p)
    updates, state = update(first, state, p)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, p))
    updates, state = update(second, state, p)
    new = optax.apply_updates(p, updates)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    for path in p:
        stepped = p[path] - 0.1 * mean[path]
        kept = jnp.abs(stepped) > jnp.median(jnp.abs(stepped))
        assert bool(((new[path] == 0) == ~kept).all())
        np.testing.assert_allclose(new[path], jnp.where(kept, stepped, 0), rtol=1e-5)
    assert float(state.inner_opt_state.hyperparams["learning_rate"]) == pytest.approx(0.1)


def test_it_sees_only_the_leaves_that_optax_masked_lets_through():
    optimizer = optax.masked(to_optax(keep_top_half()), {"a": True, "b": False})
    p = params()
    nothing = jax.tree.map(jnp.zeros_like, p)
    updates, _ = jax.jit(optimizer.update)(nothing, optimizer.init(p), p)
    new = optax.apply_updates(p, updates)
    assert int((new["a"] == 0).sum()) == 24
    chex.assert_trees_all_equal(new["b"], p["b"])


def test_it_projects_the_factors_that_split_gives_to_the_optimizer():
    draw = np.random.default_rng(3).standard_normal
    make = lambda shape: jnp.asarray(draw(shape), jnp.float32)  # noqa: E731
    tree = {"kernel": LowRank.over(make((6, 4)), make((6, 2)), make((2, 4))), "step": jnp.int32(1)}
    trainable, _ = split(tree, factors)
    optimizer = optax.chain(optax.adam(0.1), to_optax(keep_top_half()))
    updates, _ = optimizer.update(grads(1, trainable), optimizer.init(trainable), trainable)
    new = optax.apply_updates(trainable, updates)
    assert {path: int((x == 0).sum()) for path, x in new.items()} == {
        "kernel/down": 6,
        "kernel/up": 4,
    }


def test_every_update_gets_a_key_of_its_own():
    noise = stateless(
        lambda p, c: {
            k: jax.random.normal(c.require("key", "noise"), v.shape) for k, v in p.items()
        },
        name="noise",
    )
    optimizer = to_optax(noise, key=jax.random.key(0))
    p = {"a": jnp.zeros((3,))}
    state = optimizer.init(p)
    first, state = optimizer.update(p, state, p)
    second, _ = optimizer.update(p, state, p)
    assert (first["a"] != second["a"]).all()


def test_orbax_restores_its_state_bit_for_bit(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    counting = Transform(
        init=lambda p: {"calls": jnp.zeros([], jnp.int32)},
        update=lambda p, s, c: (p, {"calls": s["calls"] + 1}),
        name="counting",
    )
    optimizer = optax.chain(optax.adam(0.1), to_optax(every(2, counting)))
    p = params()
    state = optimizer.init(p)
    for i in range(3):
        _, state = optimizer.update(grads(i, p), state, p)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    chex.assert_trees_all_equal(restored, state)
    assert int(restored[1].inner.inner["calls"]) == 2


def test_calling_it_without_params_or_with_what_is_no_transform_is_refused():
    optimizer = to_optax(keep_top_half())
    p = params()
    with pytest.raises(ValueError, match=r"core.to_optax: params is missing"):
        optimizer.update(p, optimizer.init(p))
    with pytest.raises(TypeError, match=r"core.to_optax: .* not a transform"):
        to_optax(optax.sgd(0.1))


def test_a_transform_that_changes_shapes_is_refused():
    drop = stateless(lambda p, _: {k: v[1:] for k, v in p.items()}, name="drop")
    optimizer = to_optax(drop)
    p = params()
    with pytest.raises(ValueError, match=r"core.to_optax: 'a': drop turns an array \(8, 6\)"):
        optimizer.update(p, optimizer.init(p), p)
