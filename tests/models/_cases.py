"""Small models of every family: their configs as a `config.json` has them, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SEED = 2026
BATCH, TIME, VOCAB = 2, 12, 61

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA = _BASE | {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}

CASES: dict[str, dict[str, Any]] = {
    "llama2": _LLAMA | {"num_key_value_heads": 4},
    # Contexts so short that wavelengths fall on both sides of both limits.
    "llama3": _LLAMA
    | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 50.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_biases": _LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "smollm2": _LLAMA
    | {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "mistral": _BASE
    | {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
    },
    "qwen2": _BASE
    | {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 4,
        "max_window_layers": 1,
        "rope_theta": 1000000.0,
    },
    "qwen2_sliding": _BASE
    | {
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 2,
    },
    "qwen3": _BASE
    | {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "qwen3_biases": _BASE
    | {
        "model_type": "qwen3",
        "num_key_value_heads": 4,
        "head_dim": 6,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 2,
    },
    "olmo2": _BASE | {"model_type": "olmo2", "num_key_value_heads": 2, "rope_theta": 500000.0},
    "bert": _BASE | {"model_type": "bert", "hidden_act": "gelu", "type_vocab_size": 2},
}
DECODERS = [name for name in CASES if name != "bert"]


def draw_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = SEED) -> dict[str, np.ndarray]:
    """Weights that depend on names and shapes alone: one stream of normals, names in order.

    Vectors called weight are norms' scales and lie around 1. The spread keeps every softmax and
    every norm at work: with smaller weights the logits would not notice a wrong rotation.
    """
    rng = np.random.default_rng(seed)
    drawn = {}
    for name in sorted(shapes):
        values = rng.standard_normal(shapes[name])
        is_scale = len(shapes[name]) == 1 and name.endswith("weight")
        values = 1.0 + 0.3 * values if is_scale else 0.4 * values
        drawn[name] = values.astype(np.float32)
    return drawn


def inputs(seed: int = SEED) -> dict[str, np.ndarray]:
    """Tokens, token types, and a mask with padding on the left of the second row."""
    rng = np.random.default_rng(seed)
    mask = np.ones((BATCH, TIME), np.int32)
    mask[1, :3] = 0
    return {
        "tokens": rng.integers(0, VOCAB, (BATCH, TIME), dtype=np.int32),
        "token_types": rng.integers(0, 2, (BATCH, TIME), dtype=np.int32),
        "attention_mask": mask,
    }
