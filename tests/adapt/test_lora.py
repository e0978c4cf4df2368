"""lora and rslora: what they add, what they refuse, and what peft computes."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import factors, lora, rslora
from jaxweights.core import apply, chain, combine, partition, split
from jaxweights.lift import lift
from jaxweights.weights import (
    CONV_HWIO,
    EMBEDDING,
    Axes,
    Masked,
    Quantized,
    materialize,
)
from tests.adapt._lora import adapters, mlp_apply, with_factors


def draw(seed: int, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def mlp():
    return {
        "fc1": {"kernel": draw(0, (24, 40)), "bias": draw(1, (40,))},
        "fc2": {"kernel": draw(2, (40, 16)), "bias": draw(3, (16,))},
    }


@functools.cache
def adapted_mlp():
    return apply(lora(rank=4), mlp())


@pytest.mark.parametrize(
    "init, deviation", [("he_uniform", np.sqrt(2 / 400)), ("gaussian", 1 / 64)]
)
def test_the_other_draws_have_the_deviation_of_their_definition(init, deviation):
    params = apply(lora(rank=64, init=init), {"w": {"kernel": jnp.ones((400, 64))}})
    np.testing.assert_allclose(params["w"]["kernel"].down.std(), deviation, rtol=0.02)


def test_a_table_of_embeddings_draws_normals_for_the_factor_of_its_width():
    tx = partition((".*embedding", lora(rank=32)))
    table = apply(tx, {"embedding": jnp.ones((100, 300))})["embedding"]
    # peft: lora_embedding_A (rank, vocab) zeros, lora_embedding_B (dim, rank) normal.
    assert (table.down.shape, table.up.shape) == ((300, 32), (32, 100))
    np.testing.assert_allclose(table.down.std(), 1.0, rtol=0.02)
    assert not table.up.any()


# --- what it adds -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lora, rslora])
def test_the_model_computes_the_same_function_at_the_start(make):
    params = mlp()
    adapted = apply(make(rank=4, alpha=3), params)
    assert set(adapters(adapted)) == {"fc1/kernel", "fc2/kernel"}
    chex.assert_trees_all_equal(materialize(adapted), params)


def test_at_the_start_only_up_has_a_gradient():
    trainable, frozen = split(adapted_mlp(), factors)
    x = draw(5, (7, 24))
    loss = lambda t: jnp.sum(lift(mlp_apply)(combine(t, frozen), x) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(trainable)
    assert set(grads) == {f"fc{i}/kernel/{name}" for i in (1, 2) for name in ("down", "up")}
    for path, grad in grads.items():
        assert bool(jnp.any(grad != 0)) == path.endswith("up"), path


@pytest.mark.parametrize("make, expected", [(lora, 6 / 4), (rslora, 6 / 2)], ids=["lora", "rslora"])
def test_the_scaling_is_alpha_over_rank_or_over_its_root(make, expected):
    weight = apply(make(rank=4, alpha=6), mlp())["fc1"]["kernel"]
    assert float(weight.scaling) == expected
    assert float(adapted_mlp()["fc1"]["kernel"].scaling) == 1.0


LEAVES = {
    "dense": ((12, 8), Axes(), (12, 3), (3, 8), ()),
    "stacked": ((2, 12, 8), Axes(), (2, 12, 3), (2, 3, 8), (2,)),
    "experts": ((2, 5, 12, 8), Axes(), (2, 5, 12, 3), (2, 5, 3, 8), (2, 5)),
    "query": ((12, 4, 2), Axes((-3,), (-2, -1)), (12, 3), (3, 8), ()),
    "output": ((4, 3, 8), Axes((-3, -2), (-1,)), (12, 3), (3, 8), ()),
    "conv": ((3, 2, 2, 8), CONV_HWIO, (12, 3), (3, 8), ()),
    "table": ((8, 12), EMBEDDING, (12, 3), (3, 8), ()),
}


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factors_have_the_shapes_of_the_matrix_in_every_layout(kind, dtype):
    shape, axes, down, up, stack = LEAVES[kind]
    weight = apply(
        partition((".*", lora(rank=3))), {"w": draw(0, shape, dtype)}, layout={"w": axes}
    )["w"]
    assert (weight.down.shape, weight.up.shape, weight.scaling.shape) == (down, up, stack)
    assert (weight.dtype, weight.down.dtype) == (dtype, jnp.float32)


def test_factors_may_take_the_dtype_of_the_weights():
    params = {"w": {"kernel": jnp.ones((8, 4), jnp.bfloat16)}}
    weight = apply(lora(rank=2, dtype="param"), params)["w"]["kernel"]
    assert (weight.down.dtype, weight.up.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_layers_of_a_stack_draw_different_factors():
    weight = apply(lora(rank=2), {"w": jnp.ones((2, 8, 4))}, layout={"w": Axes()})["w"]
    assert (weight.down[0] != weight.down[1]).all()


def test_it_needs_no_key_and_obeys_one_that_is_given():
    without = adapted_mlp()
    chex.assert_trees_all_equal(without, apply(lora(rank=4), mlp()))
    keyed = apply(lora(rank=4), mlp(), key=jax.random.key(7))
    assert (keyed["fc1"]["kernel"].down != without["fc1"]["kernel"].down).all()


def test_another_leaf_changes_the_draw_of_no_other():
    alone = apply(lora(rank=4), {"fc2": mlp()["fc2"]})
    chex.assert_trees_all_equal(alone["fc2"], adapted_mlp()["fc2"])


def test_tied_leaves_share_their_factors():
    table = draw(0, (12, 8))
    tied = apply(lora(rank=2), {"a": {"kernel": table}, "b": {"kernel": table}})
    assert tied["a"]["kernel"] is tied["b"]["kernel"]


def quantized(seed, shape):
    codes = np.random.default_rng(seed).integers(-8, 8, shape).astype(np.int8)
    return Quantized.from_codes(jnp.asarray(codes), jnp.full((1, shape[1]), 0.1), bits=4)


def test_masked_and_quantized_bases_are_kept_as_they_are():
    base = {
        "m": {"kernel": Masked(draw(0, (12, 8)), draw(1, (12, 8)) > 0)},
        "q": {"kernel": quantized(0, (12, 8))},
        "mq": {"kernel": Masked(quantized(1, (12, 8)), draw(2, (12, 8)) > 0)},
    }
    adapted = apply(lora(rank=2), base)
    for name in base:
        assert adapted[name]["kernel"].base is base[name]["kernel"]


def test_training_over_a_quantized_base_moves_the_factors_only():
    base = {"fc1": {"kernel": quantized(0, (24, 40)), "bias": draw(1, (40,))}}
    base["fc2"] = {"kernel": Masked(quantized(1, (40, 16)), draw(2, (40, 16)) > 0)}

    def model(p, x):
        h = jnp.tanh(x @ p["fc1"]["kernel"] + p["fc1"]["bias"][None])
        return h @ p["fc2"]["kernel"]

    params = apply(lora(rank=4, alpha=8), base)
    trainable, frozen = split(params, factors)
    x, target = draw(5, (32, 24)), draw(6, (32, 16))

    def loss(trainable):
        return jnp.mean(
            (lift(model, on_materialize="error")(combine(trainable, frozen), x) - target) ** 2
        )

    start = float(loss(trainable))
    step = jax.jit(lambda t: jax.tree.map(lambda p, g: p - 0.1 * g, t, jax.grad(loss)(t)))
    for _ in range(50):
        trainable = step(trainable)
    assert float(loss(trainable)) < 0.5 * start
    trained = combine(trainable, frozen)
    chex.assert_trees_all_equal(trained["fc1"]["kernel"].base, base["fc1"]["kernel"])
    chex.assert_trees_all_equal(trained["fc2"]["kernel"].base, base["fc2"]["kernel"])


def test_gradients_of_factors_in_scanned_layers_equal_those_of_a_loop():
    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]

    def looped(params, x):
        for w in params["layers"]:
            x = jnp.tanh(x @ w)
        return x

    params = apply(lora(rank=2), {"layers": 0.3 * draw(0, (3, 8, 8))}, layout={"layers": Axes()})
    trainable, frozen = split(params, factors)
    trainable["layers/up"] = draw(1, (3, 2, 8))
    x = draw(2, (5, 8))
    lazy = lambda t: jnp.sum(lift(scanned, on_materialize="error")(combine(t, frozen), x))  # noqa: E731
    dense = lambda t: jnp.sum(looped(materialize(combine(t, frozen)), x))  # noqa: E731
    chex.assert_trees_all_close(
        jax.jit(jax.grad(lazy))(trainable),
        jax.jit(jax.grad(dense))(trainable),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_tied_table_is_read_and_multiplied_with_one_pair_of_factors():
    def model(params, tokens):
        table = params["embedding"]
        return jnp.take(table, tokens, axis=0) @ table.T

    params = apply(partition(("embedding", lora(rank=2))), {"embedding": draw(0, (11, 6))})
    params = with_factors(params, {"embedding": (draw(1, (6, 2)), draw(2, (2, 11)))})
    tokens = jnp.array([[1, 10, 0]])
    lazy = jax.jit(lift(model, on_materialize="error"))(params, tokens)
    dense = model(materialize(params), tokens)
    np.testing.assert_allclose(lazy, dense, rtol=1e-4, atol=1e-4)


def test_factors_are_spread_over_devices_as_the_base_is(mesh):
    from jax.sharding import NamedSharding, PartitionSpec

    place = NamedSharding(mesh, PartitionSpec("data", "model"))
    params = {"kernel": jax.device_put(draw(0, (16, 32)), place)}
    sharded = apply(lora(rank=4), params)["kernel"]
    assert sharded.down.sharding.spec == PartitionSpec("data", None)
    assert sharded.up.sharding.spec == PartitionSpec(None, "model")
    whole = apply(lora(rank=4), {"kernel": draw(0, (16, 32))})["kernel"]
    chex.assert_trees_all_equal(jax.device_get(sharded.down), jax.device_get(whole.down))


def test_it_runs_under_jit_and_on_shapes_alone():
    tx = chain(lora(rank=4))
    abstract = jax.eval_shape(functools.partial(apply, tx), mlp())
    assert abstract["fc1"]["kernel"].down.shape == (24, 4)
    jitted = jax.jit(functools.partial(apply, tx))(mlp())
    chex.assert_trees_all_close(jitted, adapted_mlp(), rtol=1e-6)


# --- what it refuses ----------------------------------------------------------------------------


def test_a_rank_above_what_the_matrix_can_have_is_refused_leaf_by_leaf():
    with pytest.raises(ValueError) as error:
        apply(lora(rank=30), mlp())
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "'fc1/kernel': rank=30 exceeds min(in=24, out=40)=24" in lines[0]
    assert "clip_rank=True" in lines[0]


def test_a_clipped_rank_is_the_highest_that_the_matrix_can_have():
    adapted = apply(lora(rank=30, alpha=6, clip_rank=True), mlp())
    assert (adapted["fc1"]["kernel"].rank, adapted["fc2"]["kernel"].rank) == (24, 16)
    assert float(adapted["fc1"]["kernel"].scaling) == 6 / 24


def test_a_second_pair_of_factors_is_refused():
    with pytest.raises(ValueError, match=r"has low-rank factors of rank 4 already. Merge them"):
        apply(lora(rank=2), adapted_mlp())


def test_a_weight_with_nan_is_refused_by_name():
    params = mlp()
    params["fc2"]["kernel"] = params["fc2"]["kernel"].at[3, 5].set(jnp.nan)
    with pytest.raises(ValueError, match=r"'fc2/kernel': 1 of 640 values are not finite.*\[3, 5\]"):
        apply(lora(rank=2), params)


@pytest.mark.parametrize(
    "settings, error, words",
    [
        ({"rank": 0}, ValueError, "rank=0 must be at least 1"),
        ({"rank": 2.5}, TypeError, "rank=2.5 must be an integer"),
        ({"rank": 2, "alpha": 0.0}, ValueError, "alpha=0.0 must be positive"),
        ({"rank": 2, "alpha": float("nan")}, ValueError, "alpha=nan must be positive"),
        ({"rank": 2, "init": "xavier"}, ValueError, "init='xavier' is unknown.*he_uniform"),
        ({"rank": 2, "dtype": jnp.int8}, ValueError, "cannot hold trainable factors"),
    ],
)
@pytest.mark.parametrize("make", [lora, rslora])
def test_bad_settings_are_refused_when_the_transform_is_built(make, settings, error, words):
    with pytest.raises(error, match=rf"adapt.{make.__name__}: .*{words}"):
        make(**settings)
