"""Hugging Face `config.json` to configs, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxweights.models._bert import BertConfig
from jaxweights.models._llama_config import QK_NORMS, LlamaConfig, LlamaFamily
from jaxweights.models._rope import RopeScaling
from jaxweights.models._settings import Settings

_ASKER = "models.config_from_dict"

# Entries that say nothing about what the forward pass computes: provenance, dtype of storage,
# dropout and initialisation (training only), token ids, generation, and layout of computation.
_HARMLESS = frozenset(
    """
    model_type architectures transformers_version transformers.js_config dtype torch_dtype
    name_or_path unsloth_version unsloth_fixed initializer_range attention_dropout
    hidden_dropout_prob attention_probs_dropout_prob classifier_dropout gradient_checkpointing
    use_cache pretraining_tp chunk_size_feed_forward output_attentions output_hidden_states
    output_scores return_dict return_dict_in_generate torchscript tf_legacy_loss use_bfloat16
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class
    prefix bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens bad_words_ids max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    remove_invalid_values exponential_decay_length_penalty model_max_length is_llama_config
    """.split()
)
# Entries that some checkpoints state and that may only say "no".
_OFF: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
}
_DEFAULT_POSITIONS: dict[LlamaFamily, int] = {
    "llama": 2048,
    "mistral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
    "olmo2": 2048,
}


def llama_from_dict(values: Mapping[str, Any], family: LlamaFamily) -> LlamaConfig:
    """Reads the config of a Llama-family checkpoint; entries that are absent get its defaults."""
    entries = Settings(_ASKER, values)
    num_layers = entries.take("num_hidden_layers")
    theta, scaling = _rope(entries)
    window, slides = _window(entries, family, num_layers)
    bias = family in ("llama", "qwen3", "olmo2") and entries.take("attention_bias", False)
    # A null means as many as query heads; only where the entry is absent has a family its own.
    absent = not entries.has("num_key_value_heads")
    shared = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family) if absent else None
    fields = dict(
        vocab_size=entries.take("vocab_size"),
        hidden_size=entries.take("hidden_size"),
        intermediate_size=entries.take("intermediate_size"),
        num_layers=num_layers,
        num_heads=entries.take("num_attention_heads"),
        num_kv_heads=entries.take("num_key_value_heads", shared),
        head_dim=entries.take("head_dim", 128 if family == "qwen3" else None),
        norm_eps=entries.take("rms_norm_eps", 1e-5 if family == "olmo2" else 1e-6),
        max_positions=entries.take("max_position_embeddings", _DEFAULT_POSITIONS[family]),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=family == "llama" and entries.take("mlp_bias", False),
        tie_embeddings=entries.take("tie_word_embeddings", False),
    )
    entries.demand("hidden_act", ("silu", "swish"))
    _finish(entries)
    return LlamaConfig(
        **fields,
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        sliding_layers=slides,
        qk_norm=QK_NORMS.get(family),
        norm_position="post" if family == "olmo2" else "pre",
        family=family,
    )


def bert_from_dict(values: Mapping[str, Any]) -> BertConfig:
    """Reads the config of a BERT checkpoint."""
    entries = Settings(_ASKER, values)
    fields = dict(
        vocab_size=entries.take("vocab_size"),
        hidden_size=entries.take("hidden_size"),
        intermediate_size=entries.take("intermediate_size"),
        num_layers=entries.take("num_hidden_layers"),
        num_heads=entries.take("num_attention_heads"),
        max_positions=entries.take("max_position_embeddings", 512),
        type_vocab_size=entries.take("type_vocab_size", 2),
        norm_eps=entries.take("layer_norm_eps", 1e-12),
    )
    entries.demand("hidden_act", ("gelu",))
    entries.demand("position_embedding_type", ("absolute",))
    entries.take("tie_word_embeddings", True)  # ties a pre-training head that is not part of it
    _finish(entries)
    return BertConfig(**fields)


def _finish(entries: Settings) -> None:
    for key, allowed in _OFF.items():
        entries.demand(key, allowed)
    entries.finish(_HARMLESS)


def _rope(entries: Settings) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    given = entries.take("rope_parameters", None), entries.take("rope_scaling", None)
    if given[0] and given[1] and given[0] != given[1]:
        entries.faults.append("'rope_parameters' and 'rope_scaling' differ. Keep one of them.")
    values = given[0] or given[1] or {}
    if not isinstance(values, Mapping):
        entries.faults.append(f"'rope_parameters' is {values!r}. It must be a dict.")
        return 10000.0, None
    rope = Settings(_ASKER, values)
    outer = entries.take("rope_theta", None)
    theta = rope.take("rope_theta", 10000.0 if outer is None else outer)
    if outer is not None and outer != theta:
        entries.faults.append(f"'rope_theta' is both {outer!r} and {theta!r}. Keep one of them.")
    kind = rope.take("type", "default")
    kind = rope.take("rope_type", kind)
    rope.take("type", None)
    rope.demand("partial_rotary_factor", (1, 1.0))
    scaling = None
    if kind in ("linear", "llama3", "factors"):
        scaling = _scaling(kind, rope)
    elif kind != "default":
        rope.faults.append(
            f"'rope_type' is {kind!r}, which is not supported. "
            "Supported: 'default', 'linear', 'llama3'."
        )
        rope = _forgive_rest(rope)
    try:
        rope.finish()
        return theta, scaling() if scaling else None
    except (TypeError, ValueError) as error:
        entries.faults += [f"rope: {line}" for line in str(error).splitlines()]
        return theta, None


def _forgive_rest(rope: Settings) -> Settings:
    """Only the unknown kind is worth a line, not the settings that belong to it."""
    silent = Settings(rope.asker, {})
    silent.faults = rope.faults
    return silent


def _scaling(kind: str, rope: Settings):
    """Takes a kind's settings now and builds the scaling once they are known to be complete."""
    if kind == "factors":
        factors = rope.take("factors")
        return lambda: RopeScaling("factors", factors=tuple(factors))
    factor = rope.take("factor")
    if kind == "linear":
        rope.take("original_max_position_embeddings", None)  # stated by some, read by none
        return lambda: RopeScaling("linear", factor=factor)
    low, high = rope.take("low_freq_factor"), rope.take("high_freq_factor")
    original = rope.take("original_max_position_embeddings")
    return lambda: RopeScaling(
        "llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=original,
    )


def _window(
    entries: Settings, family: LlamaFamily, num_layers: Any
) -> tuple[int | None, tuple[bool, ...] | None]:
    """Sliding window and the layers it holds for, as each family states them."""
    if family == "mistral":
        # An explicit null switches the window off; only its absence means 4096.
        window = entries.take("sliding_window", None)
        return (window if entries.has("sliding_window") else 4096), None
    if family not in ("qwen2", "qwen3"):
        return None, None
    used = entries.take("use_sliding_window", False)
    window = entries.take("sliding_window", 4096 if not entries.has("sliding_window") else None)
    first = entries.take("max_window_layers", 28)
    kinds = entries.take("layer_types", None)
    if not isinstance(num_layers, int) or not isinstance(first, int):
        return None, None  # reported where the fields are checked
    window = window if used else None
    if kinds is None:
        slides = [window is not None and layer >= first for layer in range(num_layers)]
    else:
        strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if strange or len(kinds) != num_layers:
            entries.faults.append(
                f"'layer_types' is {kinds!r}. It must say 'full_attention' or 'sliding_attention' "
                f"for each of the {num_layers} layers."
            )
        slides = [kind == "sliding_attention" for kind in kinds]
    if not any(slides):
        return None, None
    if window is None:
        entries.faults.append(
            "'layer_types' has sliding layers, but there is no 'sliding_window' in use. Set "
            "'use_sliding_window' and 'sliding_window', or make all layers 'full_attention'."
        )
        return None, None
    return window, None if all(slides) else tuple(slides)
