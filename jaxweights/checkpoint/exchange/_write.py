"""Writes represented weights as the quantized checkpoints of other programs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from jaxweights.checkpoint._json import dump_json
from jaxweights.checkpoint._write_safetensors import LazyTensor, write_safetensors
from jaxweights.checkpoint.exchange._awq import pack_awq, unfit_awq
from jaxweights.checkpoint.exchange._bitsandbytes import (
    pack_bitsandbytes,
    unfit_bitsandbytes,
)
from jaxweights.checkpoint.exchange._bitsandbytes import settings as bitsandbytes_settings
from jaxweights.checkpoint.exchange._compressed_tensors import (
    pack_int_quantized,
    pack_pack_quantized,
    scales_tensor,
    unfit_compressed_tensors,
)
from jaxweights.checkpoint.exchange._gptq import group_setting, pack_gptq, unfit_gptq
from jaxweights.checkpoint.exchange._module import LazyWeight, Represented, without_values
from jaxweights.checkpoint.exchange._narrow_floats import (
    is_nvfp4,
    pack_float_quantized,
    pack_mxfp4,
    pack_nvfp4,
    unfit_floats,
)
from jaxweights.checkpoint.exchange._settings import activations_of
from jaxweights.core._paths import fail
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._narrow_float import NarrowFloat
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._weight import is_weight

Form = Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "bitsandbytes"]
Weights = Mapping[str, Any]  # by module
_ASKER = "checkpoint.write_quantized"


@dataclasses.dataclass(frozen=True)
class _Writer:
    """How one format is written.

    Args:
      unfit: Why a weight cannot be written, if it cannot.
      pack: The tensors of a weight.
      settings: `quantization_config` of all weights and the names of the modules left dense.
      uniform: Whether bits and group size must be the same for all.
    """

    unfit: Callable[[Any], list[str]]
    pack: Callable[[Any], Mapping[str, LazyTensor]]
    settings: Callable[[Weights, list[str]], dict[str, Any]]
    uniform: bool


def write_quantized(
    destination: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    form: Form,
    config: Mapping[str, Any],
    target: Literal["vllm"] | None = None,
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes | os.PathLike[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a folder that readers of GPTQ, AWQ, compressed-tensors or bitsandbytes load.

    Everything is checked first, and all that does not fit is listed; nothing is written then.
    One tensor at a time is in memory, besides those that are given as they are.

    Args:
      destination: The folder to make.
      tensors: By name, as torch calls and orients them: `Quantized`, `Codebook` or `NarrowFloat`
        weights of shape `(out, in)` under `<module>.weight`, and arrays for the rest. A
        `LazyWeight` is read twice: for the checks and when it is written.
      form: `gptq` (zero points less one), `gptq_v2`, `awq` (GEMM), `bitsandbytes` (NF4 and FP4) or
        `compressed-tensors`, whose format is chosen for each weight: int-quantized for 8 bits
        without moved groups, pack-quantized for other integers, float-quantized for FP8,
        mxfp4-pack-quantized, and nvfp4-pack-quantized.
      config: The model's `config.json`; `quantization_config` is put into it.
      target: "vllm" also demands what its Marlin kernels need of integers.
      settings: Further entries of `quantization_config`, such as those that a checkpoint had. What
        these say of activations, and of the cache, stays true of the modules that are still
        quantized, unless it asks for tensors, such as static scales, that are not given.
      files: As in `write_safetensors`.
      metadata: As in `write_safetensors`.
      max_shard_bytes: As in `write_safetensors`.
      overwrite: As in `write_safetensors`.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False.
      ValueError: If a weight does not fit the format, or no weight is quantized.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
      >>> weight = jnp.ones((8, 64))  # as torch has it, (out, in)
      >>> tx = jw.quantize.round_to_nearest(bits=4, group_size=32)
      >>> small = jw.apply(tx, {"up.weight": weight})
      >>> config = {"model_type": "llama"}
      >>> write_quantized(folder, small, form="compressed-tensors", config=config)
      >>> jw.checkpoint.open_checkpoint(folder).represented("up.weight")
      Quantized(8x64 float32, ... bits=4, group_size=32, ...)

    Differs: (1) GPTQ and AWQ files hold scales in float16: wider ones are rounded to it, once.
    """
    seen = _survey(tensors, form=form, target=target)
    quantized = {name: one.weight for name, one in seen.items() if one.parts is not None}
    writer = WRITERS[form]
    packed = _Packed(tensors, writer)
    written: dict[str, Any] = {}
    for name, one in seen.items():
        if one.parts is None:
            written[name] = one.weight
            continue
        stem = name.removesuffix(".weight")
        for suffix, (shape, dtype) in one.parts.items():
            make = functools.partial(packed.part, name, suffix)
            written[f"{stem}.{suffix}"] = LazyTensor(shape, dtype, make)
    weights = {name.removesuffix(".weight"): w for name, w in quantized.items()}
    dense = _dense_linears({name: one.weight for name, one in seen.items()}, quantized)
    if config.get("tie_word_embeddings") and "lm_head" not in (*dense, *weights):
        dense.append("lm_head")  # a module without a tensor of its own
    described = {**(settings or {}), **writer.settings(weights, dense)}
    if form == "compressed-tensors":
        described |= _kept_activations(described, settings or {}, [*weights], seen)
    content = {**config, "quantization_config": described}
    write_safetensors(
        destination,
        written,
        metadata=metadata,
        files={**(files or {}), "config.json": dump_json(content)},
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def check_quantized(
    tensors: Mapping[str, Any], *, form: str, target: str | None = None
) -> dict[str, Represented]:
    """Refuses what `write_quantized` would, and returns the quantized ones of the tensors."""
    seen = _survey(tensors, form=form, target=target)
    return {name: one.weight for name, one in seen.items() if one.parts is not None}


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What is known of a tensor before anything is written.

    Args:
      weight: The weight, without values if it is lazy; or the tensor that is written as it is.
      parts: Shapes and dtypes of the tensors that a weight becomes; None if it stays as it is.
    """

    weight: Any
    parts: dict[str, tuple[tuple[int, ...], np.dtype]] | None = None


class _Packed:
    """The tensors that weights become, of which those of one weight are there at a time."""

    def __init__(self, tensors: Mapping[str, Any], writer: _Writer):
        self._tensors = tensors
        self._writer = writer
        self._newest: tuple[str, Mapping[str, LazyTensor]] = ("", {})

    def part(self, name: str, suffix: str) -> np.ndarray:
        """One of the tensors of a weight."""
        if self._newest[0] != name:
            tensor = self._tensors[name]
            weight = tensor.read() if isinstance(tensor, LazyWeight) else tensor
            self._newest = name, self._writer.pack(weight)
        return self._newest[1][suffix]()


def _survey(
    tensors: Mapping[str, Any], *, form: str, target: str | None = None
) -> dict[str, _Seen]:
    """Looks at every tensor once; refuses what the format cannot hold, all at once."""
    if form not in WRITERS:
        raise ValueError(f"{_ASKER}: form={form!r} must be one of {', '.join(WRITERS)}.")
    if target not in (None, "vllm"):
        raise ValueError(f"{_ASKER}: target={target!r} must be 'vllm' or None.")
    writer, problems = WRITERS[form], []
    seen: dict[str, _Seen] = {}
    integers: dict[str, Any] = {}
    for name, tensor in tensors.items():
        is_lazy = isinstance(tensor, LazyWeight)
        weight = tensor.read() if is_lazy else tensor
        if not is_weight(weight):
            plain = LazyTensor(weight.shape, weight.dtype, tensor.read) if is_lazy else tensor
            seen[name] = _Seen(plain)
            continue
        faults = _misfits(name, weight, writer, form, target)
        problems += [f"{name!r} {fault}." for fault in faults]
        known = without_values(weight) if is_lazy else weight
        if isinstance(weight, Quantized):
            integers[name] = known
        if not faults:
            parts = {s: (part.shape, part.dtype) for s, part in writer.pack(weight).items()}
            seen[name] = _Seen(known, parts)
    quantized = {name: one.weight for name, one in seen.items() if one.parts is not None}
    if not quantized and not problems:
        problems.append(
            f"no tensor is quantized, so there is nothing that {form} could hold. Quantize "
            "first (quantize.round_to_nearest, quantize.gptq), or write safetensors."
        )
    fail(_ASKER, problems + (_unlike(integers, form) if writer.uniform else []))
    return seen


def _misfits(name: str, weight: Any, writer: _Writer, form: str, target: str | None) -> list[str]:
    """Why a represented weight cannot be written."""
    if not isinstance(weight, Represented):
        return [
            f"is a {type(weight).__name__}, and {form} holds only narrow numbers with scales. "
            "Merge factors and masks into the weight, or save with Orbax"
        ]
    is_integer = isinstance(weight, Quantized)
    if writer.uniform and not is_integer:
        return [
            f"is a {type(weight).__name__}, and {form} holds only integers. Quantize with "
            "round_to_nearest, gptq or awq, or write bitsandbytes or compressed-tensors"
        ]
    faults = list(writer.unfit(weight))
    if not name.endswith(".weight") or weight.view.axes.kind != "linear":
        faults.append(
            f"is an {weight.view.axes.kind}, and readers of {form} know only linear modules. "
            "Leave it out with `partition`, or dequantize it with `materialize`"
        )
    if target == "vllm" and is_integer:
        faults += _unfit_marlin(weight)
    return faults


def _unlike(weights: Weights, form: str) -> list[str]:
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


def _dense_linears(tensors: Mapping[str, Any], quantized: Weights) -> list[str]:
    """Modules with a dense matrix that readers would otherwise take for quantized ones."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and name not in quantized
        and len(tensor.shape) == 2
        and "embed" not in name
    ]


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


def _compressed_settings(weights: Weights, dense: list[str]) -> dict[str, Any]:
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


def _kept_activations(
    described: Mapping[str, Any],
    given: Mapping[str, Any],
    modules: list[str],
    names: Collection[str],
) -> dict[str, Any]:
    """Entries of a description that say of activations and of the cache what a given one does.

    A group whose modules' inputs are rounded in several ways, or some not at all, is split.
    """
    if not given:
        return {}
    groups: dict[str, Any] = {}
    for group in described["config_groups"].values():
        stems = modules if group["targets"] == ["Linear"] else group["targets"]
        ways: dict[str, list[str]] = {}
        for stem in stems:
            way = _runnable(activations_of(given, stem), stem, names)
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
    if isinstance(weight, NarrowFloat):
        return _float_scheme(weight)
    if isinstance(weight, Codebook):
        nvidia = is_nvfp4(weight)
        return (
            ("format", "nvfp4-pack-quantized" if nvidia else "mxfp4-pack-quantized"),
            ("num_bits", 4),
            ("type", "float"),
            ("symmetric", True),
            ("strategy", "tensor_group" if nvidia else "group"),
            ("group_size", 16 if nvidia else 32),
            ("scale_dtype", "torch.float8_e4m3fn" if nvidia else "torch.uint8"),
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


def _float_scheme(weight: NarrowFloat) -> tuple[tuple[str, Any], ...]:
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


def _pack_compressed(weight: Any) -> Mapping[str, LazyTensor]:
    if isinstance(weight, NarrowFloat):
        return pack_float_quantized(weight)
    if isinstance(weight, Codebook):
        return pack_nvfp4(weight) if is_nvfp4(weight) else pack_mxfp4(weight)
    return pack_int_quantized(weight) if _is_plain_int8(weight) else pack_pack_quantized(weight)


def _unfit_compressed(weight: Any) -> list[str]:
    if isinstance(weight, Quantized):
        return unfit_compressed_tensors(weight)
    return unfit_floats(weight)


def _gptq_writer(version: int) -> _Writer:
    return _Writer(
        unfit=lambda weight: unfit_gptq(weight, version=version),
        pack=lambda weight: pack_gptq(weight, version=version),
        settings=lambda weights, dense: _gptq_settings(version, weights, dense),
        uniform=True,
    )


WRITERS: dict[str, _Writer] = {
    "gptq": _gptq_writer(1),
    "gptq_v2": _gptq_writer(2),
    "awq": _Writer(unfit_awq, pack_awq, _awq_settings, uniform=True),
    "compressed-tensors": _Writer(
        _unfit_compressed, _pack_compressed, _compressed_settings, uniform=False
    ),
    "bitsandbytes": _Writer(
        unfit_bitsandbytes, pack_bitsandbytes, bitsandbytes_settings, uniform=False
    ),
}
