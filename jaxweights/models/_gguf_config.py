"""GGUF metadata to configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.models._bert import BertConfig
from jaxweights.models._llama_config import QK_NORMS, LlamaConfig, LlamaFamily
from jaxweights.models._rope import RopeScaling, rope_frequencies
from jaxweights.models._settings import Settings

_ASKER = "models.config_from_gguf"
# Layout of the file, not of the model; both layouts that were ever named are the same one.
_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned")
# The Llama 3.1 and 3.2 releases. GGUF files hold the divisors that these give, not the settings.
_KNOWN_FACTORS = (8.0, 32.0)


def llama_from_gguf(
    metadata: Mapping[str, Any], family: LlamaFamily, tensors: Mapping[str, Any]
) -> LlamaConfig:
    """Reads the config of a Llama-family GGUF file; biases and head show in its tensors."""
    entries = Settings(_ASKER, metadata, f"{metadata['general.architecture']}.")
    heads = entries.take("attention.head_count")
    hidden = entries.take("embedding_length")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else None
    head_dim = entries.take("attention.key_length", derived)
    entries.demand("attention.value_length", (head_dim,))
    entries.demand("rope.dimension_count", (head_dim,))
    entries.demand("expert_count", (0,))
    fields = dict(
        vocab_size=entries.take("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        hidden_size=hidden,
        intermediate_size=entries.take("feed_forward_length"),
        num_layers=entries.take("block_count"),
        num_heads=heads,
        num_kv_heads=entries.take("attention.head_count_kv", heads),
        head_dim=head_dim,
        norm_eps=_shortest(entries.take("attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest(entries.take("rope.freq_base", 10000.0)),
        max_positions=entries.take("context_length"),
        sliding_window=entries.take("attention.sliding_window", None),
    )
    linear = _linear_factor(entries)
    entries.finish(_HARMLESS)
    scaling = RopeScaling("linear", factor=linear) if linear is not None else None
    if "rope_freqs.weight" in tensors:
        scaling = _recognised(_read(tensors["rope_freqs.weight"]), fields)
    return LlamaConfig(
        **fields,
        rope_scaling=scaling,
        qkv_bias="blk.0.attn_q.bias" in tensors or (family == "qwen2" and not tensors),
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        qk_norm=QK_NORMS.get(family),
        norm_position="post" if family == "olmo2" else "pre",
        family=family,
    )


def bert_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> BertConfig:
    """Reads the config of a BERT GGUF file."""
    del tensors
    entries = Settings(_ASKER, metadata, "bert.")
    fields = dict(
        vocab_size=entries.take("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        hidden_size=entries.take("embedding_length"),
        intermediate_size=entries.take("feed_forward_length"),
        num_layers=entries.take("block_count"),
        num_heads=entries.take("attention.head_count"),
        max_positions=entries.take("context_length"),
        type_vocab_size=metadata.get("tokenizer.ggml.token_type_count", 2),
        norm_eps=_shortest(entries.take("attention.layer_norm_epsilon")),
    )
    entries.demand("attention.causal", (False,))
    entries.take("pooling_type", None)  # how to sum up a sentence is the caller's choice
    entries.finish(_HARMLESS)
    return BertConfig(**fields)


def _linear_factor(entries: Settings) -> float | None:
    entries.demand("rope.scaling.attn_factor", (1.0,))
    kind = entries.take("rope.scaling.type", "none")
    older = entries.take("rope.scale_linear", None)
    factor = entries.take("rope.scaling.factor", older)
    entries.take("rope.scaling.original_context_length", None)
    if kind == "none" and older is None:
        return None
    if kind not in ("none", "linear"):
        entries.faults.append(
            f"'rope.scaling.type' is {kind!r}, which is not supported. Supported: 'none', 'linear'."
        )
        return None
    if factor is None:
        entries.faults.append("'rope.scaling.factor' is missing for linear scaling.")
        return None
    return _shortest(factor)


def _recognised(divisors: np.ndarray, fields: Mapping[str, Any]) -> RopeScaling:
    """The published scaling that gives these divisors, or the divisors themselves."""
    plain = rope_frequencies(fields["head_dim"], fields["rope_theta"])
    if divisors.shape == plain.shape:
        for factor in _KNOWN_FACTORS:
            known = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
            scaled = rope_frequencies(fields["head_dim"], fields["rope_theta"], known)
            # Both sides are float32, computed in different orders.
            if np.allclose(plain / scaled, divisors, rtol=1e-5):
                return known
    return RopeScaling("factors", factors=tuple(float(d) for d in divisors.reshape(-1)))


def _read(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.read() if hasattr(tensor, "read") else tensor)


def _shortest(value: Any) -> Any:
    """The shortest decimal of a float32, so that 1e-5 comes back as 1e-5."""
    if isinstance(value, bool) or not isinstance(value, float | np.floating):
        return value
    return float(str(np.float32(value)))
