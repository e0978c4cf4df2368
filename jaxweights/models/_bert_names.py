"""Names of BERT's tensors in Hugging Face and in GGUF checkpoints."""

from __future__ import annotations

from jaxweights.models._bert import BertConfig
from jaxweights.models._names import Convention, NameMap, TensorRule

# Path in the tree, module in safetensors, module in GGUF.
_TABLES = (
    ("word", "word_embeddings", "token_embd"),
    ("position", "position_embeddings", "position_embd"),
    ("type", "token_type_embeddings", "token_types"),
)
_LINEAR = (
    ("attn/q", "attention.self.query", "attn_q"),
    ("attn/k", "attention.self.key", "attn_k"),
    ("attn/v", "attention.self.value", "attn_v"),
    ("attn/o", "attention.output.dense", "attn_output"),
    ("mlp/up", "intermediate.dense", "ffn_up"),
    ("mlp/down", "output.dense", "ffn_down"),
)
_NORMS = (
    ("attn_norm", "attention.output.LayerNorm", "attn_output_norm"),
    ("mlp_norm", "output.LayerNorm", "layer_output_norm"),
)


def bert_names(config: BertConfig, convention: Convention) -> NameMap:
    """The map between a BERT checkpoint and its tree.

    Args:
      config: Of the encoder.
      convention: "huggingface" (safetensors) or "gguf".

    Returns:
      A rule for every leaf. Pooler and pre-training heads are carried, not used.

    Example:
      >>> config = BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... )
      >>> bert_names(config, "huggingface").rules[0].name
      'embeddings.word_embeddings.weight'
    """
    gguf = convention == "gguf"
    hidden, inner = config.hidden_size, config.intermediate_size
    rows = (config.vocab_size, config.max_positions, config.type_vocab_size)
    rules = []
    for (path, theirs, short), count in zip(_TABLES, rows, strict=True):
        name = f"{short if gguf else f'embeddings.{theirs}'}.weight"
        rules.append(TensorRule(f"embed/{path}/embedding", name, (count, hidden)))
    rules += _norm("embed/norm", "token_embd_norm" if gguf else "embeddings.LayerNorm", hidden)
    layer = "blk.{layer}" if gguf else "encoder.layer.{layer}"
    for path, theirs, short in _LINEAR:
        name = f"{layer}.{short if gguf else theirs}"
        size = {"mlp/up": (hidden, inner), "mlp/down": (inner, hidden)}.get(path, (hidden, hidden))
        rules.append(TensorRule(f"layers/{path}/kernel", f"{name}.weight", size, True))
        rules.append(TensorRule(f"layers/{path}/bias", f"{name}.bias", size[1:]))
    for path, theirs, short in _NORMS:
        rules += _norm(f"layers/{path}", f"{layer}.{short if gguf else theirs}", hidden)
    return NameMap(
        rules=tuple(rules),
        num_layers=config.num_layers,
        prefix="" if gguf else "bert.",
        carried=() if gguf else (r"embeddings\.position_ids", r"pooler\..*", r"cls\..*"),
        layer_pattern=r"blk\.(\d+)\." if gguf else r"layer\.(\d+)\.",
    )


def _norm(path: str, name: str, width: int) -> list[TensorRule]:
    return [
        TensorRule(f"{path}/scale", f"{name}.weight", (width,)),
        TensorRule(f"{path}/bias", f"{name}.bias", (width,)),
    ]
