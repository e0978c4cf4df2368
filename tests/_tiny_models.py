"""Random models of a few thousand weights, written as real checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint import write_safetensors
from jaxweights.models import BertConfig, LlamaConfig, build, checkpoint_from_params, config_to_dict

LLAMA = LlamaConfig(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
)
BERT = BertConfig(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    max_positions=512,
)


def byte_tokenizer(*, around: bool) -> str:
    """A tokenizer of bytes, as tokenizer.json; with [CLS] and [SEP] around a text if asked."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "[CLS]", "[SEP]"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if around:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
        )
    return made.to_str()


def write_tiny(folder, config, *, seed=0):
    """Writes a random model of a config as safetensors with its config and tokenizer."""
    model = build(config)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = model.init(jax.random.key(seed), tokens)["params"]
    tensors = checkpoint_from_params(jax.tree.map(np.asarray, params), config)
    files = {
        "config.json": json.dumps(config_to_dict(config)),
        "tokenizer.json": byte_tokenizer(around=isinstance(config, BertConfig)),
    }
    write_safetensors(folder, tensors, files=files)
    return folder
