"""Writes represented weights as the quantized checkpoints of other programs."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxweights.checkpoint._json import dump_json
from jaxweights.checkpoint._write_safetensors import LazyTensor, write_safetensors
from jaxweights.checkpoint.exchange._compressed_writer import with_activations
from jaxweights.checkpoint.exchange._fit import misfits, unlike_global_scales, unlike_grids
from jaxweights.checkpoint.exchange._inputs import INPUT_TENSORS, InputRounding, without_inputs
from jaxweights.checkpoint.exchange._module import (
    LazyWeight,
    Represented,
    Weights,
    in_equal_groups,
    without_values,
)
from jaxweights.checkpoint.exchange._narrow_floats import is_nvfp4
from jaxweights.checkpoint.exchange._writers import WRITERS, Writer
from jaxweights.core._paths import fail
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._trits import Trits
from jaxweights.weights._weight import is_weight

Form = Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "bitsandbytes"]
_ASKER = "checkpoint.write_quantized"


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
        nvfp4-pack-quantized, and those of MXFP4, MXFP6 (e2m3) and MXFP8 (e4m3). It alone takes
        weights that round their inputs, such as `QuantizedProduct`, and says of them how.
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
      (2) Where a last group is shorter, compressed-tensors, which knows none, repeats scales for
      smaller groups of one size: the numbers stay the same.
    """
    seen = _survey(tensors, form=form, target=target)
    quantized = {name: one.weight for name, one in seen.items() if one.parts is not None}
    inputs = {name.removesuffix(".weight"): one.inputs for name, one in seen.items() if one.inputs}
    replaced = {f"{stem}.{part}" for stem in inputs for part in INPUT_TENSORS}
    writer = WRITERS[form]
    packed = _Packed(tensors, writer)
    written: dict[str, Any] = {}
    for name, one in seen.items():
        if one.parts is None:
            if name not in replaced:
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
        own = {stem: one.description for stem, one in inputs.items()}
        described |= with_activations(described, settings or {}, own, [*weights], seen)
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
      inputs: How the weight rounds its inputs; None if it does not.
    """

    weight: Any
    parts: dict[str, tuple[tuple[int, ...], np.dtype]] | None = None
    inputs: InputRounding | None = None


class _Packed:
    """The tensors that weights become, of which those of one weight are there at a time."""

    def __init__(self, tensors: Mapping[str, Any], writer: Writer):
        self._tensors = tensors
        self._writer = writer
        self._newest: tuple[str, Mapping[str, LazyTensor]] = ("", {})

    def part(self, name: str, suffix: str) -> np.ndarray:
        """One of the tensors of a weight."""
        if self._newest[0] != name:
            tensor = self._tensors[name]
            weight = tensor.read() if isinstance(tensor, LazyWeight) else tensor
            self._newest = name, _parts(self._writer, *_plain(self._writer, weight))
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
    overall: dict[str, float] = {}
    for name, tensor in tensors.items():
        is_lazy = isinstance(tensor, LazyWeight)
        weight = tensor.read() if is_lazy else tensor
        if not is_weight(weight):
            plain = LazyTensor(weight.shape, weight.dtype, tensor.read) if is_lazy else tensor
            seen[name] = _Seen(plain)
            continue
        plain, inputs = _plain(writer, weight)
        faults = misfits(name, weight, plain, inputs, writer, form, target)
        problems += [f"{name!r} {fault}." for fault in faults]
        known = without_values(plain) if is_lazy or inputs else plain
        if isinstance(plain, Quantized):
            integers[name] = known
        if target == "vllm" and isinstance(plain, Codebook) and is_nvfp4(plain):
            overall[name] = float(np.asarray(plain.scale.scale).reshape(()))
        if not faults:
            made = _parts(writer, plain, inputs)
            parts = {suffix: (part.shape, part.dtype) for suffix, part in made.items()}
            seen[name] = _Seen(known, parts, inputs)
    quantized = {name: one.weight for name, one in seen.items() if one.parts is not None}
    if not quantized and not problems:
        problems.append(
            f"no tensor is quantized, so there is nothing that {form} could hold. Quantize "
            "first (quantize.round_to_nearest, quantize.gptq), or write safetensors."
        )
    problems += unlike_global_scales(overall)
    fail(_ASKER, problems + (unlike_grids(integers, form) if writer.uniform else []))
    return seen


def _plain(writer: Writer, weight: Any) -> tuple[Any, InputRounding | None]:
    """A weight's narrow numbers as the format can hold them, and how it rounds its inputs."""
    plain, inputs = without_inputs(weight)
    if isinstance(plain, Trits):  # no format has five weights in a byte, but some have two bits
        plain = plain.quantized()
    return (in_equal_groups(plain) if writer.equal_groups else plain), inputs


def _parts(writer: Writer, weight: Any, inputs: InputRounding | None) -> Mapping[str, LazyTensor]:
    """The tensors of a module."""
    return {**writer.pack(weight), **(inputs.parts if inputs else {})}


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
