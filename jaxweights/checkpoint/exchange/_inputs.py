"""How the inputs of a module are rounded as a model runs: what a config and a file say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._module import lazy
from jaxweights.weights._quantized_product import QuantizedProduct

# Tensors of a module that say how its inputs are rounded, and nothing of its weight.
INPUT_TENSORS = ("input_scale", "input_zero_point", "input_global_scale")


@dataclasses.dataclass(frozen=True)
class RoundedInputs:
    """How the inputs of a module are rounded.

    Args:
      description: `input_activations` of compressed-tensors.
      parts: Tensors that this needs, by what they are in the module.
    """

    description: Mapping[str, Any]
    parts: Mapping[str, LazyTensor]


def without_inputs(weight: Any) -> tuple[Any, RoundedInputs | None]:
    """The narrow numbers of a weight that rounds its inputs, and how it does that."""
    take_apart = _PRODUCTS.get(type(weight))
    return (weight, None) if take_apart is None else take_apart(weight)


def _integers(weight: QuantizedProduct) -> tuple[Any, RoundedInputs]:
    return weight.weight_only(), _described("int", weight.input_bits, weight.input_scale)


_PRODUCTS: dict[type, Callable[[Any], tuple[Any, RoundedInputs]]] = {QuantizedProduct: _integers}


def _described(kind: str, bits: int, step: Any) -> RoundedInputs:
    """Of symmetric inputs, with a step of its own for every token where none is given."""
    description = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "token" if step is None else "tensor",
        "dynamic": step is None,
    }
    if step is None:
        return RoundedInputs(description, {})
    scale = lazy((1,), np.float32, lambda: np.asarray(step, np.float32).reshape(1))
    return RoundedInputs(description, {"input_scale": scale})
