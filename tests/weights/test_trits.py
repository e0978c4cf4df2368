"""Five weights in a byte: against NumPy's digits, and as a weight among others."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint.exchange import write_quantized
from jaxweights.quantize import fake_quant, ternary
from jaxweights.weights import Quantized, Trits
from jaxweights.weights._trits import pack_trits, unpack_trits

KEY = jax.random.key(0)


def test_every_five_digits_have_a_byte_of_their_own_and_come_back():
    digits = np.array(list(itertools.product((-1, 0, 1), repeat=5))).T  # (5, 243)
    packed = pack_trits(jnp.asarray(digits))
    numbers = (digits + 1).T @ 3 ** np.arange(5)[::-1]
    assert packed.dtype == jnp.uint8 and packed.shape == (1, 243)
    np.testing.assert_array_equal(packed[0], -(-numbers * 256 // 243))
    assert len(np.unique(packed)) == 243
    np.testing.assert_array_equal(unpack_trits(packed), digits)


@pytest.mark.parametrize("in_dim", [0, 1, 4, 5, 6, 32])
def test_lengths_that_five_does_not_divide(in_dim):
    codes = jax.random.randint(KEY, (2, in_dim, 3), -1, 2)
    scale = jnp.ones((2, 1, 3)) * jnp.array([1.0, 2.0, 4.0])[None, None]
    weight = Trits.from_codes(codes, scale)
    assert weight.codes.shape == (2, -(-in_dim // 5), 3) and weight.in_dim == in_dim
    np.testing.assert_array_equal(weight.codes_matrix(), codes)
    np.testing.assert_array_equal(weight.materialize(), np.asarray(codes) * np.asarray(scale))
    one = jax.tree.map(lambda field: field[1], weight)
    np.testing.assert_array_equal(one.materialize(), weight.materialize()[1])
    same = weight.quantized()
    assert isinstance(same, Quantized) and same.bits == 2
    np.testing.assert_array_equal(same.materialize(), weight.materialize())


@pytest.mark.parametrize("share", ["tensor", "output"])
def test_ternary_is_the_same_in_a_fifth_less_memory(share):
    params = {"w": jax.random.normal(KEY, (320, 64))}
    loose = jw.apply(ternary(share=share), params)["w"]
    tight = jw.apply(ternary(share=share, per_byte=5), params)["w"]
    assert isinstance(tight, Trits)
    np.testing.assert_array_equal(tight.materialize(), loose.materialize())
    np.testing.assert_array_equal(tight.scale, loose.scale)
    assert tight.codes.nbytes == 0.8 * loose.codes.nbytes == 320 * 64 // 5
    assert tight.bits_per_weight < 1.72
    x = jax.random.normal(jax.random.key(1), (7, 320))
    run = jax.jit(jw.lift(lambda p, x: x @ p["w"], on_materialize="error"))
    np.testing.assert_allclose(run({"w": tight}, x), x @ loose.materialize(), rtol=2e-5, atol=2e-4)


def test_attention_kernels_embeddings_and_bfloat16():
    kernel = jax.random.normal(KEY, (32, 4, 8)).astype(jnp.bfloat16)
    layout = {"k": jw.Axes(inputs=(-3,), outputs=(-2, -1))}
    weight = jw.apply(ternary(per_byte=5), {"k": kernel}, layout=layout)["k"]
    assert weight.shape == (32, 4, 8) and weight.spare == 3
    dense = weight.materialize()
    assert dense.dtype == jnp.bfloat16 and len(np.unique(np.asarray(dense, np.float32))) == 3
    x = jax.random.normal(jax.random.key(1), (5, 32)).astype(jnp.bfloat16)
    out = jw.lift(lambda p, x: jnp.einsum("td,dhk->thk", x, p["k"]))({"k": weight}, x)
    wide = np.einsum("td,dhk->thk", *(np.asarray(a, np.float32) for a in (x, dense)))
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, rtol=2e-2, atol=5e-2)
    columns = Trits.from_codes(jnp.array([[1, 0, -1], [0, 1, 1]]), jnp.ones((1, 1))).columns(
        jnp.array([2, 0])
    )
    np.testing.assert_array_equal(columns, [[-1, 1], [1, 0]])


@pytest.mark.parametrize("clipped", ["pass", "zero"])
def test_training_ends_where_storing_begins_and_stops_gradients_alike(clipped):
    params = {"w": jax.random.normal(KEY, (32, 8))}
    probe = jax.random.normal(jax.random.key(2), (32, 8))
    grads = []
    for per_byte in (4, 5):
        tx = ternary(per_byte=per_byte)
        loss = lambda p, tx=tx: jnp.sum(fake_quant(p, tx, clipped=clipped)["w"] * probe)  # noqa: E731
        grads.append(jax.grad(loss)(params)["w"])
        stored = jw.materialize(jw.apply(tx, params))["w"]
        np.testing.assert_array_equal(fake_quant(params, tx)["w"], stored)
    np.testing.assert_array_equal(*grads)
    assert np.any(grads[0] == 0) == (clipped == "zero")


def test_a_tree_with_it_is_saved_and_loaded(tmp_path):
    params = jw.apply(ternary(per_byte=5), {"w": jax.random.normal(KEY, (33, 8))})
    jw.checkpoint.save_tree(tmp_path / "m", params)
    again = jw.checkpoint.load_tree(tmp_path / "m").tree["w"]
    assert isinstance(again, Trits) and again.spare == 2
    np.testing.assert_array_equal(again.materialize(), params["w"].materialize())


def test_other_formats_hold_it_in_two_bits(tmp_path):
    weight = {"up.weight": jax.random.normal(KEY, (64, 96))}  # (out, in)
    files = []
    for per_byte in (4, 5):
        small = jw.apply(ternary(share="output", per_byte=per_byte), weight)
        folder = tmp_path / str(per_byte)
        write_quantized(folder, small, form="compressed-tensors", config={})
        held = jw.checkpoint.open_checkpoint(folder).represented("up.weight")
        np.testing.assert_array_equal(held.materialize(), small["up.weight"].materialize())
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_refusals():
    words = r"Trits: scale has shape \(2, 3\), but the matrix has shape \(5, 3\)"
    with pytest.raises(ValueError, match=words):
        Trits.from_codes(jnp.ones((5, 3), jnp.int32), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"ternary: per_byte=3 must be 4 \(two bits a weight\) or"):
        ternary(per_byte=3)
