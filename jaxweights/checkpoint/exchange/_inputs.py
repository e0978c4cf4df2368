"""How the inputs of a module are rounded as a model runs: what a config and a file say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._module import lazy, without_mask
from jaxweights.weights._microscaling import InputForm, input_block
from jaxweights.weights._quantized_product import QuantizedProduct
from jaxweights.weights._rounded_inputs import RoundedInputs

# Tensors of a module that say how its inputs are rounded, and nothing of its weight.
INPUT_TENSORS = ("input_scale", "input_zero_point", "input_global_scale")


@dataclasses.dataclass(frozen=True)
class InputRounding:
    """How the inputs of a module are rounded.

    Args:
      description: `input_activations` of compressed-tensors.
      parts: Tensors that this needs, by what they are in the module.
    """

    description: Mapping[str, Any]
    parts: Mapping[str, LazyTensor]


def without_inputs(weight: Any) -> tuple[Any, InputRounding | None]:
    """The narrow numbers of a weight that rounds its inputs, and how it does that."""
    take_apart = _PRODUCTS.get(type(weight))
    return (weight, None) if take_apart is None else take_apart(weight)


def _integers(weight: QuantizedProduct) -> tuple[Any, InputRounding]:
    return weight.weight_only(), _described("int", weight.input_bits, weight.input_scale)


def _floats(weight: RoundedInputs) -> tuple[Any, InputRounding]:
    plain = without_mask(weight.weight_only())
    if weight.form is not None:
        return plain, _blocks(weight.form, weight.input_scale)
    return plain, _described("float", 8, weight.input_scale, weight.group_size)


def _blocks(form: InputForm, overall: Any) -> InputRounding:
    """Of a microscaling format, whose blocks find their scales as the model runs."""
    nvidia = form == "nvfp4"
    description = {
        "num_bits": int(form[-1]),
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if nvidia else "group",
        "group_size": input_block(form),
        "dynamic": "local" if nvidia else True,
        "scale_dtype": "torch.float8_e4m3fn" if nvidia else "torch.uint8",
    }
    if not nvidia:
        return InputRounding(description, {})
    scale = lazy((1,), np.float32, lambda: np.asarray(overall, np.float32).reshape(1))
    return InputRounding(description, {"input_global_scale": scale})


_PRODUCTS: dict[type, Callable[[Any], tuple[Any, InputRounding]]] = {
    QuantizedProduct: _integers,
    RoundedInputs: _floats,
}


def _described(kind: str, bits: int, step: Any, group_size: int | None = None) -> InputRounding:
    """Of symmetric inputs, with a step of its own for every token where none is given.

    Args:
      kind: "int" or "float".
      bits: Of each number.
      step: The step of all inputs, or None.
      group_size: Inputs of a token that share a step, or None.
    """
    strategy = "group" if group_size is not None else "token" if step is None else "tensor"
    description: dict[str, Any] = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": step is None,
    }
    if group_size is not None:
        description["group_size"] = group_size
    if step is None:
        return InputRounding(description, {})
    scale = lazy((1,), np.float32, lambda: np.asarray(step, np.float32).reshape(1))
    return InputRounding(description, {"input_scale": scale})
