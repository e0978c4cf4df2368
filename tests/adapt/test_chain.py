"""Prune, quantize what is left, add factors: one chain, one call, no key."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.adapt import factors, lora, merge_adapters
from jaxweights.calibrate import calibrate
from jaxweights.core import apply, chain, combine, split
from jaxweights.lift import lift
from jaxweights.quantize import gptq
from jaxweights.sparsify import wanda
from jaxweights.weights import LowRank, Masked, Quantized, materialize


def model(params, x):
    return jnp.tanh(x @ params["fc1"]["kernel"]) @ params["fc2"]["kernel"]


@pytest.fixture(scope="module")
def run():
    draw = np.random.default_rng(0).standard_normal
    make = lambda shape: jnp.asarray(draw(shape), jnp.float32)  # noqa: E731
    params = {"fc1": {"kernel": make((32, 16))}, "fc2": {"kernel": make((16, 16))}}
    batches = [make((40, 32)) for _ in range(2)]
    tx = chain(wanda(sparsity=0.5), gptq(bits=4, group_size=16), lora(rank=4))
    stats = calibrate(model, params, batches, needs=tx.needs(params))
    return apply(tx, params, stats=stats), batches[0]


def test_the_result_is_sparse_and_quantized_under_factors(run):
    params, x = run
    weight = params["fc1"]["kernel"]
    assert isinstance(weight, LowRank)
    assert isinstance(weight.base, Masked)
    assert isinstance(weight.base.base, Quantized)
    assert float((weight.materialize() == 0).mean()) >= 0.5
    lazy = jax.jit(lift(model, on_materialize="error"))(params, x)
    np.testing.assert_allclose(lazy, model(materialize(params), x), rtol=1e-4, atol=1e-4)


def test_one_step_of_training_changes_the_factors_alone(run):
    params, x = run
    trainable, frozen = split(params, factors)
    loss = lambda t: jnp.mean(lift(model)(combine(t, frozen), x) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(trainable)
    after = combine(jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads), frozen)
    assert (after["fc2"]["kernel"].up != params["fc2"]["kernel"].up).any()
    chex.assert_trees_all_equal(after["fc1"]["kernel"].base, params["fc1"]["kernel"].base)


def test_it_merges_into_a_masked_dense_weight(run):
    params, _ = run
    merged, _ = merge_adapters(params, dequantize=jnp.bfloat16)
    kernel = merged["fc1"]["kernel"]
    assert isinstance(kernel, Masked)
    assert kernel.dtype == jnp.bfloat16
    assert float((kernel.materialize() == 0).mean()) >= 0.5
