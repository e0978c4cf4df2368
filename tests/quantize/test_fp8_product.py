"""Products of 8-bit floats against NumPy's, and what becomes of them elsewhere in the tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import fake_quant, fp8, fp8_dynamic, fp8_static, round_to_nearest
from jaxweights.weights import NarrowFloat, Quantized, RoundedInputs
from jaxweights.weights._rounded_inputs import round_to_e4m3
from tests.contract._trees import LAYOUT, make_params
from tests.quantize.training.test_straight_through import forward

dense_model = lambda params, x: x @ params["w"]  # noqa: E731
model = jax.jit(jw.lift(dense_model, on_materialize="error"))
E4M3 = ml_dtypes.float8_e4m3fn


def draw(number, *shape):
    return jax.random.normal(jax.random.key(number), shape)


def rounded(x, size=None, step=None):
    """Activations as the product sees them, in NumPy's own 8-bit floats."""
    x = np.asarray(x, np.float32)
    size = size or x.shape[-1]
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    if step is None:
        step = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(448)
        step = np.where(step == 0, np.float32(1), step)
    units = np.clip(groups / step, -448, 448).astype(E4M3).astype(np.float32)
    return (units * step).reshape(x.shape)


def test_numbers_are_the_nearest_8_bit_floats_halves_to_even():
    levels = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    middle = (levels[1:] + levels[:-1]) / 2
    near = [levels, middle, np.nextafter(middle, 0), np.nextafter(middle, np.float32(1e9))]
    x = np.concatenate([*near, [449, 464, 465, 1e30], np.asarray(draw(0, 500))]).astype(np.float32)
    x = np.concatenate([x, -x])
    ours, _ = jax.jit(round_to_e4m3)(x, jnp.ones(()))
    np.testing.assert_array_equal(ours, np.clip(x, -448, 448).astype(E4M3).astype(np.float32))
    half, _ = round_to_e4m3(jnp.asarray(levels, jnp.bfloat16), jnp.ones(()))
    np.testing.assert_array_equal(np.asarray(half, np.float32), levels)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("size, block", [(None, None), (8, (16, 4)), (16, None)])
def test_the_product_is_that_of_both_8_bit_floats(tokens, size, block):
    x, weight = draw(0, tokens, 32), draw(1, 32, 8)
    leaf = jw.apply(fp8_dynamic(group_size=block, input_group_size=size), {"w": weight})["w"]
    same = jw.apply(fp8(group_size=block), {"w": weight})["w"]
    assert isinstance(leaf.base, NarrowFloat)
    np.testing.assert_array_equal(leaf.materialize(), same.materialize())
    x = x.at[1:2].multiply(1e4)  # a loud token leaves the others alone
    y = model({"w": leaf}, x)
    exact = rounded(x, size).astype(np.float64) @ np.asarray(same.materialize(), np.float64)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5 * np.abs(x).max(initial=0))
    if tokens:
        assert np.abs(y - x @ same.materialize()).max() > 1e-3  # inputs are rounded indeed


def test_a_token_of_zeros_is_zero_and_harms_no_other():
    x = draw(0, 5, 16).at[2].set(0)
    params = jw.apply(fp8_dynamic(), {"w": draw(1, 16, 4)})
    y = model(params, x)
    assert np.all(y[2] == 0)
    np.testing.assert_allclose(y[0], model(params, x[:2])[0], rtol=1e-6)
    grads = jax.grad(lambda x: jw.lift(dense_model)(params, x).sum())(x)
    assert np.all(np.isfinite(grads))


@pytest.mark.parametrize("size", [None, 8])
def test_gradients_pass_straight_through(size):
    x, probe = draw(0, 6, 16), draw(2, 6, 4)
    params = jw.apply(fp8_dynamic(input_group_size=size), {"w": draw(1, 16, 4)})
    loss = lambda p, x: jnp.sum(jw.lift(dense_model)(p, x) * probe)  # noqa: E731
    d_x = jax.grad(loss, argnums=1)(params, x)
    np.testing.assert_allclose(d_x, probe @ params["w"].materialize().T, rtol=1e-5, atol=1e-5)
    d_scale = jax.grad(loss)(params, x)["w"].base.scale[0]
    y = jw.lift(dense_model)(params, x)
    np.testing.assert_allclose(
        d_scale, jnp.sum(y * probe, 0) / params["w"].base.scale[0], rtol=1e-4
    )


def test_training_rounds_inputs_as_what_is_stored_does():
    x, weight, probe = draw(0, 6, 16), draw(1, 16, 4), draw(2, 6, 4)
    tx = fp8_dynamic()
    train = jax.jit(lambda p: jw.lift(dense_model)(fake_quant(p, tx), x))
    stored = model(jw.apply(tx, {"w": weight}), x)
    np.testing.assert_allclose(train({"w": weight}), stored, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(train(p) * probe))({"w": weight})["w"]
    assert np.abs(rounded(x) - x).max() > 1e-3
    np.testing.assert_allclose(grads, rounded(x).T @ probe, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_stacks_scans_and_experts_round_their_inputs(dtype):
    params = make_params(dtype)
    quantized = jw.apply(fp8_dynamic(), params, layout=LAYOUT)
    assert isinstance(quantized["attention"]["kernel"], RoundedInputs)
    assert quantized["attention"]["kernel"].shape == params["attention"]["kernel"].shape
    x = draw(3, 5, 32).astype(dtype)
    run = jax.jit(jw.lift(forward, on_materialize="error"))
    y, exact = (np.asarray(a, np.float32) for a in (run(quantized, x), forward(params, x)))
    floats = forward(jw.materialize(quantized), x)
    assert 1e-3 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.1
    assert np.linalg.norm(y - np.asarray(floats, np.float32)) > 0.2 * np.linalg.norm(y - exact)
    one = {"w": jax.tree.map(lambda f: f[1], quantized["stack"]["kernel"])}
    experts = jw.lift(lambda w, x: jnp.einsum("eti,eio->eto", x, w), on_materialize="error")
    y = jax.jit(experts)(quantized["stack"]["kernel"], jnp.stack([x, 2 * x, x]))
    assert y.dtype == dtype
    alone = model(one, 2 * x)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (y[1], alone)), rtol=2**-7)


def test_sorted_experts_round_the_tokens_of_each():
    weight, x = draw(0, 3, 16, 4), draw(1, 7, 16)
    sizes = jnp.array([2, 0, 5])
    tx, layout = fp8_dynamic(), {"w": jw.Axes()}
    leaf = jw.apply(tx, {"w": weight}, layout=layout)["w"]
    run = jw.lift(jax.lax.ragged_dot, on_materialize="error")
    dense = leaf.materialize()
    expected = jax.lax.ragged_dot(jnp.asarray(rounded(x)), dense, sizes)
    fixed = RoundedInputs.of(leaf.weight_only(), jnp.array([0.01, 1.0, 0.02]).reshape(3, 1, 1))
    np.testing.assert_allclose(run(x, leaf, sizes), expected, rtol=1e-5, atol=1e-5)
    steps = np.repeat([0.01, 1.0, 0.02], np.asarray(sizes))[:, None, None].astype(np.float32)
    expected = jax.lax.ragged_dot(jnp.asarray(rounded(x, step=steps)), dense, sizes)
    np.testing.assert_allclose(run(x, fixed, sizes), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_convolution_rounds_each_example(fixed):
    kernel, x = (
        draw(0, 3, 3, 4, 8),
        draw(1, 2, 6, 6, 4) * jnp.array([1.0, 50.0])[:, None, None, None],
    )
    conv = lambda k, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    layout = {"k": jw.weights.CONV_HWIO}
    leaf = jw.apply(fp8_dynamic(), {"k": kernel}, layout=layout)["k"]
    step = None
    if fixed:
        step = np.float32(0.3)
        leaf = RoundedInputs.of(leaf.weight_only(), jnp.full((1, 1), step))
    expected = conv(leaf.materialize(), rounded(x.reshape(2, -1), step=step).reshape(x.shape))
    found = jax.jit(jw.lift(conv, on_materialize="error"))(leaf, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
    assert np.abs(found - conv(leaf.materialize(), x)).max() > 0.01


def test_fixed_scales_come_from_the_extremes_and_clip_what_exceeds_them():
    weight, tx = draw(0, 16, 4), fp8_static()
    seen = draw(1, 50, 16).at[3, 5].set(-6.0)
    stats = jw.calibrate(dense_model, {"w": weight}, [seen], needs=tx.needs({"w": weight}))
    params = jw.apply(tx, {"w": weight}, stats=stats)
    np.testing.assert_allclose(params["w"].input_scale, 6 / 448, rtol=1e-6)
    x = draw(2, 5, 16).at[0, 0].set(60.0)
    step = np.asarray(params["w"].input_scale)
    expected = rounded(x, step=step) @ params["w"].materialize()
    np.testing.assert_allclose(model(params, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        model(params, x)[0], model(params, x.at[0, 0].set(6.0))[0], rtol=1e-6
    )


def test_fixed_scales_belong_to_the_matrices_of_a_stack_that_may_share_activations():
    weight, tx, layout = draw(0, 3, 8, 4), fp8_static(), {"w": jw.Axes()}
    model = lambda p, x: jnp.einsum("ti,eio->eto", x, p["w"])  # noqa: E731
    x = draw(1, 5, 8)
    needs = tx.needs({"w": weight})
    stats = jw.calibrate(model, {"w": weight}, [x], needs=needs, layout=layout)
    leaf = jw.apply(tx, {"w": weight}, stats=stats, layout=layout)["w"]
    assert leaf.input_scale.shape == (3, 1, 1)
    leaf = RoundedInputs.of(leaf.weight_only(), leaf.input_scale.at[1].multiply(0.5))
    y = jax.jit(jw.lift(model, on_materialize="error"))({"w": leaf}, x)
    for i in range(3):
        inputs = rounded(x, step=np.asarray(leaf.input_scale[i]))
        np.testing.assert_allclose(y[i], inputs @ leaf.materialize()[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits, grid", [(4, "signed_max"), (4, "affine"), (8, "narrow")])
def test_integers_keep_their_codes_and_meet_8_bit_floats(bits, grid):
    weight, x = draw(0, 32, 8), draw(1, 5, 32)
    first = round_to_nearest(bits=bits, group_size=16, grid=grid)
    leaf = jw.apply(jw.chain(first, fp8_dynamic()), {"w": weight})["w"]
    only = jw.apply(first, {"w": weight})["w"]
    assert isinstance(leaf.base, Quantized)
    np.testing.assert_array_equal(leaf.weight_only().codes, only.codes)
    expected = rounded(x) @ only.materialize()
    np.testing.assert_allclose(model({"w": leaf}, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["nf4", "nvfp4", "fp8"])
def test_other_numbers_meet_8_bit_floats_too(method):
    weight, x = draw(0, 64, 8), draw(1, 5, 64)
    only = jw.apply(getattr(jw.quantize, method)(), {"w": weight})
    leaf = jw.apply(fp8_dynamic(), only)["w"]
    assert type(leaf.base) is type(only["w"])
    expected = rounded(x) @ only["w"].materialize()
    np.testing.assert_allclose(model({"w": leaf}, x), expected, rtol=1e-5, atol=1e-5)


def test_pruned_weights_keep_their_zeros():
    pruner = jw.sparsify.magnitude(sparsity=0.5)
    before = jw.apply(jw.chain(pruner, round_to_nearest(bits=4)), {"w": draw(0, 16, 4)})
    after = jw.apply(fp8_dynamic(), before)["w"]
    np.testing.assert_array_equal(after.materialize(), jw.materialize(before)["w"])
    floats = jw.apply(jw.chain(pruner, fp8_dynamic()), {"w": draw(0, 16, 4)})["w"]
    assert np.mean(np.asarray(floats.materialize()) == 0) == 0.5
    x = draw(1, 3, 16)
    expected = rounded(x) @ after.materialize()
    np.testing.assert_allclose(
        jw.lift(dense_model)({"w": after}, x), expected, rtol=1e-5, atol=1e-5
    )


def test_a_table_is_looked_up_unrounded_and_its_logits_round_theirs():
    table, ids = draw(0, 9, 16), jnp.array([[3, 0], [8, 3]])
    leaf = jw.apply(jw.partition(("embedding", fp8_dynamic())), {"embedding": table})["embedding"]
    looked_up = jax.jit(jw.lift(lambda t, i: t[i], on_materialize="error"))(leaf, ids)
    np.testing.assert_array_equal(looked_up, leaf.materialize()[ids])
    x = draw(1, 2, 16)
    logits = jax.jit(jw.lift(lambda t, x: x @ t.T, on_materialize="error"))(leaf, x)
    np.testing.assert_allclose(logits, rounded(x) @ leaf.materialize().T, rtol=1e-5, atol=1e-5)
    back = jax.jit(jw.lift(lambda t, y: y @ t, on_materialize="error"))(leaf, logits)
    np.testing.assert_allclose(back, logits @ leaf.materialize(), rtol=1e-4, atol=1e-4)


def test_outputs_may_be_split_over_devices_and_inputs_are_not(mesh):
    x = draw(1, 5, 16)
    leaf = jw.apply(fp8_dynamic(), {"w": draw(0, 16, 8)})["w"]
    spec = leaf.partition(jax.sharding.PartitionSpec(None, "model"), mesh)
    assert spec.base.values == jax.sharding.PartitionSpec(None, "model")
    assert leaf.partition(jax.sharding.PartitionSpec("model", None), mesh) is None
    fixed = RoundedInputs.of(leaf.weight_only(), jnp.ones((1, 1)))
    assert fixed.partition(jax.sharding.PartitionSpec("model", None), mesh) is not None
    shards = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), spec)
    placed = jax.device_put(leaf, shards)
    np.testing.assert_allclose(model({"w": placed}, x), model({"w": leaf}, x), rtol=1e-6)


def test_refusals_name_the_path_and_the_remedy():
    params = {"w": jnp.ones((16, 4))}
    with pytest.raises(ValueError, match=r"fp8_dynamic: 'w': is already a RoundedInputs"):
        jw.apply(fp8_dynamic(), jw.apply(fp8_dynamic(), params))
    with pytest.raises(ValueError, match=r"'w': is already a QuantizedProduct"):
        jw.apply(fp8_dynamic(), jw.apply(jw.quantize.int8_dynamic(), params))
    words = r"'w': groups of 5 inputs of a token do not divide .* 16. Choose one of 1, 2, 4, 8, 16,"
    with pytest.raises(ValueError, match=words):
        jw.apply(fp8_dynamic(input_group_size=5), params)
    with pytest.raises(
        ValueError, match=r"'w': is a Quantized with group_size=None, .* group_size=8 is"
    ):
        jw.apply(fp8_dynamic(group_size=8), jw.apply(round_to_nearest(bits=4), params))
    with pytest.raises(
        ValueError, match=r"'w': group_size=\(5, 4\) does not divide the input axis"
    ):
        jw.apply(fp8_dynamic(group_size=(5, 4)), params)
    with pytest.raises(ValueError, match=r"fp8_dynamic: input_group_size=0 must be a positive"):
        fp8_dynamic(input_group_size=0)
    with pytest.raises(ValueError, match=r"'w': 1 of 4 blocks hold values that are not finite"):
        jw.apply(fp8_dynamic(), {"w": params["w"].at[0, 0].set(jnp.inf)})
    with pytest.raises(ValueError, match="'w': is float8_e4m3fn, codes of a quantized weight"):
        jw.apply(fp8_dynamic(), {"w": params["w"].astype(jnp.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"RoundedInputs: group_size=8, but input_scale is that"):
        RoundedInputs.of(params["w"], jnp.ones((1, 1)), group_size=8)
    never = {"min": jnp.full(16, jnp.inf), "max": jnp.full(16, -jnp.inf)}
    stats = jw.Stats({"w": never | {"count": jnp.int32(0)}})
    with pytest.raises(ValueError, match=r"fp8_static: 'w': the largest magnitude of its inputs"):
        jw.apply(fp8_static(), params, stats=stats)
