"""How each format is written: its tensors, its description, and what does not fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._awq import pack_awq, unfit_awq
from jaxweights.checkpoint.exchange._bitsandbytes import (
    pack_bitsandbytes,
    unfit_bitsandbytes,
)
from jaxweights.checkpoint.exchange._bitsandbytes import settings as bitsandbytes_settings
from jaxweights.checkpoint.exchange._compressed_writer import (
    compressed_settings,
    pack_compressed,
    unfit_compressed,
)
from jaxweights.checkpoint.exchange._gptq import group_setting, pack_gptq, unfit_gptq
from jaxweights.checkpoint.exchange._module import Weights


@dataclasses.dataclass(frozen=True)
class Writer:
    """How one format is written.

    Args:
      unfit: Why a weight cannot be written, if it cannot.
      pack: The tensors of a weight.
      settings: `quantization_config` of all weights and the names of the modules left dense.
      uniform: Whether bits and group size must be the same for all.
      says_inputs: Whether the format can say how inputs are rounded.
      equal_groups: Whether weights whose last group is shorter are written in smaller groups.
    """

    unfit: Callable[[Any], list[str]]
    pack: Callable[[Any], Mapping[str, LazyTensor]]
    settings: Callable[[Weights, list[str]], dict[str, Any]]
    uniform: bool
    says_inputs: bool = False
    equal_groups: bool = False


def common_group(weights: Weights) -> int | None:
    """`group_size` of all weights, None if there is none.

    An output that has one group serves any size that is not smaller than its inputs.
    """
    sizes = {group_setting(weight) for weight in weights.values()} - {-1}
    if not sizes:
        return -1
    size = max(sizes)
    single = (w.in_dim for w in weights.values() if group_setting(w) == -1)
    return size if len(sizes) == 1 and all(n <= size for n in single) else None


def _gptq_settings(version: int, weights: Weights, dense: list[str]) -> dict[str, Any]:
    first = next(iter(weights.values()))
    settings = {
        "quant_method": "gptq",
        "bits": first.bits,
        "group_size": common_group(weights),
        "desc_act": any(w.group_index is not None for w in weights.values()),
        "sym": all(w.zero_point is None for w in weights.values()),
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "lm_head": "lm_head" in weights,
    }
    if set(dense) - {"lm_head"}:
        inner = {_within_block(name): None for name in weights}  # a set that keeps its order
        settings["modules_in_block_to_quantize"] = [[name] for name in inner]
    return settings


def _within_block(module: str) -> str:
    """A module's name behind its layer's number: `self_attn.q_proj`."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else module


def _awq_settings(weights: Weights, dense: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": common_group(weights),
        "zero_point": True,
        "version": "gemm",
        # Readers leave the head dense by themselves.
        "modules_to_not_convert": [name for name in dense if name != "lm_head"] or None,
    }


def _gptq_writer(version: int) -> Writer:
    return Writer(
        unfit=lambda weight: unfit_gptq(weight, version=version),
        pack=lambda weight: pack_gptq(weight, version=version),
        settings=lambda weights, dense: _gptq_settings(version, weights, dense),
        uniform=True,
    )


WRITERS: dict[str, Writer] = {
    "gptq": _gptq_writer(1),
    "gptq_v2": _gptq_writer(2),
    "awq": Writer(unfit_awq, pack_awq, _awq_settings, uniform=True),
    "compressed-tensors": Writer(
        unfit_compressed,
        pack_compressed,
        compressed_settings,
        uniform=False,
        says_inputs=True,
        equal_groups=True,
    ),
    "bitsandbytes": Writer(
        unfit_bitsandbytes, pack_bitsandbytes, bitsandbytes_settings, uniform=False
    ),
}
