"""Integer products of weights with scales for groups of inputs, against NumPy's integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import fake_quant, gptq, int8_dynamic, int8_static, round_to_nearest
from jaxweights.weights import EMBEDDING, Axes, Quantized, QuantizedProduct

dense_model = lambda params, x: x @ params["w"]  # noqa: E731
model = jax.jit(jw.lift(dense_model, on_materialize="error"))


def drawn(seed, in_dim=24, out_dim=5, tokens=7):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (tokens, in_dim)), jax.random.normal(
        keys[1], (in_dim, out_dim)
    )


def oracle(x, codes, scale, groups, step=None, largest=127):
    """Group by group, in NumPy's integers; `groups` names the row of `scale` of every input."""
    x = np.asarray(x, np.float32)
    if step is None:
        step = np.abs(x).max(axis=1, keepdims=True) / np.float32(largest)
    integers = np.clip(np.round(x / step), -largest, largest).astype(np.int64)
    y = np.zeros((len(x), codes.shape[1]))
    for group, row in enumerate(np.asarray(scale)):
        of = np.asarray(groups) == group
        y += (integers[:, of] @ np.asarray(codes, np.int64)[of]) * row
    return y * step


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("bits, group_size", [(8, 8), (4, 4), (4, 24), (3, 1)])
def test_every_group_is_a_product_of_integers(tokens, bits, group_size):
    x, weight = drawn(0, tokens=tokens)
    leaf = jw.apply(int8_dynamic(bits=bits, group_size=group_size), {"w": weight})["w"]
    same = jw.apply(round_to_nearest(bits=bits, group_size=group_size), {"w": weight})["w"]
    assert isinstance(leaf, QuantizedProduct) and leaf.scale.shape[-2] == 24 // group_size
    np.testing.assert_array_equal(leaf.materialize(), same.materialize())
    groups = np.arange(24) // group_size
    expected = oracle(x, same.codes_matrix(), same.scale, groups)
    np.testing.assert_allclose(model({"w": leaf}, x), expected, rtol=1e-5, atol=1e-5)
    again = leaf.weight_only()
    np.testing.assert_array_equal(again.codes, same.codes)
    np.testing.assert_array_equal(again.scale, same.scale)


def test_scales_of_groups_that_all_outputs_share():
    x, weight = drawn(1, in_dim=12, out_dim=4)
    codes = jax.random.randint(jax.random.key(2), (12, 4), -127, 128).astype(jnp.int8)
    scale = jnp.array([[0.5], [2.0], [0.125]])
    leaf = QuantizedProduct.of(Quantized.from_codes(codes, scale, bits=8))
    expected = oracle(x, codes, jnp.broadcast_to(scale, (3, 4)), np.arange(12) // 4)
    np.testing.assert_allclose(model({"w": leaf}, x), expected, rtol=1e-5, atol=1e-5)
    assert leaf.materialize().shape == weight.shape


def test_groups_in_another_order_are_those_of_gptq():
    x, weight = drawn(3, tokens=99)
    x = x * jax.random.permutation(jax.random.key(4), jnp.linspace(1, 9, 24))[None]
    tx = gptq(bits=4, group_size=8, act_order=True)
    stats = jw.calibrate(dense_model, {"w": weight}, [x], needs=tx.needs({"w": weight}))
    only = jw.apply(tx, {"w": weight}, stats=stats)["w"]
    assert only.group_index is not None
    assert not np.array_equal(only.group_index, np.arange(24) // 8)
    leaf = jw.apply(int8_dynamic(), {"w": only})["w"]
    np.testing.assert_array_equal(leaf.materialize(), only.materialize())
    expected = oracle(x, only.units(jnp.int32), only.scale, only.group_index)
    np.testing.assert_allclose(model({"w": leaf}, x), expected, rtol=1e-5, atol=1e-4)
    again = leaf.weight_only()
    np.testing.assert_array_equal(again.group_index, only.group_index)
    np.testing.assert_array_equal(again.materialize(), only.materialize())
    mask = jax.random.bernoulli(jax.random.key(5), 0.5, weight.shape)
    pruned = jw.apply(int8_dynamic(), {"w": jw.Masked(only, mask)})["w"]
    np.testing.assert_array_equal(pruned.materialize(), jnp.where(mask, only.materialize(), 0))


def test_static_steps_go_with_groups():
    x, weight = drawn(6)
    tx = int8_static(group_size=8)
    stats = jw.calibrate(dense_model, {"w": weight}, [x], needs=tx.needs({"w": weight}))
    leaf = jw.apply(tx, {"w": weight}, stats=stats)["w"]
    groups, step = np.arange(24) // 8, np.asarray(leaf.input_scale)
    codes = leaf.weight_only().codes_matrix()
    np.testing.assert_allclose(
        model({"w": leaf}, x), oracle(x, codes, leaf.scale, groups, step), rtol=1e-5, atol=1e-5
    )


def test_stacks_scans_experts_and_bfloat16():
    x, _ = drawn(7, tokens=4)
    weight = jax.random.normal(jax.random.key(8), (3, 24, 24))
    layout = {"w": Axes()}
    leaf = jw.apply(int8_dynamic(group_size=8), {"w": weight}, layout=layout)["w"]
    parts = [jax.tree.map(lambda field, i=i: field[i], leaf) for i in range(3)]
    scan = lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]  # noqa: E731
    y = x
    for part in parts:
        y = model({"w": part}, y)
    lifted = jax.jit(jw.lift(scan, on_materialize="error"))
    np.testing.assert_allclose(lifted({"w": leaf}, x), y, rtol=1e-5, atol=1e-4)
    experts = jax.jit(
        jw.lift(lambda w, x: jnp.einsum("eti,eio->eto", x, w), on_materialize="error")
    )
    each = jnp.stack([x, 2 * x, -x])
    y = experts(leaf, each)
    for i, part in enumerate(parts):
        np.testing.assert_allclose(y[i], model({"w": part}, each[i]), rtol=1e-6, atol=1e-6)
    low = jw.apply(int8_dynamic(group_size=8), {"w": weight[0].astype(jnp.bfloat16)})["w"]
    y = model({"w": low}, x.astype(jnp.bfloat16))
    codes, groups = low.weight_only().codes_matrix(), np.arange(24) // 8
    expected = oracle(x.astype(jnp.bfloat16).astype(jnp.float32), codes, low.scale, groups)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=1e-3)


def test_gradients_are_those_of_what_is_multiplied():
    x, weight = drawn(9)
    probe = jax.random.normal(jax.random.key(10), (7, 5))
    tx = int8_dynamic(bits=4, group_size=8)
    leaf = jw.apply(tx, {"w": weight})["w"]
    loss = lambda p, x: jnp.sum(jw.lift(dense_model)(p, x) * probe)  # noqa: E731
    d_leaf, d_x = jax.grad(loss, argnums=(0, 1), allow_int=True)({"w": leaf}, x)
    np.testing.assert_allclose(d_x, probe @ leaf.materialize().T, rtol=1e-5, atol=1e-5)
    step = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    rounded = np.round(x / step) * step
    codes = np.asarray(leaf.weight_only().codes_matrix(), np.float32)
    by_entry = (rounded.T @ probe) * codes
    expected = by_entry.reshape(3, 8, 5).sum(1)
    np.testing.assert_allclose(d_leaf["w"].scale, expected, rtol=1e-4, atol=1e-4)
    train = lambda p: jw.lift(dense_model)(fake_quant(p, tx), x)  # noqa: E731
    np.testing.assert_array_equal(train({"w": weight}), jw.lift(dense_model)({"w": leaf}, x))
    d_latent = jax.grad(lambda p: jnp.sum(train(p) * probe))({"w": weight})["w"]
    np.testing.assert_allclose(d_latent, rounded.T @ probe, rtol=1e-4, atol=1e-5)


def test_a_table_with_groups_is_looked_up():
    table = jax.random.normal(jax.random.key(0), (9, 16))
    tx = jw.partition(("embedding", int8_dynamic(group_size=4)))
    layout = {"embedding": EMBEDDING}
    leaf = jw.apply(tx, {"embedding": table}, layout=layout)["embedding"]
    assert leaf.scale.shape == (4, 9)
    ids = jnp.array([[3, 0], [8, 3]])
    looked_up = jax.jit(jw.lift(lambda t, i: t[i], on_materialize="error"))(leaf, ids)
    np.testing.assert_array_equal(looked_up, leaf.materialize()[ids])


def test_outputs_may_be_split_over_devices(mesh):
    x, weight = drawn(11, out_dim=8)
    leaf = jw.apply(int8_dynamic(group_size=8), {"w": weight})["w"]
    spec = leaf.partition(jax.sharding.PartitionSpec(None, "model"), mesh)
    assert spec.scale == jax.sharding.PartitionSpec(None, "model")
    shards = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), spec)
    np.testing.assert_array_equal(
        model({"w": jax.device_put(leaf, shards)}, x), model({"w": leaf}, x)
    )
    parts = jax.sharding.PartitionSpec(None, "model")
    specs = {"in_specs": (parts, jax.sharding.PartitionSpec()), "out_specs": parts}
    split = jw.lift(jax.shard_map(lambda w, x: x @ w, mesh=mesh, **specs), on_materialize="error")
    np.testing.assert_allclose(split(leaf, x), model({"w": leaf}, x), rtol=1e-6, atol=1e-6)


def test_only_a_group_has_to_fit_into_32_bits():
    abstract = {"w": jax.ShapeDtypeStruct((132104 * 2, 1), jnp.float32)}
    run = lambda **options: jax.eval_shape(lambda p: jw.apply(int8_dynamic(**options), p), abstract)  # noqa: E731
    with pytest.raises(ValueError, match="may not fit into 32 bits"):
        run()
    assert run(group_size=132104)["w"].scale.shape == (2, 1)


def test_refusals_name_the_path_and_the_remedy():
    params = {"w": jnp.ones((16, 4))}
    with pytest.raises(ValueError, match=r"int8_dynamic: 'w': group_size=5 does not divide"):
        jw.apply(int8_dynamic(group_size=5), params)
    grouped = jw.apply(round_to_nearest(bits=8, group_size=8), params)
    words = r"'w': is a Quantized with group_size=8, whose integers are kept, but group_size=4 is"
    with pytest.raises(ValueError, match=words):
        jw.apply(int8_dynamic(group_size=4), grouped)
    index = jnp.array([0, 0, 0, 1], jnp.int32)
    uneven = Quantized.from_codes(jnp.ones((4, 1), jnp.int8), jnp.ones((2, 1)), None, index, bits=8)
    words = r"'w': the weight has groups of 1 to 3 inputs, but sums of integers .* divides the 4 in"
    with pytest.raises(ValueError, match=words):
        jw.apply(int8_dynamic(), {"w": uneven})
    with pytest.raises(ValueError, match=r"an order that is traced.*Call this outside `jit`"):
        jax.jit(QuantizedProduct.of)(uneven)
