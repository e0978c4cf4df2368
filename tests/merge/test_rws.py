"""Robust Weight Signatures: extracted, quantized, added, and taken away to the last bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core import Layout
from jaxweights.merge import (
    add_signatures,
    extract_signature,
    quantize_signature,
    restore_leaves,
    signature_leaves,
)
from jaxweights.weights import Axes
from tests.merge._trees import assert_same_bits

LAYERS = ["conv1/.*", "conv2/.*", "head/.*"]


def model(seed, scale=1.0, dtype=jnp.float32):
    draw = np.random.default_rng(seed).normal
    make = lambda *shape: jnp.asarray(scale * draw(size=shape), dtype)  # noqa: E731
    return {
        "conv1": {"kernel": make(3, 3, 2, 4), "bias": make(4)},
        "conv2": {"kernel": make(3, 3, 4, 4), "bias": make(4)},
        "head": {"kernel": make(4, 3)},
        "step": jnp.asarray(seed, jnp.int32),
    }


def moved(base, seed, scale=1e-3):
    change = model(seed, scale)
    return jax.tree.map(
        lambda x, d: x + d.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        base,
        change,
    )


PRE = model(0)
CLEAN, ROBUST, OTHER = moved(PRE, 1), moved(PRE, 2), moved(PRE, 3)


def extract(robust=ROBUST, keep=2):
    return extract_signature(PRE, CLEAN, robust, layers=LAYERS, keep=keep)


def test_it_is_the_component_of_the_robust_update_across_the_clean_one():
    found = extract(keep=1).values
    assert set(found) == {"conv1/kernel", "conv1/bias"}
    for path, value in found.items():
        part, name = path.split("/")
        start = np.asarray(PRE[part][name], np.float64)
        d, v = (np.asarray(t[part][name], np.float64) - start for t in (CLEAN, ROBUST))
        want = v - (v * d).sum() / (d * d).sum() * d
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-6 * np.abs(v).max())
        across = (np.asarray(value, np.float64) * d).sum()
        assert abs(across) < 1e-5 * np.linalg.norm(v) * np.linalg.norm(d)
        assert np.abs((v * d).sum()) > 100 * abs(across)


def test_a_model_that_is_no_more_robust_has_no_signature():
    for value in extract(CLEAN).values.values():
        np.testing.assert_array_equal(value, 0)


def test_tiny_updates_have_signatures_too():
    zero = jax.tree.map(jnp.zeros_like, PRE)
    small = lambda seed: model(seed, 1e-30)  # noqa: E731
    got = extract_signature(zero, small(1), small(2), layers=LAYERS)
    want = extract_signature(zero, model(1), model(2), layers=LAYERS)
    for path, value in want.values.items():
        np.testing.assert_allclose(got.values[path] * 1e30, value, rtol=0, atol=1e-5)


def test_a_patch_moves_shallow_leaves_only_and_is_linear():
    found, other = extract(), extract(OTHER)
    target = model(7)
    patched = add_signatures(target, [found])
    assert patched["head"]["kernel"] is target["head"]["kernel"]
    assert patched["step"] is target["step"]
    want = target["conv1"]["kernel"] + found.values["conv1/kernel"]
    np.testing.assert_array_equal(patched["conv1"]["kernel"], want)
    half = add_signatures(target, [found], weights=[0.5])
    np.testing.assert_allclose(
        half["conv1"]["kernel"] - target["conv1"]["kernel"],
        0.5 * (patched["conv1"]["kernel"] - target["conv1"]["kernel"]),
        rtol=0,
        atol=1e-6,  # the weights near 1 are float32
    )
    both = add_signatures(target, [found, other])
    back = add_signatures(target, [other, found])
    for ours, theirs in zip(jax.tree.leaves(both), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-7)
    mean = (found.values["conv1/bias"] + other.values["conv1/bias"]) / 2
    np.testing.assert_allclose(both["conv1"]["bias"] - target["conv1"]["bias"], mean, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_was_added_is_taken_away_to_the_last_bit(dtype):
    target = model(7, dtype=dtype)
    found = [extract(), quantize_signature(extract(OTHER), bits=4)]
    loud = [0.3, 700.0]
    kept = signature_leaves(target, found)
    patched = add_signatures(target, found, weights=loud)
    # Subtracting instead would not return.
    subtracted = add_signatures(patched, found, weights=[-w for w in loud])
    assert not np.array_equal(subtracted["conv1"]["kernel"], target["conv1"]["kernel"])
    assert_same_bits(restore_leaves(patched, kept), target)
    assert set(kept) == {"conv1/kernel", "conv1/bias", "conv2/kernel", "conv2/bias"}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_entries_are_off_by_half_a_step_at_most(bits):
    found = extract()
    small = quantize_signature(found, bits=bits)
    for path, value in found.values.items():
        step = max(float(value.max()), 0) - min(float(value.min()), 0)
        step /= 2**bits - 1
        error = np.abs(np.asarray(small.dense()[path]) - np.asarray(value)).max()
        assert error <= 0.5001 * step
        assert small.dense()[path].shape == value.shape
    assert small.nbytes < found.nbytes * (bits / 32 + 0.1)


def test_stacked_layers_have_signatures_of_their_own_and_only_the_first_are_kept():
    layout = Layout.of({"layers/kernel": Axes()}, traced=True)
    draw = np.random.default_rng(0).normal
    scale = np.array([1, 1, 1000.0]).reshape(3, 1, 1)
    pre, clean, robust = (
        {"layers": {"kernel": jnp.asarray(draw(size=(3, 4, 2)) * scale, jnp.float32)}}
        for _ in range(3)
    )
    found = extract_signature(pre, clean, robust, layers=["layers/.*"], depth=2, layout=layout)
    assert found.shapes == (("layers/kernel", (2, 4, 2)),)
    for layer in range(2):
        one = [{"kernel": t["layers"]["kernel"][layer]} for t in (pre, clean, robust)]
        alone = extract_signature(*one, layers=["kernel"]).values["kernel"]
        np.testing.assert_allclose(found.values["layers/kernel"][layer], alone, rtol=0, atol=1e-5)
    small = quantize_signature(found, bits=8)
    assert small.values["layers/kernel"].scale.shape == (2, 1, 1)
    loose = extract_signature(PRE, CLEAN, ROBUST, layers=LAYERS, depth=2)
    assert dict(loose.shapes)["conv1/kernel"] == (3, 3, 2, 4)  # nothing is stacked there
    full = extract_signature(pre, clean, robust, layers=["layers/.*"], layout=layout)
    kept = signature_leaves(pre, [small, full])
    assert kept["layers/kernel"].shape == (3, 4, 2)
    patched = add_signatures(pre, [small])
    np.testing.assert_array_equal(patched["layers"]["kernel"][2], pre["layers"]["kernel"][2])
    np.testing.assert_allclose(
        patched["layers"]["kernel"][:2],
        pre["layers"]["kernel"][:2] + small.dense()["layers/kernel"],
        atol=1e-6,
    )
    back = restore_leaves(patched, signature_leaves(pre, [small]))
    assert_same_bits(back, pre)
    both = add_signatures(pre, [full, small])["layers"]["kernel"]
    other = add_signatures(pre, [small, full])["layers"]["kernel"]
    np.testing.assert_allclose(both, other, rtol=0, atol=1e-6)


def test_a_leaf_that_clean_tuning_left_alone_takes_the_whole_update_with_a_warning():
    frozen = {**CLEAN, "conv1": dict(PRE["conv1"])}
    with pytest.warns(UserWarning, match=r"did not change \['conv1/bias', 'conv1/kernel'\]"):
        found = extract_signature(PRE, frozen, ROBUST, layers=LAYERS, keep=1)
    want = ROBUST["conv1"]["bias"] - PRE["conv1"]["bias"]
    np.testing.assert_array_equal(found.values["conv1/bias"], want)


def test_signatures_are_added_under_jit():
    found = quantize_signature(extract(), bits=4)
    jitted = jax.jit(lambda p, s: add_signatures(p, [s]))(PRE, found)
    want = add_signatures(PRE, [found])
    for ours, theirs in zip(jax.tree.leaves(jitted), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-7)


def test_errors_name_the_leaf():
    with pytest.raises(ValueError, match=r"pattern 'conv9/.*' matches no floating leaf.*conv"):
        extract_signature(PRE, CLEAN, ROBUST, layers=["conv9/.*"])
    with pytest.raises(ValueError, match=r"keep=4 must lie in \[1, 3\]"):
        extract(keep=4)
    with pytest.raises(ValueError, match="layers='conv1' must be a list of patterns"):
        extract_signature(PRE, CLEAN, ROBUST, layers="conv1")
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        extract_signature(PRE, CLEAN, ROBUST, layers=LAYERS, depth=0)
    found = extract()
    with pytest.raises(ValueError) as error:
        add_signatures({"conv1": {"kernel": jnp.ones((3, 3, 2, 5)), "bias": jnp.ones(4)}}, [found])
    assert "'conv1/kernel': is (3, 3, 2, 4) in signatures[0]" in str(error.value)
    assert "'conv2/bias': of signatures[0] is not in the model" in str(error.value)
    with pytest.raises(ValueError, match="weights has 2 entries"):
        add_signatures(PRE, [found], weights=[1, 2])
    with pytest.raises(ValueError, match="signatures is empty"):
        add_signatures(PRE, [])
    kept = signature_leaves(PRE, [found])
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PRE)
    with pytest.raises(ValueError, match=r"'conv1/bias': is bfloat16 .* float32 .* was kept"):
        restore_leaves(narrow, kept)
    with pytest.raises(ValueError, match="is already a Quantized"):
        quantize_signature(quantize_signature(found, bits=4), bits=4)
