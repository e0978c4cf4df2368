"""split and combine: an exact inverse, on any tree, under every transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import factors
from jaxweights.core import combine, split
from jaxweights.lift import lift
from jaxweights.weights import LowRank, Masked, Quantized, is_weight


def draw(seed: int, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Module:
    """A module as Equinox writes them: arrays, numbers and functions are all leaves."""

    weight: Any
    bias: Any
    activation: Callable
    steps: int = 3
    name: str = dataclasses.field(default="dense", metadata={"static": True})


def low_rank(shape=(6, 4), base=None):
    base = draw(0, shape) if base is None else base
    return LowRank.over(base, draw(1, (shape[0], 2)), draw(2, (2, shape[1])))


def quantized(shape=(6, 4)):
    codes = np.random.default_rng(3).integers(-8, 8, shape).astype(np.int8)
    return Quantized.from_codes(jnp.asarray(codes), jnp.full((1, shape[1]), 0.1), bits=4)


def mixed_tree():
    return {
        "body": {
            "kernel": low_rank(base=Masked(quantized(), draw(4, (6, 4)) > 0)),
            "bias": draw(5, (4,)),
        },
        "head": [Module(low_rank((4, 3)), draw(6, (3,)), jax.nn.relu), None],
        "step": jnp.int32(7),
        "seen": np.arange(3),
    }


def assert_same(first, second):
    """Same structure, the same objects at non-array leaves, the same bits at arrays."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if isinstance(a, jax.Array | np.ndarray):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
        else:
            assert a is b


FACTORS = {
    "body/kernel/down",
    "body/kernel/up",
    "head/0/weight/down",
    "head/0/weight/up",
}


@pytest.mark.parametrize(
    "select, paths",
    [
        (factors, FACTORS),
        ("head/0/weight", {f"head/0/weight/{name}" for name in ("base", "down", "up", "scaling")}),
        (".*bias", {"body/bias", "head/0/bias"}),
        (".*/(down|up)", FACTORS),
        (
            lambda path, leaf: not is_weight(leaf) and path.endswith("bias"),
            {"body/bias", "head/0/bias"},
        ),
        (
            lambda path, leaf: ["base/base/scale"] if path == "body/kernel" else False,
            {"body/kernel/base/base/scale"},
        ),
    ],
)
def test_what_is_selected_is_split_off_and_combining_gives_the_tree_back(select, paths):
    tree = mixed_tree()
    trainable, frozen = split(tree, select)
    assert set(trainable) == paths
    assert all(isinstance(leaf, jax.Array) for leaf in trainable.values())
    assert_same(combine(trainable, frozen), tree)


def test_selecting_everything_leaves_integers_masks_and_functions_frozen():
    tree = mixed_tree()
    trainable, frozen = split(tree, ".*")
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in trainable.values())
    assert {"step", "seen", "body/kernel/base/mask", "body/kernel/base/base/codes"} <= set(
        frozen.arrays
    )
    assert_same(combine(trainable, frozen), tree)


def test_a_tree_that_is_one_weight_can_be_split():
    trainable, frozen = split(low_rank(), factors)
    assert set(trainable) == {"down", "up"}
    assert_same(combine(trainable, frozen), low_rank())


def test_the_frozen_part_is_an_argument_of_jit_whose_leaves_are_arrays():
    tree = mixed_tree()
    trainable, frozen = split(tree, factors)
    assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(frozen))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def double(trainable, frozen):
        whole = combine(trainable, frozen)
        assert whole["head"][0].activation is jax.nn.relu
        return jax.tree.map(lambda x: 2 * x, trainable), whole["body"]["bias"].sum()

    doubled, _ = double(trainable, frozen)
    double(doubled, split(tree, factors)[1])
    np.testing.assert_allclose(doubled["body/kernel/up"], 2 * tree["body"]["kernel"].up)


def test_gradients_flow_through_a_tree_with_integer_leaves():
    tree = mixed_tree()
    trainable, frozen = split(tree, factors)

    def loss(trainable, frozen, x):
        whole = combine(trainable, frozen)
        h = lift(lambda kernel, x: x @ kernel)(whole["body"]["kernel"], x)
        return jnp.sum(whole["head"][0].activation(h))

    grads = jax.jit(jax.grad(loss))(trainable, frozen, draw(9, (5, 6)))
    assert set(grads) == FACTORS
    assert grads["body/kernel/up"].any()
    assert not grads["head/0/weight/up"].any()


def test_buffers_of_the_trainable_part_can_be_donated():
    table = draw(0, (6, 4))
    trainable, frozen = split({"in": table, "out": table, "bias": draw(1, (4,))}, "in|out")
    step = jax.jit(lambda t, f: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    new = combine(step(trainable, frozen), frozen)
    np.testing.assert_allclose(new["in"], np.asarray(draw(0, (6, 4))) + 1)
    assert new["in"] is new["out"]


def test_a_tied_matrix_is_trained_once_and_its_gradient_is_the_sum_over_its_uses():
    table = draw(0, (6, 6))
    trainable, frozen = split({"read": table, "head": table}, ".*")
    assert list(trainable) == ["head"]  # dicts list their keys in order
    x = draw(1, (3, 6))
    loss = lambda p: jnp.sum(jnp.sin(x @ p["read"]) @ p["head"])  # noqa: E731
    grad = jax.grad(lambda t: loss(combine(t, frozen)))(trainable)["head"]
    expected = jax.grad(lambda w: loss({"read": w, "head": w}))(table)
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def test_vectors_that_happen_to_be_one_array_are_trained_apart():
    zeros = jnp.zeros(4)
    assert set(split({"a": zeros, "b": zeros}, ".*")[0]) == {"a", "b"}


def test_selecting_one_of_two_tied_matrices_is_refused():
    table = draw(0, (6, 4))
    with pytest.raises(ValueError, match=r"'read': is the same array as 'head', but only one"):
        split({"read": table, "head": table}, "read")


def test_a_population_of_factors_is_trained_over_one_base():
    trainable, frozen = split({"kernel": low_rank()}, factors)
    population = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 0 * x]), trainable)
    x = draw(9, (5, 6))
    fn = lambda t: lift(lambda p, x: x @ p["kernel"])(combine(t, frozen), x)  # noqa: E731
    together = jax.vmap(fn)(population)
    for i in range(3):
        alone = fn(jax.tree.map(lambda x: x[i], population))  # noqa: B023
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.promotion(dtypes="standard", ranks="allow")
def test_linen_and_nnx_trees_train_with_optax_and_come_back():
    import flax.linen as nn
    import optax
    from flax import nnx

    x = draw(0, (8, 6))
    model = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)])
    variables = model.init(jax.random.key(0), x)
    cases = [(variables, model.apply)]
    graph, state = nnx.split(nnx.Linear(6, 2, rngs=nnx.Rngs(0)))
    cases.append((state, lambda state, x: nnx.merge(graph, state)(x)))
    for tree, fn in cases:
        trainable, frozen = split(tree, ".*kernel.*")
        assert_same(combine(trainable, frozen), tree)
        assert all("kernel" in path for path in trainable)
        optimizer = optax.adam(1e-2)

        @jax.jit
        def step(trainable, opt_state, frozen, fn=fn, optimizer=optimizer):
            loss = lambda t: jnp.mean(fn(combine(t, frozen), x) ** 2)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(trainable)
            updates, opt_state = optimizer.update(grads, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state, value

        opt_state = optimizer.init(trainable)
        values = []
        for _ in range(20):
            trainable, opt_state, value = step(trainable, opt_state, frozen)
            values.append(float(value))
        assert values[-1] < values[0]
        assert jax.tree.structure(combine(trainable, frozen)) == jax.tree.structure(tree)


def test_orbax_saves_the_trainable_part_without_a_target(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    trainable, frozen = split(mixed_tree(), factors)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "factors", trainable)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "factors")
    assert_same(combine(restored, frozen), mixed_tree())


def test_it_splits_shapes_without_data():
    abstract = jax.eval_shape(lambda: {"kernel": low_rank(), "step": jnp.int32(0)})
    trainable, frozen = split(abstract, factors)
    assert trainable["kernel/down"].shape == (6, 2)
    out = jax.eval_shape(combine, trainable, frozen)
    assert out["kernel"].shape == (6, 4)


@pytest.mark.parametrize(
    "select, error, words",
    [
        ("boddy/.*", ValueError, r"pattern 'boddy/\.\*' matches no leaf.*'body/bias'"),
        ("(", ValueError, "is not a regular expression"),
        (3, TypeError, "select=3 is a int"),
        ("step", ValueError, "'step': is int32.*Only floats can be trained"),
        (lambda path, leaf: False, ValueError, "selects nothing of .*adapt.factors"),
        (
            lambda path, leaf: ["dwon"] if path == "body/kernel" else False,
            ValueError,
            "'body/kernel': has no floating field 'dwon'.*'body/kernel/down'",
        ),
    ],
)
def test_a_filter_that_selects_nothing_is_refused(select, error, words):
    with pytest.raises(error, match=rf"core.split: .*{words}"):
        split(mixed_tree(), select)


def test_combining_what_does_not_belong_together_is_refused():
    trainable, frozen = split(mixed_tree(), factors)
    lacking = {path: x for path, x in trainable.items() if path != "body/kernel/up"}
    with pytest.raises(ValueError, match=r"core.combine: 'body/kernel/up': is missing"):
        combine(lacking, frozen)
    with pytest.raises(ValueError, match=r"core.combine: 'body/bias': was not split off"):
        combine(trainable | {"body/bias": jnp.ones(4)}, frozen)


def test_two_arrays_of_one_path_are_refused():
    with pytest.raises(ValueError, match=r"core.(flatten|split): 'a/b': two"):
        split({"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}, ".*")
