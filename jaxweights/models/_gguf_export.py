"""Writes a decoder as GGUF: its tensors, its configuration and its tokenizer as metadata."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxweights.models._arrange import write_tree
from jaxweights.models._bert import BertConfig
from jaxweights.models._convert import name_map
from jaxweights.models._llama_config import LlamaConfig
from jaxweights.models._registry import config_from_gguf
from jaxweights.models._rope import rope_frequencies
from jaxweights.models._tokenizer import known_cuts
from jaxweights.weights._weight import is_weight

if TYPE_CHECKING:
    from jaxweights.checkpoint._write_gguf import GGUFTensor

_ASKER = "models.export_checkpoint"
# `general.file_type` of llama.cpp: what most of the matrices are.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
_FILE_TYPES |= {"BF16": 32}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def write_gguf_model(
    destination: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    config: LlamaConfig,
    *,
    metadata: Mapping[str, Any] | None,
    files: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Writes a file, or a folder with `model.gguf`; see `export_checkpoint`."""
    from jaxweights.checkpoint import atomic_directory
    from jaxweights.checkpoint._write_gguf import plan_gguf, write_planned

    plans = plan_gguf(tensors)
    pairs = dict(metadata) if metadata else tokenizer_metadata(files, config.vocab_size)
    if not metadata or _says_other(pairs, tensors, config):
        pairs = {**gguf_metadata(config), **pairs} | gguf_metadata(config)
    if other := _says_other(pairs, tensors, config):
        raise ValueError(
            f"{_ASKER}: GGUF cannot say of a {config.family!r} that {', '.join(other)}. Write "
            "safetensors."
        )
    pairs["general.file_type"] = _file_type(plans)
    destination = Path(destination)
    if destination.suffix == ".gguf":
        write_planned(destination, plans, pairs, kinds=_KINDS, overwrite=overwrite)
        return
    with atomic_directory(destination, overwrite=overwrite) as folder:
        write_planned(folder / "model.gguf", plans, pairs, kinds=_KINDS)


def gguf_tensors(params: Any, config: LlamaConfig | BertConfig) -> dict[str, Any]:
    """The tensors of a file, by the names and in the orientation that GGUF has."""
    refuse_other_family(config)
    assert isinstance(config, LlamaConfig)
    tensors = write_tree(params, name_map(config, "gguf"), asker=_ASKER, represented=True)
    return {name: as_ggml_reads(t) for name, t in tensors.items()} | rope_divisors(config)


def refuse_other_family(config: LlamaConfig | BertConfig) -> None:
    """Refuses models that GGUF is not written for."""
    if isinstance(config, BertConfig):
        raise ValueError(
            f"{_ASKER}: GGUF is written for the Llama family, and this is a BERT. Write "
            "safetensors, and convert them with llama.cpp."
        )


def _says_other(
    pairs: Mapping[str, Any], tensors: Mapping[str, Any], config: LlamaConfig
) -> list[str]:
    """What a reader would take for something else than the config says."""
    try:
        again = config_from_gguf(pairs, tensors)
    except ValueError as error:
        return [str(error)]
    # Mistral is a Llama there, and frequencies may come as their divisors.
    skipped = {"family", *({"rope_scaling"} if "rope_freqs.weight" in tensors else ())}
    return [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in skipped and getattr(again, field.name) != getattr(config, field.name)
    ]


# Keys that readers want in a type other than the value's own.
_KINDS = {"tokenizer.ggml.token_type": (9, 5), "tokenizer.ggml.scores": (9, 6)}


def as_ggml_reads(tensor: Any) -> Any:
    """Vectors in float32, as ggml's kernels want them."""
    if is_weight(tensor) or tensor.ndim > 1:
        return tensor
    return np.asarray(tensor, np.float32)


def _file_type(plans: list[GGUFTensor]) -> int:
    """What most of the entries of matrices are stored as."""
    kinds = Counter()
    for plan in plans:
        if len(plan.shape) > 1:
            kinds[plan.kind if plan.kind in _FILE_TYPES else "F32"] += math.prod(plan.shape)
    return _FILE_TYPES[kinds.most_common(1)[0][0]] if kinds else 0


def gguf_metadata(config: LlamaConfig) -> dict[str, Any]:
    """The metadata from which `config_from_gguf` and llama.cpp read a decoder's config.

    Args:
      config: Of a model of the Llama family; Mistral is written as the architecture `llama`.

    Raises:
      ValueError: If GGUF cannot say what the config says.

    Example:
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4
      ... )
      >>> gguf_metadata(config)["llama.attention.head_count_kv"]
      4
    """
    if config.sliding_layers is not None:
        raise ValueError(
            f"{_ASKER}: some layers have a sliding window and others none, which GGUF cannot say "
            f"of {config.family!r}. Write safetensors."
        )
    name = "llama" if config.family == "mistral" else config.family
    scaling = config.rope_scaling
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    if scaling is not None and scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor or 1)}
    architecture = {"general.architecture": name, "general.type": "model"}
    return architecture | {f"{name}.{key}": value for key, value in values.items()}


def rope_divisors(config: LlamaConfig) -> dict[str, np.ndarray]:
    """`rope_freqs.weight`, the divisors by which GGUF states all but linear scaling."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return {}
    plain = np.asarray(rope_frequencies(config.head_dim, config.rope_theta))
    scaled = np.asarray(rope_frequencies(config.head_dim, config.rope_theta, scaling))
    return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}


def tokenizer_metadata(files: Mapping[str, Any], vocab_size: int = 0) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json as GGUF metadata; empty where there is no tokenizer.

    Args:
      files: `tokenizer.json` and perhaps `tokenizer_config.json`: text or paths.
      vocab_size: Rows of the embedding, which llama.cpp wants to be as many as there are tokens:
        unused ones stand for those that the tokenizer lacks.

    Raises:
      ValueError: If the tokenizer is of another kind.
    """
    if "tokenizer.json" not in files:
        return {}
    content = _json(files["tokenizer.json"])
    model = content.get("model", {})
    cut = _name_of_cut(content.get("pre_tokenizer"))
    if model.get("type") != "BPE" or cut is None:
        raise ValueError(
            f"{_ASKER}: the tokenizer is a {model.get('type')!r} of a kind that GGUF metadata are "
            "not made for; byte-level BPE as of GPT-2, SmolLM, Llama 3 and Qwen2 is. Convert the "
            "checkpoint as safetensors with llama.cpp, or leave tokenizer.json out of its folder."
        )
    by_index = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(by_index, _NORMAL)
    for token in content.get("added_tokens", ()):
        by_index[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    count = max(vocab_size, max(by_index) + 1)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": [by_index.get(i, f"[PAD{i}]") for i in range(count)],
        "tokenizer.ggml.token_type": [kinds.get(i, _UNUSED) for i in range(count)],
        "tokenizer.ggml.merges": merges,
    }
    return found | _named_tokens(files, {token: i for i, token in by_index.items()})


def _named_tokens(files: Mapping[str, Any], indices: Mapping[str, int]) -> dict[str, Any]:
    if "tokenizer_config.json" not in files:
        return {}
    config = _json(files["tokenizer_config.json"])
    found: dict[str, Any] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = config.get(f"{ours}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in indices:
            found[f"tokenizer.ggml.{theirs}_token_id"] = indices[token]
    for end in ("bos", "eos"):
        if isinstance(config.get(f"add_{end}_token"), bool):
            found[f"tokenizer.ggml.add_{end}_token"] = config[f"add_{end}_token"]
    if isinstance(config.get("chat_template"), str):
        found["tokenizer.chat_template"] = config["chat_template"]
    return found


def _name_of_cut(pre_tokenizer: Any) -> str | None:
    """GGUF's name of a way to cut text, told by trying the known ones."""
    for name, make in known_cuts().items():
        if json.loads(make().__getstate__()) == pre_tokenizer:
            return name
    return None


def _json(content: Any) -> dict[str, Any]:
    if isinstance(content, os.PathLike):
        content = Path(content).read_bytes()
    return json.loads(content)
