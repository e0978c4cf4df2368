"""Configs to Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxweights.models._bert import BertConfig
from jaxweights.models._hf_config import bert_from_dict, llama_from_dict
from jaxweights.models._llama_config import LlamaConfig
from jaxweights.models._rope import RopeScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "bert": "BertModel",
}


def config_to_dict(config: LlamaConfig | BertConfig) -> dict[str, Any]:
    """The `config.json` with which other tools read a checkpoint of this model.

    Args:
      config: Of a decoder or an encoder.

    Returns:
      A dict for JSON; `config_from_dict` gives the same config back.

    Raises:
      ValueError: If the family's own format cannot say what the config says.

    Example:
      >>> config = BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... )
      >>> config_to_dict(config)["model_type"]
      'bert'
    """
    if isinstance(config, BertConfig):
        values, again = _bert_to_dict(config), bert_from_dict(_bert_to_dict(config))
    else:
        values = _llama_to_dict(config)
        again = llama_from_dict(values, config.family)
    lost = [
        f"{field.name}={getattr(config, field.name)!r} cannot be said in the config.json of "
        f"{values['model_type']!r}. Choose the family whose checkpoints have it."
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(again, field.name)
    ]
    if lost:
        raise ValueError("\n".join(f"models.config_to_dict: {line}" for line in lost))
    return values


def _bert_to_dict(config: BertConfig) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "architectures": [_ARCHITECTURES["bert"]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }


def _llama_to_dict(config: LlamaConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [_ARCHITECTURES[config.family]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_dict(config.rope_scaling),
    }
    if config.family in ("llama", "qwen3", "olmo2"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        values["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3") and config.sliding_window is not None:
        slides = config.sliding_layers or (True,) * config.num_layers
        values["use_sliding_window"] = True
        values["sliding_window"] = config.sliding_window
        # Older readers know only "all layers from this one on".
        values["max_window_layers"] = slides.index(True) if any(slides) else config.num_layers
        values["layer_types"] = [
            "sliding_attention" if slide else "full_attention" for slide in slides
        ]
    return values


def _rope_to_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
        "factors": None if scaling.factors is None else list(scaling.factors),
    }
    return {key: value for key, value in values.items() if value is not None}
