"""Names of the Llama family's tensors in Hugging Face and in GGUF checkpoints."""

from __future__ import annotations

from jaxweights.models._llama_config import LlamaConfig
from jaxweights.models._names import Convention, NameMap, TensorRule

# Path in the tree, module in safetensors, module in GGUF.
_LINEAR = (
    ("attn/q", "self_attn.q_proj", "attn_q"),
    ("attn/k", "self_attn.k_proj", "attn_k"),
    ("attn/v", "self_attn.v_proj", "attn_v"),
    ("attn/o", "self_attn.o_proj", "attn_output"),
    ("mlp/gate", "mlp.gate_proj", "ffn_gate"),
    ("mlp/up", "mlp.up_proj", "ffn_up"),
    ("mlp/down", "mlp.down_proj", "ffn_down"),
)
_PRE_NORMS = (
    ("attn_norm", "input_layernorm", "attn_norm"),
    ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
)
_POST_NORMS = (
    ("attn_post_norm", "post_attention_layernorm", "post_attention_norm"),
    ("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
)
_QK_NORMS = (
    ("attn/q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("attn/k_norm", "self_attn.k_norm", "attn_k_norm"),
)
# Families whose GGUF files store query and key features as interleaved rotary pairs.
_INTERLEAVED = ("llama", "mistral")


def llama_names(config: LlamaConfig, convention: Convention) -> NameMap:
    """The map between a Llama-family checkpoint and its tree.

    Args:
      config: Of the decoder.
      convention: "huggingface" (safetensors) or "gguf".

    Returns:
      A rule for every leaf.

    Example:
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4
      ... )
      >>> llama_names(config, "huggingface").rules[0].name
      'embed_tokens.weight'
    """
    gguf = convention == "gguf"
    layer = "blk.{layer}" if gguf else "layers.{layer}"
    table = (config.vocab_size, config.hidden_size)
    rules = [
        TensorRule("embed/embedding", f"{'token_embd' if gguf else 'embed_tokens'}.weight", table),
        TensorRule("final_norm/scale", f"{'output_norm' if gguf else 'norm'}.weight", table[1:]),
    ]
    head = "output.weight" if gguf else "lm_head.weight"
    if not config.tie_embeddings:
        rules.append(TensorRule("head/kernel", head, table[::-1], transpose=True))
    sizes = _sizes(config)
    for path, theirs, short in _LINEAR:
        name = f"{layer}.{short if gguf else theirs}"
        swapped = gguf and config.family in _INTERLEAVED and path in ("attn/q", "attn/k")
        heads = {"attn/q": config.num_heads, "attn/k": config.num_kv_heads}[path] if swapped else 0
        rules.append(
            TensorRule(f"layers/{path}/kernel", f"{name}.weight", sizes[path], True, heads)
        )
        if _has_bias(config, path):
            width = sizes[path][1:]
            rules.append(TensorRule(f"layers/{path}/bias", f"{name}.bias", width, False, heads))
    norms = _PRE_NORMS if config.norm_position == "pre" else _POST_NORMS
    for path, theirs, short in (*norms, *(_QK_NORMS if config.qk_norm else ())):
        width = sizes[path.removesuffix("_norm")][1:] if "/" in path else table[1:]
        width = (config.head_dim,) if "/" in path and config.qk_norm == "head" else width
        name = f"{layer}.{short if gguf else theirs}.weight"
        rules.append(TensorRule(f"layers/{path}/scale", name, width))
    return NameMap(
        rules=tuple(rules),
        num_layers=config.num_layers,
        prefix="" if gguf else "model.",
        writes_prefix=not gguf,
        carried=(r"rope_freqs\.weight",) if gguf else (r".*rotary_emb\.inv_freq",),
        tied_head=(head, "embed/embedding") if config.tie_embeddings else None,
        layer_pattern=r"blk\.(\d+)\." if gguf else r"layers\.(\d+)\.",
    )


def _sizes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every projection."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_heads * config.head_dim
    key = config.num_kv_heads * config.head_dim
    return {
        "attn/q": (hidden, query),
        "attn/k": (hidden, key),
        "attn/v": (hidden, key),
        "attn/o": (query, hidden),
        "mlp/gate": (hidden, inner),
        "mlp/up": (hidden, inner),
        "mlp/down": (inner, hidden),
    }


def _has_bias(config: LlamaConfig, path: str) -> bool:
    if path.startswith("mlp"):
        return config.mlp_bias
    return config.out_bias if path == "attn/o" else config.qkv_bias
