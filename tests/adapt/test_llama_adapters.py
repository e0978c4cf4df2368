"""Adapters on a whole language model: peft's logits, and what a training step computes."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxweights.adapt import factors, lora, merge_adapters
from jaxweights.core import apply, combine, identity, partition, split
from jaxweights.lift import infer_layout, lift
from jaxweights.models import build, config_from_dict, params_from_checkpoint
from jaxweights.weights import LowRank
from tests._fixtures import fixture, fixture_path

# optax and flax multiply dtypes as they like.
pytestmark = pytest.mark.promotion(dtypes="standard", ranks="allow")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
MODEL = build(config_from_dict(CONFIG))


def logits_of(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def read(name):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    return load_file(fixture_path(f"adapt/{name}.safetensors"))


@functools.cache
def base():
    return jax.tree.map(
        jnp.asarray, params_from_checkpoint(read("llama_base"), config_from_dict(CONFIG))
    )


@functools.cache
def layout():
    return infer_layout(logits_of, base(), jnp.zeros((2, 12), jnp.int32))


def adapted(pattern, *, alpha=8.0, rank=4):
    tx = partition((pattern, lora(rank=rank, alpha=alpha)), (..., identity()))
    return apply(tx, base(), layout=layout())


def stacked(adapter, name, suffix):
    key = "base_model.model.model.layers.{}.self_attn.{}.{}.weight"
    return jnp.stack([jnp.asarray(adapter[key.format(i, name, suffix)].T) for i in range(2)])


@pytest.mark.parametrize("case", ["lora", "embed"])
def test_logits_of_the_lifted_model_are_those_that_peft_computes(case):
    adapter, arrays = read(f"llama_{case}_adapter_model"), fixture("adapt/llama_lora.npz")
    names = {"lora": ("q", "v"), "embed": ("q",)}[case]
    pattern = {"lora": ".*/(q|v)/kernel", "embed": ".*/q/kernel|embed/embedding"}[case]
    trainable, frozen = split(adapted(pattern), factors)
    for name in names:
        for suffix, factor in (("lora_A", "down"), ("lora_B", "up")):
            path = f"layers/attn/{name}/kernel/{factor}"
            given = stacked(adapter, f"{name}_proj", suffix)
            assert trainable[path].shape == given.shape
            trainable[path] = given
    if case == "embed":
        table = "base_model.model.model.embed_tokens.lora_embedding_"
        trainable["embed/embedding/down"] = jnp.asarray(adapter[table + "B"])
        trainable["embed/embedding/up"] = jnp.asarray(adapter[table + "A"])
    params = combine(trainable, frozen)
    if case == "embed":  # peft trained the whole head
        params["head"]["kernel"] = jnp.asarray(adapter["base_model.model.lm_head.weight"].T)
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    lazy = jax.jit(lift(logits_of, on_materialize="error"))(params, tokens)
    # The fixture's tolerance, for logits of order 1 after two layers.
    np.testing.assert_allclose(lazy, arrays[f"{case}/logits"], atol=1e-4, rtol=1e-4)
    merged, _ = merge_adapters(params)
    np.testing.assert_allclose(
        jax.jit(logits_of)(merged, tokens), arrays[f"{case}/logits"], atol=1e-4, rtol=1e-4
    )


def loss_fn(params, tokens):
    logits = lift(logits_of, on_materialize="error")(params, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def products(fn, *args):
    """Shapes of all matrix products that a function lowers to, without axes of length 1."""
    text = jax.jit(fn).lower(*args).as_text()
    shapes = re.findall(r"stablehlo.dot_general.*-> tensor<([\dx]+)xf32>", text)
    return [sorted(int(n) for n in shape.split("x") if n != "1") for shape in shapes]


def test_a_training_step_forms_no_product_of_a_weights_size():
    tokens = jnp.ones((3, 7), jnp.int32)
    params = adapted(".*/(gate|up|down|k|v)/kernel")
    trainable, frozen = split(params, factors)
    grad = jax.grad(lambda t, f: loss_fn(combine(t, f), tokens))
    weights = ([48, 64], [24, 48])  # of the feed-forward part, of keys and values
    assert not [shape for shape in products(grad, trainable, frozen) if shape in weights]
    full = products(jax.grad(lambda p: loss_fn(p, tokens)), base())
    assert all(shape in full for shape in weights)  # so the search finds them where they are


def test_training_the_factors_lowers_the_loss_and_keeps_the_base():
    tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, 96)
    trainable, frozen = split(adapted(".*/kernel"), factors)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(trainable, state, frozen):
        loss, grads = jax.value_and_grad(lambda t: loss_fn(combine(t, frozen), tokens))(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = optimizer.init(trainable), []
    for _ in range(15):
        trainable, state, loss = step(trainable, state, frozen)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    trained = combine(trainable, frozen)
    for (path, weight), before in zip(
        jax.tree_util.tree_leaves_with_path(
            trained, is_leaf=lambda leaf: isinstance(leaf, LowRank)
        ),
        jax.tree.leaves(base()),
        strict=True,
    ):
        kept = weight.base if isinstance(weight, LowRank) else weight
        assert (kept == before).all(), path
