"""A decoder whose MLPs are mixtures of experts, as the Mixtral checkpoint that other tools run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.models._convert import checkpoint_from_params
from jaxweights.models._hf_json import config_to_dict
from jaxweights.models._llama_config import LlamaConfig

_ASKER = "models.mixtral_checkpoint"
_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}


def mixtral_checkpoint(
    params: Any, config: LlamaConfig, *, experts_per_token: int = 2
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Takes the parameters that `merge.upcycle` gives of a `Llama` apart into Mixtral's tensors.

    Args:
      params: With `layers/mlp/experts/gate|up|down/kernel` `(layers, experts, in, out)` and
        `layers/mlp/router/kernel` `(layers, in, experts)`.
      config: Of the dense model.
      experts_per_token: How many experts are chosen for a token.

    Returns:
      Arrays by name, and the `config.json`: what `write_safetensors` needs.

    Raises:
      ValueError: If Mixtral's architecture lacks something of the model, or there are fewer experts
        than are chosen.

    Example:
      >>> import jax, jax.numpy as jnp, jaxweights as jw
      >>> config = LlamaConfig(
      ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2
      ... )
      >>> tokens = jnp.zeros((1, 4), jnp.int32)
      >>> params = jw.models.build(config).init(jax.random.key(0), tokens)["params"]
      >>> routers = jnp.zeros((1, 32, 4))
      >>> sparse = jw.merge.upcycle(params, 4 * [params], mlps="layers/mlp", routers=routers)
      >>> tensors, settings = mixtral_checkpoint(sparse, config)
      >>> tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"].shape
      (64, 32)

    Source: Jiang et al. 2024, arXiv:2401.04088.
    """
    lacks = {
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "qk_norm": config.qk_norm,
        "norm_position='post'": config.norm_position == "post",
        "sliding_layers": config.sliding_layers is not None,
    }
    if any(lacks.values()):
        raise ValueError(
            f"{_ASKER}: the model has {', '.join(k for k, v in lacks.items() if v)}, which Mixtral "
            "has not. Upcycle a Llama or Mistral model."
        )
    layers = params.get("layers", {}) if isinstance(params, Mapping) else {}
    mlp = dict(layers.get("mlp", {}))
    if set(mlp) != {"experts", "router"}:
        raise ValueError(
            f"{_ASKER}: 'layers/mlp' has {sorted(mlp)}, not 'experts' and 'router'. Pass what "
            "merge.upcycle(..., mlps='layers/mlp') gives."
        )
    router = np.asarray(mlp["router"]["kernel"])
    count = router.shape[-1]
    if not 1 <= experts_per_token <= count:
        raise ValueError(
            f"{_ASKER}: experts_per_token={experts_per_token} must lie in 1 to {count}, the number "
            "of experts."
        )
    experts = {name: np.asarray(mlp["experts"][name]["kernel"]) for name in _NAMES}
    first = {name: {"kernel": kernel[:, 0]} for name, kernel in experts.items()}
    dense = {**params, "layers": {**layers, "mlp": first}}
    tensors = {
        name: array
        for name, array in checkpoint_from_params(dense, config).items()
        if ".mlp." not in name
    }
    for layer in range(config.num_layers):
        place = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{place}.gate.weight"] = np.ascontiguousarray(router[layer].T)
        for name, theirs in _NAMES.items():
            for i in range(count):
                kernel = experts[name][layer, i]
                tensors[f"{place}.experts.{i}.{theirs}.weight"] = np.ascontiguousarray(kernel.T)
    settings = config_to_dict(config) | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": count,
        "num_experts_per_tok": experts_per_token,
    }
    return tensors, settings
