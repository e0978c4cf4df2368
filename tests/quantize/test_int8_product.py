"""Integer products against NumPy's, torchao's and the float product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.quantize import fake_quant, int8_dynamic, int8_static, round_to_nearest
from jaxweights.weights import Quantized, QuantizedProduct
from tests._fixtures import fixture
from tests.contract._trees import LAYOUT, make_params
from tests.quantize.training.test_straight_through import forward

dense_model = lambda params, x: x @ params["w"]  # noqa: E731
model = jax.jit(jw.lift(dense_model, on_materialize="error"))


def oracle(x, codes, scale, bits=8, step=None):
    """`x @ (codes * scale)` for `(in, out)` integers, in NumPy's integers."""
    largest = 2 ** (bits - 1) - 1
    x = np.asarray(x, np.float32)
    if step is None:
        step = np.abs(x).max(axis=1, keepdims=True) / np.float32(largest)
        step = np.where(step == 0, np.float32(1), step)
    integers = np.clip(np.round(x / step), -largest, largest).astype(np.int64)
    return (integers @ np.asarray(codes, np.int64)).astype(np.float32) * (step * scale)


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("bits, input_bits", [(8, 8), (4, 8), (8, 4)])
def test_the_product_is_that_of_the_integers(tokens, bits, input_bits):
    keys = jax.random.split(jax.random.key(tokens))
    x, weight = jax.random.normal(keys[0], (tokens, 33)), jax.random.normal(keys[1], (33, 7))
    leaf = jw.apply(int8_dynamic(bits=bits, input_bits=input_bits), {"w": weight})["w"]
    same = jw.apply(round_to_nearest(bits=bits), {"w": weight})["w"]
    np.testing.assert_array_equal(leaf.weight_only().codes, same.codes)
    assert leaf.codes.dtype == jnp.int8
    assert leaf.codes.shape == (7, 33)
    expected = oracle(x, same.codes_matrix(), same.scale, input_bits)
    np.testing.assert_allclose(model({"w": leaf}, x), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(leaf.materialize(), same.materialize())


def test_weights_are_torchao_s_and_errors_no_larger():
    """Its activations have another grid, of -128 to 127 over 127.5 steps."""
    arrays = fixture("quantize/torchao.npz")
    weight, x = jnp.asarray(arrays["W"].T), jnp.asarray(arrays["X"])
    leaf = jw.apply(int8_dynamic(grid="half"), {"w": weight})["w"]
    assert np.mean(leaf.codes == arrays["int8_dynamic/qdata"]) > 0.999
    np.testing.assert_allclose(leaf.scale[0], arrays["int8_dynamic/scale"].ravel(), rtol=1e-6)
    exact = x @ leaf.materialize()
    ours = np.linalg.norm(model({"w": leaf}, x) - exact)
    theirs = np.linalg.norm(arrays["int8_dynamic/Y"] - exact)
    assert 0 < ours < 1.05 * theirs < 0.02 * np.linalg.norm(exact)


def test_a_token_of_zeros_is_zero_and_harms_no_other():
    weight, x = jax.random.normal(jax.random.key(0), (16, 4)), jnp.ones((5, 16)).at[2].set(0)
    params = jw.apply(int8_dynamic(), {"w": weight})
    y = model(params, x)
    assert np.all(y[2] == 0)
    np.testing.assert_array_equal(y[0], model(params, x[:2])[0])
    grads = jax.grad(lambda x: jw.lift(dense_model)(params, x).sum())(x)
    assert np.all(np.isfinite(grads))


def test_gradients_pass_straight_through_to_activations_and_none_reach_integers():
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (6, 16)), jax.random.normal(keys[1], (16, 4))
    probe = jax.random.normal(keys[2], (6, 4))
    params = jw.apply(int8_dynamic(), {"w": weight})
    loss = lambda p, x: jnp.sum(jw.lift(dense_model)(p, x) * probe)  # noqa: E731
    d_x = jax.grad(loss, argnums=1)(params, x)
    np.testing.assert_allclose(d_x, probe @ params["w"].materialize().T, rtol=1e-5, atol=1e-6)
    d_params = jax.grad(loss, allow_int=True)(params, x)["w"]
    assert d_params.codes.dtype == jax.dtypes.float0
    # The scale of an output multiplies it, so its gradient is what that says.
    y = jw.lift(dense_model)(params, x)
    expected = jnp.sum(y * probe, axis=0) / params["w"].scale[0]
    np.testing.assert_allclose(d_params.scale[0], expected, rtol=1e-4)


@pytest.mark.parametrize("chained", [False, True])
def test_training_with_rounded_activations_is_what_is_stored_to_the_bit(chained):
    """The forward pass is the integer product; BitNet b1.58 with ternary weights."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (6, 16)), jax.random.normal(keys[1], (16, 4))
    probe = jax.random.normal(keys[2], (6, 4))
    tx = jw.chain(jw.quantize.ternary(), int8_dynamic()) if chained else int8_dynamic(bits=4)
    train = jax.jit(lambda p: jw.lift(dense_model)(fake_quant(p, tx), x))
    stored = jw.apply(tx, {"w": weight})
    np.testing.assert_array_equal(train({"w": weight}), model(stored, x))
    grads = jax.grad(lambda p: jnp.sum(train(p) * probe))({"w": weight})["w"]
    largest = np.abs(x).max(axis=1, keepdims=True)
    rounded = np.round(np.asarray(x) / largest * 127) * largest / 127
    assert np.abs(rounded - x).max() > 1e-4
    np.testing.assert_allclose(grads, rounded.T @ probe, rtol=1e-4, atol=1e-5)
    if chained:
        assert np.unique(np.asarray(stored["w"].codes)).tolist() == [-1, 0, 1]


def test_heads_stacks_and_scans_multiply_integers():
    params = make_params()
    quantized = jw.apply(int8_dynamic(), params, layout=LAYOUT)
    x = jax.random.normal(jax.random.key(3), (5, 32))
    lifted = jax.jit(jw.lift(forward, on_materialize="error"))(quantized, x)
    exact = forward(params, x)
    error = np.linalg.norm(lifted - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05
    one = {"w": jax.tree.map(lambda f: f[1], quantized["stack"]["kernel"])}
    experts = jax.jit(
        jw.lift(lambda w, x: jnp.einsum("eti,eio->eto", x, w), on_materialize="error")
    )
    y = experts(quantized["stack"]["kernel"], jnp.stack([x, 2 * x, x]))
    np.testing.assert_allclose(y[1], model(one, 2 * x), rtol=1e-6)


def test_bfloat16_activations_are_rounded_in_float32():
    weight = jax.random.normal(jax.random.key(0), (64, 8)).astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (5, 64)).astype(jnp.bfloat16)
    leaf = jw.apply(int8_dynamic(), {"w": weight})["w"]
    y = model({"w": leaf}, x)
    assert y.dtype == jnp.bfloat16
    expected = oracle(x.astype(jnp.float32), leaf.codes.T, leaf.scale)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8)


def test_static_steps_come_from_the_extremes_and_clip_what_exceeds_them():
    weight = jax.random.normal(jax.random.key(0), (16, 4))
    seen = jax.random.normal(jax.random.key(1), (50, 16)).at[3, 5].set(-6.0)
    tx = int8_static()
    stats = jw.calibrate(dense_model, {"w": weight}, [seen], needs=tx.needs({"w": weight}))
    params = jw.apply(tx, {"w": weight}, stats=stats)
    np.testing.assert_allclose(params["w"].input_scale, 6 / 127, rtol=1e-6)
    x = jax.random.normal(jax.random.key(2), (5, 16)).at[0, 0].set(60.0)
    leaf = params["w"]
    expected = oracle(x, leaf.codes.T, leaf.scale, step=np.asarray(leaf.input_scale))
    np.testing.assert_allclose(model(params, x), expected, rtol=1e-6, atol=1e-6)
    clipped = model(params, x.at[0, 0].set(6.0))
    np.testing.assert_allclose(model(params, x)[0], clipped[0], rtol=1e-6)


def test_static_steps_belong_to_the_matrices_of_a_stack():
    weight = jax.random.normal(jax.random.key(0), (3, 8, 4))
    scan = lambda p, x: jax.lax.scan(lambda h, w: (h, (h * 0 + 1) @ w), x, p["w"])[1]  # noqa: E731
    tx, layout = int8_static(), {"w": jw.Axes()}
    stats = jw.calibrate(scan, {"w": weight}, [jnp.ones((2, 8))], needs=tx.needs({"w": weight}))
    leaf = jw.apply(tx, {"w": weight}, stats=stats, layout=layout)["w"]
    assert leaf.input_scale.shape == (3, 1, 1)
    y = jax.jit(jw.lift(scan, on_materialize="error"))({"w": leaf}, jnp.ones((2, 8)))
    np.testing.assert_allclose(y, scan({"w": weight}, jnp.ones((2, 8))), atol=0.2)


def test_integers_of_gptq_are_kept():
    weight, x = (
        jax.random.normal(jax.random.key(0), (16, 4)),
        jax.random.normal(jax.random.key(1), (99, 16)),
    )
    gptq = jw.quantize.gptq(bits=4)
    stats = jw.calibrate(dense_model, {"w": weight}, [x], needs=gptq.needs({"w": weight}))
    only = jw.apply(gptq, {"w": weight}, stats=stats)["w"]
    both = jw.apply(jw.chain(gptq, int8_dynamic()), {"w": weight}, stats=stats)["w"]
    assert isinstance(both, QuantizedProduct)
    # Of the grid with zero points 8, which are subtracted beforehand.
    assert (only.bits, both.bits, both.input_bits) == (4, 5, 8)
    np.testing.assert_array_equal(both.materialize(), only.materialize())
    np.testing.assert_array_equal(both.weight_only().materialize(), only.materialize())


@pytest.mark.parametrize("rounded_first", [False, True])
def test_pruned_weights_keep_their_zeros(rounded_first):
    weight = jax.random.normal(jax.random.key(0), (16, 4))
    pruner, rounding = jw.sparsify.magnitude(sparsity=0.5), round_to_nearest(bits=8)
    if rounded_first:
        # The mask comes last, over codes that are no zeros.
        mask = jw.apply(pruner, {"w": weight})["w"].mask
        before = {"w": jw.Masked(jw.apply(rounding, {"w": weight})["w"], mask)}
        assert np.any(np.asarray(before["w"].base.codes)[~np.asarray(mask)] != 0)
    else:
        before = jw.apply(jw.chain(pruner, rounding), {"w": weight})
    after = jw.apply(int8_dynamic(), before)["w"]
    assert isinstance(after, QuantizedProduct)
    np.testing.assert_array_equal(after.materialize(), jw.materialize(before)["w"])
    assert np.mean(after.codes == 0) >= 0.5
    dense = jw.apply(jw.chain(pruner, int8_dynamic()), {"w": weight})["w"]
    assert np.all(np.asarray(dense.codes.T)[~np.asarray(before["w"].mask)] == 0)


def test_a_table_is_looked_up_as_the_values_it_stands_for():
    table = jax.random.normal(jax.random.key(0), (9, 16))
    tx = jw.partition(("embedding", int8_dynamic()))
    leaf = jw.apply(tx, {"embedding": table})["embedding"]
    ids = jnp.array([[3, 0], [8, 3]])
    looked_up = jax.jit(jw.lift(lambda t, i: t[i], on_materialize="error"))(leaf, ids)
    np.testing.assert_array_equal(looked_up, leaf.materialize()[ids])
    logits = jax.jit(jw.lift(lambda t, x: x @ t.T, on_materialize="error"))(leaf, jnp.ones((2, 16)))
    np.testing.assert_allclose(logits, jnp.ones((2, 16)) @ table.T, atol=0.2)


def test_outputs_may_be_split_over_devices_and_inputs_are_not(mesh):
    weight, x = (
        jax.random.normal(jax.random.key(0), (16, 8)),
        jax.random.normal(jax.random.key(1), (5, 16)),
    )
    leaf = jw.apply(int8_dynamic(), {"w": weight})["w"]
    spec = leaf.partition(jax.sharding.PartitionSpec(None, "model"), mesh)
    assert spec.codes == jax.sharding.PartitionSpec("model", None)
    assert leaf.partition(jax.sharding.PartitionSpec("model", None), mesh) is None
    shards = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), spec)
    np.testing.assert_array_equal(
        model({"w": jax.device_put(leaf, shards)}, x), model({"w": leaf}, x)
    )


def test_refusals_name_the_path_and_the_remedy():
    params = {"w": jnp.ones((16, 4))}
    affine = jw.apply(round_to_nearest(bits=8, grid="affine"), params)
    with pytest.raises(
        ValueError, match=r"int8_dynamic: 'w': the weight has offsets, or zero points of 8 bits"
    ):
        jw.apply(int8_dynamic(), affine)
    with pytest.raises(ValueError, match=r"quantize.int8_static: grid='affine' has zero points"):
        int8_static(grid="affine")
    with pytest.raises(ValueError, match=r"quantize.int8_dynamic: input_bits=9 must lie between 2"):
        int8_dynamic(input_bits=9)
    with pytest.raises(ValueError, match=r"'w': is already a QuantizedProduct"):
        jw.apply(int8_dynamic(), jw.apply(int8_dynamic(), params))
    with pytest.raises(ValueError, match=r"'w': 1 of 4 groups hold values that are not finite"):
        jw.apply(int8_dynamic(), {"w": jnp.ones((16, 4)).at[0, 0].set(jnp.inf)})


@pytest.mark.parametrize("zero", [0, 15, 16])
def test_zero_points_up_to_one_more_than_the_codes_fit(zero):
    """GPTQ files store zero points less one, so that they go up to 16 of 4-bit codes."""
    codes = jnp.array([[0, 15], [15, 7]], jnp.uint8)
    points = jnp.full((1, 2), zero, jnp.uint8)
    weight = jw.weights.Quantized.from_codes(codes, jnp.ones((1, 2)), points, bits=4)
    product = jw.apply(int8_dynamic(), {"w": weight})["w"]
    assert product.materialize().tolist() == (codes.astype(jnp.int32) - zero).tolist()


def test_zero_points_that_would_wrap_in_a_byte_are_refused():
    points = jnp.full((1, 2), 200, jnp.uint8)
    codes = jnp.zeros((4, 2), jnp.uint8)
    weight = jw.weights.Quantized.from_codes(codes, jnp.ones((1, 2)), points, bits=4)
    words = r"the weight has a zero point of 200.*at most 16 is\. Dequantize it"
    with pytest.raises(ValueError, match=rf"quantize.int8_dynamic: 'w': {words}"):
        jw.apply(int8_dynamic(), {"w": weight})
    with pytest.raises(ValueError, match=rf"QuantizedProduct: {words}"):
        jw.weights.QuantizedProduct.of(weight)


@pytest.mark.parametrize("bits, longest", [(8, 132104), (4, 2113665)])
def test_sums_that_could_overflow_are_refused(bits, longest):
    # Codes may be -128: one more than the 127 that the usual bound of 133,144 assumes.
    assert longest * 2 ** (bits - 1) * 127 <= 2**31 - 1 < (longest + 1) * 2 ** (bits - 1) * 127
    abstract = lambda n: {"w": jax.ShapeDtypeStruct((n, 1), jnp.float32)}  # noqa: E731
    run = lambda n: jax.eval_shape(lambda p: jw.apply(int8_dynamic(bits=bits), p), abstract(n))  # noqa: E731
    run(longest)
    with pytest.raises(
        ValueError, match=rf"'w': sums of {longest + 1} products .* At most {longest} are"
    ):
        run(longest + 1)


def test_the_longest_sum_is_exact():
    size = 132104
    codes = jnp.full((size, 1), -128, jnp.int8)
    leaf = QuantizedProduct.of(Quantized.from_codes(codes, jnp.ones((1, 1)), bits=8))
    y = model({"w": leaf}, jnp.full((1, size), 127.0))
    assert float(y[0, 0]) == float(np.float32(-128 * 127 * size))
