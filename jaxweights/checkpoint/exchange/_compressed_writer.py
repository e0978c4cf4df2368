"""compressed-tensors: the format of every weight, and what the config says of all of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from jaxweights.checkpoint._json import dump_json
from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._compressed_tensors import (
    pack_int_quantized,
    pack_pack_quantized,
    scales_tensor,
    unfit_compressed_tensors,
)
from jaxweights.checkpoint.exchange._gptq import group_setting
from jaxweights.checkpoint.exchange._microscaled import mx_form, pack_mx
from jaxweights.checkpoint.exchange._module import Weights
from jaxweights.checkpoint.exchange._narrow_floats import (
    pack_float_quantized,
    pack_nvfp4,
    unfit_floats,
)
from jaxweights.checkpoint.exchange._settings import activations_of
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._narrow_float import NarrowFloat
from jaxweights.weights._quantized import Quantized


def compressed_settings(weights: Weights, dense: list[str]) -> dict[str, Any]:
    """`quantization_config`, with a group of modules for each way of storing weights."""
    schemes: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for name, weight in weights.items():
        schemes.setdefault(_scheme(weight), []).append(name)
    groups = {}
    for i, (scheme, names) in enumerate(schemes.items()):
        values = dict(scheme)
        form = values.pop("format")
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "format": form,
            "weights": {**values, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def with_activations(
    described: Mapping[str, Any],
    given: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]],
    modules: list[str],
    names: Collection[str],
) -> dict[str, Any]:
    """Entries of a description that say how activations and the cache are rounded.

    A group whose modules' inputs are rounded in several ways, or some not at all, is split.

    Args:
      described: What there is to say of the weights.
      given: A description that stays true of the modules that say nothing themselves.
      own: `input_activations` of the modules that do.
      modules: All quantized ones.
      names: Tensors that are written.
    """
    if not given and not own:
        return {}
    groups: dict[str, Any] = {}
    for group in described["config_groups"].values():
        stems = modules if group["targets"] == ["Linear"] else group["targets"]
        ways: dict[str, list[str]] = {}
        for stem in stems:
            way = own.get(stem) or _runnable(activations_of(given, stem), stem, names)
            ways.setdefault(dump_json(way), []).append(stem)
        for way, members in ways.items():
            targets = group["targets"] if len(ways) == 1 else members
            changed = {**group, "targets": targets, "input_activations": json.loads(way)}
            groups[f"group_{len(groups)}"] = changed
    has_cache = any(name.endswith((".k_scale", ".v_scale")) for name in names)
    cache = given.get("kv_cache_scheme") if has_cache else None
    return {"config_groups": groups, "kv_cache_scheme": cache}


def _runnable(
    activations: Mapping[str, Any] | None, stem: str, names: Collection[str]
) -> Mapping[str, Any] | None:
    """A description of activations, if all that it needs is there."""
    if activations is None or activations.get("dynamic") is True:
        return activations
    static = any(f"{stem}.{part}" in names for part in ("input_scale", "input_global_scale"))
    return activations if static else None


def _is_plain_int8(weight: Quantized) -> bool:
    return weight.bits == 8 and weight.group_index is None


def _scheme(weight: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(weight, Quantized):
        microscaled = mx_form(weight)
        if microscaled is None and isinstance(weight, NarrowFloat):
            return _fp8_scheme(weight)
        return (
            ("format", microscaled or "nvfp4-pack-quantized"),
            ("num_bits", getattr(weight, "bits", 8)),
            ("type", "float"),
            ("symmetric", True),
            ("strategy", "group" if microscaled else "tensor_group"),
            ("group_size", 32 if microscaled else 16),
            ("scale_dtype", "torch.uint8" if microscaled else "torch.float8_e4m3fn"),
        )
    group = group_setting(weight)
    strategy = "group" if group != -1 else "tensor" if scales_tensor(weight) else "channel"
    return (
        ("format", "int-quantized" if _is_plain_int8(weight) else "pack-quantized"),
        ("num_bits", weight.bits),
        ("type", "int"),
        ("symmetric", weight.zero_point is None),
        ("strategy", strategy),
        ("group_size", group if strategy == "group" else None),
        ("actorder", "group" if weight.group_index is not None else None),
    )


def _fp8_scheme(weight: NarrowFloat) -> tuple[tuple[str, Any], ...]:
    rows, cols = weight.scale.shape[-2:]
    block = None
    if (rows, cols) == (1, 1):
        strategy = "tensor"
    elif cols == weight.out_dim:
        strategy = "channel" if rows == 1 else "group"
    else:
        strategy, block = "block", [weight.out_dim // cols, weight.in_dim // rows]
    return (
        ("format", "float-quantized"),
        ("num_bits", 8),
        ("type", "float"),
        ("symmetric", True),
        ("strategy", strategy),
        ("group_size", weight.in_dim // rows if strategy == "group" else None),
        ("block_structure", None if block is None else tuple(block)),
    )


def pack_compressed(weight: Any) -> Mapping[str, LazyTensor]:
    """The tensors of a module in the format that holds its weight."""
    if isinstance(weight, Codebook | NarrowFloat) and mx_form(weight) is not None:
        return pack_mx(weight)
    if isinstance(weight, NarrowFloat):
        return pack_float_quantized(weight)
    if isinstance(weight, Codebook):
        return pack_nvfp4(weight)
    return pack_int_quantized(weight) if _is_plain_int8(weight) else pack_pack_quantized(weight)


def unfit_compressed(weight: Any) -> list[str]:
    """Why none of the formats holds a weight, if none does."""
    if isinstance(weight, Quantized):
        return unfit_compressed_tensors(weight)
    return unfit_floats(weight)
