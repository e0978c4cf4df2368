"""Which architectures are known, and how a checkpoint's config becomes a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax.typing import DTypeLike

from jaxweights.core._paths import nearest
from jaxweights.models._bert import Bert, BertConfig
from jaxweights.models._gguf_config import bert_from_gguf, llama_from_gguf
from jaxweights.models._hf_config import bert_from_dict, llama_from_dict
from jaxweights.models._llama import Llama
from jaxweights.models._llama_config import LlamaConfig

ModelConfig = LlamaConfig | BertConfig

_FROM_DICT: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "llama": functools.partial(llama_from_dict, family="llama"),
    "mistral": functools.partial(llama_from_dict, family="mistral"),
    "qwen2": functools.partial(llama_from_dict, family="qwen2"),
    "qwen3": functools.partial(llama_from_dict, family="qwen3"),
    "olmo2": functools.partial(llama_from_dict, family="olmo2"),
    "bert": bert_from_dict,
}
_FROM_GGUF: dict[str, Callable[..., ModelConfig]] = {
    "llama": functools.partial(llama_from_gguf, family="llama"),
    "qwen2": functools.partial(llama_from_gguf, family="qwen2"),
    "qwen3": functools.partial(llama_from_gguf, family="qwen3"),
    "olmo2": functools.partial(llama_from_gguf, family="olmo2"),
    "bert": bert_from_gguf,
}


def config_from_dict(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      config: Its contents. The architecture is `model_type`, or read off `architectures`.

    Returns:
      A `LlamaConfig` or a `BertConfig`.

    Raises:
      ValueError: If the architecture is unknown, an entry is missing, or one is set that changes
        what the model computes in a way that is not supported; all such entries are listed.

    Example:
      >>> config_from_dict({
      ...     "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
      ...     "num_hidden_layers": 2, "num_attention_heads": 4, "rope_theta": 500000.0,
      ... }).rope_theta
      500000.0
    """
    name = config.get("model_type") or _from_class_name(config.get("architectures"))
    return _known("models.config_from_dict", name, _FROM_DICT)(config)


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Reads the metadata of a GGUF file.

    Args:
      metadata: Keys and values, among them `general.architecture`.
      tensors: The file's tensors by name. GGUF says only by a tensor's presence whether there are
        biases, a head of its own, and changed rotary frequencies. None means: none of them, but
        for the biases that Qwen2 always has.

    Returns:
      A `LlamaConfig` or a `BertConfig`.

    Raises:
      ValueError: As for `config_from_dict`.

    Example:
      >>> config_from_gguf({
      ...     "general.architecture": "llama", "llama.vocab_size": 256, "llama.block_count": 2,
      ...     "llama.embedding_length": 64, "llama.feed_forward_length": 128,
      ...     "llama.attention.head_count": 4, "llama.attention.layer_norm_rms_epsilon": 1e-5,
      ...     "llama.context_length": 512,
      ... }).norm_eps
      1e-05
    """
    name = metadata.get("general.architecture")
    read = _known("models.config_from_gguf", name, _FROM_GGUF)
    return read(metadata, tensors=tensors or {})


def build(
    config: ModelConfig, *, dtype: DTypeLike | None = None, remat: bool = False
) -> Llama | Bert:
    """Makes the model of a config.

    Args:
      config: From `config_from_dict`, `config_from_gguf` or written by hand.
      dtype: Dtype of activations; None takes that of the embedding.
      remat: Whether the backward pass computes activations again instead of keeping them.

    Returns:
      A Flax module; it holds no parameters.

    Raises:
      TypeError: If the config is of no known kind.

    Example:
      >>> build(BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... )).__class__.__name__
      'Bert'
    """
    if isinstance(config, LlamaConfig):
        return Llama(config, dtype=dtype, remat=remat)
    if isinstance(config, BertConfig):
        return Bert(config, dtype=dtype, remat=remat)
    raise TypeError(
        f"models.build: config is a {type(config).__name__}. Give a LlamaConfig or a BertConfig, "
        "for instance from config_from_dict."
    )


def _from_class_name(architectures: Any) -> str | None:
    """The model type that a class name like "Qwen2ForCausalLM" begins with."""
    for name in architectures or ():
        for suffix in ("ForCausalLM", "ForMaskedLM", "ForPreTraining", "Model"):
            if isinstance(name, str) and name.endswith(suffix):
                return name.removesuffix(suffix).lower()
    return None


def _known(asker: str, name: Any, readers: Mapping[str, Any]) -> Any:
    if name in readers:
        return readers[name]
    known = ", ".join(sorted(readers))
    if not isinstance(name, str):
        raise ValueError(
            f"{asker}: the config names no architecture (model_type={name!r}). Known: {known}."
        )
    raise ValueError(
        f"{asker}: architecture {name!r} is unknown. Known: {known}. "
        f"Nearest: {nearest(name, readers, count=1)[0]}."
    )
