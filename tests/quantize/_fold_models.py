"""Tiny models whose folds are known, with inputs that some channels dominate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxweights as jw
from jaxweights.models import BertConfig, LlamaConfig, build

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
}
LLAMAS = {
    "gqa": LlamaConfig(**SIZES, num_kv_heads=2),
    "biases": LlamaConfig(**SIZES, qkv_bias=True, out_bias=True, mlp_bias=True),
    "tied": LlamaConfig(**SIZES, tie_embeddings=True),
    "post": LlamaConfig(**SIZES, qk_norm="whole", norm_position="post"),
}
BERT = BertConfig(**SIZES)
CONFIGS = LLAMAS | {"bert": BERT}
TOKENS = np.arange(2 * 12).reshape(2, 12) * 7 % 64


@functools.cache
def model(name):
    """fn, parameters and folds; norms' gains and biases are drawn too, with a few outliers."""
    config = CONFIGS[name]
    module = build(config)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    drawn = jax.jit(module.init)(jax.random.key(0), tokens)["params"]
    flat, treedef = jax.tree_util.tree_flatten_with_path(drawn)
    leaves = []
    for i, (path, leaf) in enumerate(flat):
        key = jax.random.fold_in(jax.random.key(1), i)
        last = path[-1].key
        if last == "scale":
            leaf = jnp.exp(0.5 * jax.random.normal(key, leaf.shape)).at[..., 3].mul(20.0)
        if last == "bias":
            leaf = 0.3 * jax.random.normal(key, leaf.shape)
        leaves.append(leaf)
    folds = jw.quantize.bert_folds if name == "bert" else jw.quantize.llama_folds
    fn = lambda params, tokens: module.apply({"params": params}, tokens)  # noqa: E731
    return fn, jax.tree.unflatten(treedef, leaves), folds(config)


@functools.cache
def stats_of(name, *names):
    fn, params, _ = model(name)
    paths = jw.core.flatten(params)[0]
    needs = {path: frozenset(names) for path in paths if path.endswith("kernel")}
    return jw.calibrate(fn, params, [jnp.asarray(TOKENS, jnp.int32)], needs=needs)
