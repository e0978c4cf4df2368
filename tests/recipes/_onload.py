"""Models, methods and runs for the tests of runs block by block."""

import dataclasses

import numpy as np

from jaxweights.checkpoint import open_checkpoint
from jaxweights.sparsify import wanda
from tests._tiny_models import LLAMA

BASE = dataclasses.replace(
    LLAMA, hidden_size=32, num_kv_heads=2, head_dim=16, intermediate_size=64, num_layers=3
)


FAMILIES = {
    "llama": BASE,
    "mistral": dataclasses.replace(BASE, family="mistral", sliding_window=8, tie_embeddings=False),
    "qwen2": dataclasses.replace(BASE, family="qwen2", qkv_bias=True, tie_embeddings=False),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm="head"),
    "olmo2": dataclasses.replace(BASE, family="olmo2", norm_position="post", qk_norm="whole"),
}


GPTQ = {"bits": 4, "group_size": 32, "grid": "half"}


def tokens(count=3, rows=4, length=24):
    """Batches, of which the last is smaller."""
    sizes = [rows] * (count - 1) + [rows - 2]
    rng = np.random.default_rng(0)
    return [rng.integers(0, 250, (n, length)).astype(np.int32) for n in sizes]


def tensors_of(path):
    source = open_checkpoint(path)
    return {name: source._stored(name)[1].tobytes() for name in source.names}


# What compiles fast and changes what later blocks see.
QUICK = {"transforms": wanda(sparsity=0.6), "batches": tokens(), "form": "safetensors"}
