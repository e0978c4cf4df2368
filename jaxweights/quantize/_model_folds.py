"""The folds of the library's own models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxweights.quantize._folds import Fold

if TYPE_CHECKING:
    from jaxweights.models import BertConfig, LlamaConfig


def llama_folds(config: LlamaConfig, *, one_plus: bool = False) -> tuple[Fold, ...]:
    """The folds of `models.Llama`.

    The norms before attention and MLP into what reads them (not where norms stand behind the
    sublayers), values into the output projection (the query heads of a shared head see one scale),
    `up` into `down`, and the final norm into an untied head.

    Args:
      config: The model's sizes and options.
      one_plus: Whether the norms' gains are stored less one, as Gemma's are.

    Returns:
      The folds, for parameters with stacked layers.

    Example:
      >>> from jaxweights.models import LlamaConfig
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4
      ... )
      >>> [fold.writers.split("/")[-2] for fold in llama_folds(config)]
      ['attn_norm', 'mlp_norm', 'v', 'up', 'final_norm']
    """
    qkv, gated = "layers/attn/(?:q|k|v)/", "layers/mlp/(?:gate|up)/"
    folds = []
    if config.norm_position == "pre":
        qkv_bias = qkv + "bias" if config.qkv_bias else None
        mlp_bias = gated + "bias" if config.mlp_bias else None
        folds = [
            Fold(f"{qkv}kernel", "layers/attn_norm/scale", biases=qkv_bias, one_plus=one_plus),
            Fold(f"{gated}kernel", "layers/mlp_norm/scale", biases=mlp_bias, one_plus=one_plus),
        ]
    queries = config.num_heads // config.num_kv_heads
    folds += [
        Fold(
            "layers/attn/o/kernel",
            "layers/attn/v/kernel",
            shifts="layers/attn/v/bias" if config.qkv_bias else None,
            biases="layers/attn/o/bias" if config.out_bias else None,
            repeat=(queries, config.head_dim) if queries > 1 else None,
        ),
        Fold(
            "layers/mlp/down/kernel",
            "layers/mlp/up/kernel",
            shifts="layers/mlp/up/bias" if config.mlp_bias else None,
            biases="layers/mlp/down/bias" if config.mlp_bias else None,
        ),
    ]
    if not config.tie_embeddings:
        folds.append(Fold("head/kernel", "final_norm/scale", one_plus=one_plus))
    return tuple(folds)


def bert_folds(config: BertConfig) -> tuple[Fold, ...]:
    """The fold of `models.Bert`: values into the output projection.

    What its norms write is also the residual stream, and GELU stands between `up` and `down`, so
    no other scale can be folded.

    Args:
      config: The model's sizes.

    Returns:
      The fold, for parameters with stacked layers.

    Example:
      >>> from jaxweights.models import BertConfig
      >>> config = BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... )
      >>> bert_folds(config)[0].writers
      'layers/attn/v/kernel'
    """
    del config  # the structure is the same for all sizes
    o, v = "layers/attn/o/", "layers/attn/v/"
    return (Fold(f"{o}kernel", f"{v}kernel", shifts=f"{v}bias", biases=f"{o}bias"),)
