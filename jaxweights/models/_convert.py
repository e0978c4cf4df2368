"""Checkpoint tensors to parameters and back, for every architecture that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxweights.models._arrange import read_tree, write_tree
from jaxweights.models._bert import BertConfig
from jaxweights.models._bert_names import bert_names
from jaxweights.models._llama_config import LlamaConfig
from jaxweights.models._llama_names import llama_names
from jaxweights.models._names import Convention, NameMap, tree_shapes


def params_from_checkpoint(
    tensors: Mapping[str, Any],
    config: LlamaConfig | BertConfig,
    *,
    convention: Convention | None = None,
) -> dict[str, Any]:
    """Arranges a checkpoint's tensors as the model's parameters.

    Torch's (out, in) matrices become (in, out) kernels, the layers' tensors are stacked, GGUF's
    interleaved rotary features are put back in order. Nothing is rounded.

    Args:
      tensors: By name; arrays, or anything with `shape` and `read()`, which is read once.
      config: Of the model.
      convention: "huggingface" or "gguf"; None tells it by the names.

    Returns:
      A nested dict of NumPy arrays in the checkpoint's dtypes.

    Raises:
      ValueError: If a tensor is missing, unexpected or misshapen; every one is listed.

    Example:
      >>> config = BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... )
      >>> params_from_checkpoint({}, config)
      Traceback (most recent call last):
        ...
      ValueError: models.params_from_checkpoint: layer 0 is missing: ...
    """
    names = name_map(config, convention or tell_convention(tensors))
    return read_tree(tensors, names, asker="models.params_from_checkpoint")


def checkpoint_from_params(
    params: Any,
    config: LlamaConfig | BertConfig,
    *,
    convention: Convention = "huggingface",
) -> dict[str, np.ndarray]:
    """Takes parameters apart into the tensors that other tools read.

    Args:
      params: The model's parameters, dense.
      config: Of the model.
      convention: Whose names and orientations to write, "huggingface" or "gguf".

    Returns:
      Arrays by name: the exact inverse of `params_from_checkpoint`, bit for bit. A tied head is
      not repeated.

    Raises:
      TypeError: If a leaf is no dense array; every one is listed.
      ValueError: If a leaf is missing, unexpected or misshapen; every one is listed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxweights as jw
      >>> config = LlamaConfig(
      ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2
      ... )
      >>> tokens = jnp.zeros((1, 4), jnp.int32)
      >>> params = jw.models.build(config).init(jax.random.key(0), tokens)["params"]
      >>> checkpoint_from_params(params, config)["model.layers.0.mlp.up_proj.weight"].shape
      (64, 32)
    """
    return write_tree(params, name_map(config, convention), asker="models.checkpoint_from_params")


def param_shapes(config: LlamaConfig | BertConfig) -> dict[str, tuple[int, ...]]:
    """Lists the shape of every parameter by path, without making any.

    Args:
      config: Of the model.

    Returns:
      Shapes by path, as `params_from_checkpoint` arranges them.

    Example:
      >>> config = BertConfig(
      ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4
      ... )
      >>> param_shapes(config)["layers/mlp/up/kernel"]
      (2, 32, 64)
    """
    return tree_shapes(name_map(config, "huggingface"))


def name_map(config: LlamaConfig | BertConfig, convention: Convention) -> NameMap:
    """The map of names for a config."""
    if convention not in ("huggingface", "gguf"):
        raise ValueError(
            f"models.name_map: convention={convention!r} must be 'huggingface' or 'gguf'."
        )
    if isinstance(config, BertConfig):
        return bert_names(config, convention)
    return llama_names(config, convention)


def tell_convention(names: Iterable[str]) -> Convention:
    """Whose names these are."""
    is_gguf = any(name.startswith(("blk.", "token_embd")) for name in names)
    return "gguf" if is_gguf else "huggingface"
