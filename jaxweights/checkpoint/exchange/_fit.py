"""Which represented weights a format can hold, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxweights.checkpoint.exchange._gptq import group_setting
from jaxweights.checkpoint.exchange._inputs import InputRounding
from jaxweights.checkpoint.exchange._module import Represented, Weights
from jaxweights.checkpoint.exchange._narrow_floats import is_nvfp4
from jaxweights.checkpoint.exchange._writers import Writer, common_group
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._quantized import Quantized

# What vLLM puts together into one module.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def misfits(
    name: str,
    given: Any,
    weight: Any,
    inputs: InputRounding | None,
    writer: Writer,
    form: str,
    target: str | None,
) -> list[str]:
    """Why a represented weight cannot be written.

    Args:
      name: Its tensor's name.
      given: The weight.
      weight: Its narrow numbers.
      inputs: How it rounds its inputs, if it does.
      writer: Of the format.
      form: The format.
      target: As in `write_quantized`.
    """
    if inputs is not None and not writer.says_inputs:
        return [
            f"is a {type(given).__name__}, whose inputs are rounded too, which {form} cannot say. "
            "Write compressed-tensors, or `weight_only()` of it to leave them as they are"
        ]
    if not isinstance(weight, Represented):
        return [
            f"is a {type(weight).__name__}, and {form} holds only narrow numbers with scales. "
            "Merge factors and masks into the weight, or save with Orbax"
        ]
    is_integer = isinstance(weight, Quantized)
    if writer.uniform and not is_integer:
        return [
            f"is a {type(weight).__name__}, and {form} holds only integers. Quantize with "
            "round_to_nearest, gptq or awq, or write bitsandbytes (which holds NF4 and FP4) or "
            "compressed-tensors (FP8, NVFP4, MXFP4, MXFP6 and MXFP8)"
        ]
    faults = list(writer.unfit(weight))
    if not name.endswith(".weight") or weight.view.axes.kind != "linear":
        faults.append(
            f"is an {weight.view.axes.kind}, and readers of {form} know only linear modules. "
            "Leave it out with `partition`, or dequantize it with `materialize`"
        )
    if target == "vllm" and inputs is not None:
        faults += _unfit_product(weight, inputs)
    elif target == "vllm" and is_integer:
        faults += _unfit_marlin(weight)
    return faults


def unlike_grids(weights: Weights, form: str) -> list[str]:
    """How the grids of weights differ in a format that has one for all."""
    if len({weight.bits for weight in weights.values()}) <= 1 and common_group(weights) is not None:
        return []
    kinds: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        kinds.setdefault((weight.bits, group_setting(weight)), []).append(name)
    listed = "; ".join(
        f"bits={bits}, group_size={group}: {len(names)} such as {names[0]!r}"
        for (bits, group), names in kinds.items()
    )
    return [
        f"{form} has one grid for all modules, but these differ ({listed}). Quantize all alike, "
        "or write compressed-tensors, which has a grid a module."
    ]


def unlike_global_scales(scales: Mapping[str, float]) -> list[str]:
    """Which modules of NVFP4 that vLLM multiplies at once differ in their global scales.

    Args:
      scales: Global scales, by the names of weights.
    """
    together: dict[tuple[str, str], dict[str, float]] = {}
    for name, scale in scales.items():
        parent, _, module = name.removesuffix(".weight").rpartition(".")
        for first, *others in _FUSED:
            if module in (first, *others):
                together.setdefault((parent, first), {})[name] = scale
    return [
        f"{', '.join(map(repr, members))} have different global scales "
        f"({', '.join(f'{scale:.6g}' for scale in members.values())}), but vLLM multiplies them at "
        "once, with one. Use quantize.nvfp4(scope='layer')."
        for members in together.values()
        if len(set(members.values())) > 1
    ]


def _unfit_product(weight: Any, inputs: InputRounding) -> list[str]:
    """What vLLM's products of 8-bit numbers refuse.

    Source: vLLM at 004dadb, `compressed_tensors/compressed_tensors.py` (`_is_dynamic_token_w8a8`,
    `_is_static_tensor_w8a8`, `_is_fp8_w8a8`).
    """
    said = inputs.description
    if said["num_bits"] == 4 and said["type"] == "float":
        return _unfit_w4a4(weight, said)
    if said["type"] == "float" and isinstance(weight, Quantized):
        return _unfit_w4a8(weight, said)
    if isinstance(weight, Codebook):
        return ["has levels of a table, but products of 8-bit floats take e4m3"]
    narrow = {said["num_bits"], getattr(weight, "bits", 8)} - {8}
    faults = [f"has {narrow.pop()} bits, but products of 8-bit numbers take 8"] if narrow else []
    if said["strategy"] == "group":
        rows, cols = weight.scale.shape[-2:]
        tile = (weight.in_dim // rows, weight.out_dim // cols)
        if tile != (128, 128) or said["group_size"] != 128:
            faults.append(
                f"has tiles of {tile} and inputs in groups of {said['group_size']}, but products "
                "take (128, 128) and 128"
            )
    elif weight.scale.shape[-2] > 1:
        faults.append("has scales of groups of inputs, but products take one for each output")
    return faults


def _unfit_w4a4(weight: Any, said: Mapping[str, Any]) -> list[str]:
    """What vLLM's products of four-bit floats refuse.

    Source: vLLM, the same file (`_is_fp4a4_nvfp4`).
    """
    nvidia = isinstance(weight, Codebook) and is_nvfp4(weight)
    if nvidia and said["strategy"] == "tensor_group":
        return []
    return [
        "has inputs of 4-bit floats, but products take NVFP4 on both sides. Use quantize.nvfp4 and "
        "quantize.round_inputs(form='nvfp4')"
    ]


def _unfit_w4a8(weight: Quantized, said: Mapping[str, Any]) -> list[str]:
    """What vLLM's products of four-bit integers and 8-bit floats refuse.

    Source: vLLM, the same file in later releases (`_is_fp8_w4a8`).
    """
    group = group_setting(weight)
    faults = []
    if weight.bits != 4 or weight.zero_point is not None or weight.group_index is not None:
        faults.append("is not of symmetric 4-bit integers in order, as products of FP8 take")
    if group != 128:
        faults.append(f"has group_size={group}, but W4A8 takes 128")
    if said["strategy"] != "token":
        faults.append("has inputs with fixed scales or groups, but W4A8 takes one for each token")
    return faults


def _unfit_marlin(weight: Quantized) -> list[str]:
    """What vLLM's Marlin kernels refuse of integers, of each weight on its own.

    Source: vLLM at 007d500, `model_executor/layers/quantization/utils/marlin_utils.py`
    (`_check_marlin_supported`, `verify_marlin_supports_shape`), for one GPU.
    Differs: (1) zero points with moved groups are refused, of which that file says nothing.
    """
    faults = []
    group = group_setting(weight)
    if weight.bits not in (4, 8):
        faults.append(f"has {weight.bits} bits, but Marlin kernels take 4 or 8")
    if group not in (-1, 32, 64, 128):
        faults.append(f"has group_size={group}, but Marlin kernels take 32, 64, 128 or -1")
    if weight.in_dim % 128:
        faults.append(f"has {weight.in_dim} inputs, which Marlin's 128 does not divide")
    if weight.out_dim % 64:
        faults.append(f"has {weight.out_dim} outputs, which Marlin's 64 does not divide")
    if weight.zero_point is not None and weight.bits != 4:
        faults.append("has zero points, which Marlin kernels take only with 4 bits")
    if weight.zero_point is not None and weight.group_index is not None:
        faults.append("has zero points with moved groups, which Marlin kernels do not take")
    return faults
