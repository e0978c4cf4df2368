"""A folder's `quantization_config`: which tensors belong to which quantized module, and how."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import numpy as np

from jaxweights.checkpoint.exchange._awq import unpack_awq
from jaxweights.checkpoint.exchange._bitsandbytes import (
    SUFFIXES,
    dense_shape,
    unpack_bitsandbytes,
)
from jaxweights.checkpoint.exchange._compressed_tensors import (
    unpack_int_quantized,
    unpack_pack_quantized,
)
from jaxweights.checkpoint.exchange._gptq import BITS, unpack_gptq
from jaxweights.checkpoint.exchange._inputs import INPUT_TENSORS
from jaxweights.checkpoint.exchange._microscaled import MXForm, unpack_mx
from jaxweights.checkpoint.exchange._module import Parts, Represented
from jaxweights.checkpoint.exchange._narrow_floats import (
    unpack_float_quantized,
    unpack_fp8,
    unpack_nvfp4,
)

METHODS = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8")
_FLOATS = ("float-quantized", "nvfp4-pack-quantized", *get_args(MXForm))
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 2}
# Of scales of the cache, which belong to an attention module.
_CACHE = (".q_scale", ".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point")


class UnknownFormat(ValueError):
    """A `quantization_config` that this library cannot read."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A quantized module of a checkpoint.

    Args:
      tensors: Names of its tensors in the files, by what they are in the module.
      unpack: Reads it as a weight of shape `(out, in)`, or as an array where no weight can be it.
      shape: Its dense shape `(out, in)`, from the shapes of its tensors alone.
    """

    tensors: Mapping[str, str]
    unpack: Callable[[Parts], Represented | np.ndarray]
    shape: Callable[[Parts], tuple[int, int]]


def quantized_modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Module]:
    """Finds the quantized modules of a checkpoint.

    Args:
      config: `quantization_config`, from an untrusted file.
      names: Names of all tensors.

    Returns:
      Modules by the name that their dense weight would have, such as `...q_proj.weight`.

    Raises:
      UnknownFormat: If the config names a method or a variant that cannot be read.
    """
    method = config.get("quant_method")
    if method == "gptq":
        return _gptq_modules(config, names)
    if method == "awq":
        return _awq_modules(config, names)
    if method == "compressed-tensors":
        return _compressed_modules(config, names)
    if method == "bitsandbytes":
        return _bitsandbytes_modules(config, names)
    if method == "fp8":
        return _fp8_modules(config, names)
    raise UnknownFormat(
        f"quant_method={method!r:.80} cannot be read. Known are {', '.join(METHODS)}"
    )


def activation_tensors(
    config: Mapping[str, Any], modules: Mapping[str, Module], names: Iterable[str]
) -> tuple[str, ...]:
    """Names of the tensors by which a runtime rounds activations and its cache."""
    if config.get("quant_method") not in ("compressed-tensors", "fp8"):
        return ()
    found = [t for m in modules.values() for part, t in m.tensors.items() if part in INPUT_TENSORS]
    return (*found, *(name for name in names if name.endswith(_CACHE)))


def activations_of(config: Mapping[str, Any], stem: str) -> Mapping[str, Any] | None:
    """How a config says that the inputs of a module are rounded; None if they are not."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        return None
    try:
        found = _group_of(stem, groups).get("input_activations")
    except UnknownFormat:  # another model's
        return None
    return found if isinstance(found, dict) else None


def fp8_as_compressed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What compressed-tensors says of inputs that `quant_method: fp8` has rounded.

    Args:
      config: `quantization_config` of that method.

    Returns:
      A `quantization_config` that says nothing of weights.
    """
    block = config.get("weight_block_size")
    fixed = config.get("activation_scheme") == "static"
    said = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor" if fixed else "group" if block else "token",
        "dynamic": not fixed,
    }
    if block and not fixed:
        said["group_size"] = block[1]
    return {"config_groups": {"group_0": {"targets": ["Linear"], "input_activations": said}}}


def _gptq_modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Module]:
    bits = _number(config, "bits", BITS)
    variant = config.get("checkpoint_format", "gptq") or "gptq"
    if not isinstance(variant, str) or variant not in _GPTQ_FORMATS:
        raise UnknownFormat(
            f"checkpoint_format={variant!r:.80} of GPTQ cannot be read. Known are "
            f"{', '.join(_GPTQ_FORMATS)}; convert others with the program that wrote them"
        )
    if config.get("dynamic"):
        raise UnknownFormat("'dynamic' bits of GPTQ, which differ between modules, cannot be read")
    unpack = functools.partial(
        unpack_gptq,
        bits=bits,
        version=_GPTQ_FORMATS[variant],
        symmetric=config.get("sym", True) is True,
    )

    def shape(parts: Parts) -> tuple[int, int]:
        words, out_dim = _two(parts, "qweight")
        return out_dim, words * 32 // bits

    return _by_suffix(names, ("qweight", "qzeros", "scales", "g_idx"), unpack, shape)


def _awq_modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Module]:
    _number({"bits": config.get("bits", config.get("w_bit"))}, "bits", (4,))
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise UnknownFormat(
            f"version={version!r:.80} of AWQ cannot be read, only 'gemm'. Convert it with AutoAWQ"
        )

    def shape(parts: Parts) -> tuple[int, int]:
        in_dim, words = _two(parts, "qweight")
        return words * 8, in_dim

    return _by_suffix(names, ("qweight", "qzeros", "scales"), unpack_awq, shape)


def _by_suffix(
    names: Iterable[str],
    suffixes: tuple[str, ...],
    unpack: Callable[[Parts], Represented],
    shape: Callable[[Parts], tuple[int, int]],
) -> dict[str, Module]:
    """Modules that have a tensor of the first suffix."""
    known = set(names)
    stems = (name.removesuffix(f".{suffixes[0]}") for name in names)
    found = {}
    for stem in stems:
        if f"{stem}.{suffixes[0]}" in known:
            tensors = {s: f"{stem}.{s}" for s in suffixes if f"{stem}.{s}" in known}
            found[f"{stem}.weight"] = Module(tensors, unpack, shape)
    return found


def _bitsandbytes_modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Module]:
    if config.get("load_in_4bit") is not True:
        raise UnknownFormat(
            "bitsandbytes is read where 'load_in_4bit' is true; its 8-bit weights are not"
        )
    known = set(names)
    stems = [n.removesuffix(".weight.quant_map") for n in names if n.endswith(".weight.quant_map")]
    return {
        f"{stem}.weight": Module(
            {s: f"{stem}.{s}" for s in SUFFIXES if f"{stem}.{s}" in known},
            unpack_bitsandbytes,
            dense_shape,
        )
        for stem in stems
        if f"{stem}.weight" in known
    }


def _fp8_modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Module]:
    kind = config.get("fmt", "e4m3")
    if kind != "e4m3":
        raise UnknownFormat(f"fmt={kind!r:.80} of fp8 cannot be read, only 'e4m3'")
    block = config.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    if block is not None and (len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes)):
        raise UnknownFormat(f"weight_block_size={block!r:.80} of fp8 must be two positive integers")
    unpack = functools.partial(unpack_fp8, block=tuple(sizes) or None)
    names = list(names)
    known, found = set(names), {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if suffix in ("weight_scale_inv", "weight_scale") and f"{stem}.weight" in known:
            tensors = {s: f"{stem}.{s}" for s in ("weight", suffix, *INPUT_TENSORS)}
            tensors = {part: tensor for part, tensor in tensors.items() if tensor in known}
            found[f"{stem}.weight"] = Module(tensors, unpack, lambda parts: _two(parts, "weight"))
    return found


def _compressed_modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Module]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise UnknownFormat("'config_groups' of compressed-tensors must be a dict of dicts")
    names = list(names)
    known = set(names)
    found = {}
    for stem in (name.removesuffix(".weight_scale") for name in names):
        if f"{stem}.weight_scale" not in known:
            continue
        group = _group_of(stem, groups)
        unpack, suffixes, shape = _compressed_scheme(group, config)
        owned = (*suffixes, *INPUT_TENSORS)
        tensors = {s: f"{stem}.{s}" for s in owned if f"{stem}.{s}" in known}
        found[f"{stem}.weight"] = Module(tensors, unpack, shape)
    return found


def _group_of(stem: str, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group whose targets name a module: by its name, by a pattern, or as a Linear."""
    best: tuple[int, Any] = (3, None)
    for group in groups.values():
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            if not isinstance(target, str):
                continue
            if target == stem:
                rank = 0
            elif target.startswith("re:"):
                if not _matches(target[3:], stem):
                    continue
                rank = 1
            elif target == "Linear":
                rank = 2
            else:
                continue
            if rank < best[0]:
                best = rank, group
    if best[1] is None:
        raise UnknownFormat(f"no target of 'config_groups' names the quantized module {stem!r}")
    return best[1]


def _matches(pattern: str, stem: str) -> bool:
    try:
        return re.match(pattern, stem) is not None
    except re.error as error:
        raise UnknownFormat(
            f"the target 're:{pattern:.80}' of 'config_groups' is no regular expression: {error}"
        ) from None


def _compressed_scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    form: Any = group.get("format") or config.get("format")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise UnknownFormat("'weights' of a config group must be a dict")
    if form == "float-quantized":
        _number(weights, "num_bits", (8,))
        suffixes = ("weight", "weight_scale", "weight_zero_point")
        return unpack_float_quantized, suffixes, lambda parts: _two(parts, "weight")
    if form in get_args(MXForm):
        stored = "weight" if form == "mxfp8-quantized" else "weight_packed"
        inputs = {"mxfp4-pack-quantized": (2, 1), "mxfp6-pack-quantized": (4, 3)}.get(form, (1, 1))
        unpack = functools.partial(unpack_mx, form=form)
        return unpack, (stored, "weight_scale"), _shape_of(stored, *inputs)
    if form == "nvfp4-pack-quantized":
        suffixes = ("weight_packed", "weight_scale", "weight_global_scale")
        return unpack_nvfp4, suffixes, _shape_of("weight_packed", 2, 1)
    if weights.get("type", "int") != "int":
        raise UnknownFormat(
            f"the format {form!r:.80} holds {weights.get('type')!r:.80} weights, which are read in "
            f"{', '.join(_FLOATS)} only"
        )
    symmetric = weights.get("symmetric", True) is True
    if form == "pack-quantized":
        bits = _number(weights, "num_bits", range(2, 9))
        if weights.get("strategy") == "tensor" and not symmetric:
            raise UnknownFormat("the strategy 'tensor' with zero points cannot be read")
        unpack = functools.partial(unpack_pack_quantized, bits=bits, symmetric=symmetric)
        suffixes = (
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
            "weight_g_idx",
        )
        return unpack, suffixes, _packed_shape
    if form == "int-quantized":
        _number(weights, "num_bits", (8,))
        unpack = functools.partial(unpack_int_quantized, symmetric=symmetric)
        suffixes = ("weight", "weight_scale", "weight_zero_point")
        return unpack, suffixes, lambda parts: _two(parts, "weight")
    raise UnknownFormat(
        f"the format {form!r:.80} of compressed-tensors cannot be read. Known are "
        f"pack-quantized, int-quantized, {', '.join(_FLOATS)}"
    )


def _packed_shape(parts: Parts) -> tuple[int, int]:
    part = parts.get("weight_shape")
    if part is None or part.shape != (2,) or part.dtype.kind not in "iu":
        raise ValueError("'weight_shape' is missing or not two integers. The file is damaged")
    out_dim, in_dim = (int(n) for n in part.read())
    return out_dim, in_dim


def _shape_of(suffix: str, inputs: int, stored: int) -> Callable[[Parts], tuple[int, int]]:
    """Of a matrix with so many inputs in so many of its columns."""

    def shape(parts: Parts) -> tuple[int, int]:
        out_dim, columns = _two(parts, suffix)
        return out_dim, columns * inputs // stored

    return shape


def _two(parts: Parts, suffix: str) -> tuple[int, int]:
    part = parts.get(suffix)
    if part is None:
        raise ValueError(f"{suffix!r} is missing. The file is damaged")
    if len(part.shape) != 2:
        raise ValueError(f"{suffix!r} has shape {part.shape}, expected a matrix")
    return part.shape  # type: ignore[return-value]


def _number(config: Mapping[str, Any], key: str, allowed: Iterable[int]) -> int:
    value = config.get(key)
    if type(value) is not int or value not in allowed:
        raise UnknownFormat(
            f"{key}={value!r:.80} cannot be read. Known are {', '.join(map(str, allowed))}"
        )
    return value
