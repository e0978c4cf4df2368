"""A model with a LoRA adapter applied, tensor by tensor when it is read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.checkpoint import SafetensorsReader, open_safetensors
from jaxweights.checkpoint._json import read_json_object
from jaxweights.checkpoint._mapped import MappedTensor, mapped_tensor
from jaxweights.checkpoint._tensor_table import fill_from
from jaxweights.recipes.mergekit._models import Model

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# What these do to a weight is not the sum of it and a product.
_OTHER = ("use_dora", "layer_replication", "megatron_config", "loftq_config_applied")


@dataclasses.dataclass(frozen=True)
class _Factors:
    """One weight's change: `scale * up @ down`, in torch's orientation."""

    down: str
    up: str
    scale: float
    transposed: bool


class Adapted:
    """Reads like the base's checkpoint.

    Args:
      base: The base's tensors.
      adapter: The adapter's.
      factors: Changes by tensor of the base.
      replaced: Tensors that the adapter holds whole, by tensor of the base.
    """

    def __init__(
        self,
        base: Any,
        adapter: SafetensorsReader,
        factors: Mapping[str, _Factors],
        replaced: Mapping[str, str],
    ):
        """Made by `with_adapter`, which checks what it passes."""
        self._base = base
        self._adapter = adapter
        self._factors = factors
        self._replaced = replaced

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor: float32 where the adapter changes it, as small changes need."""
        changed = name in self._factors or name in self._replaced
        return np.dtype(np.float32) if changed else self._base.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor with its change."""
        if name in self._replaced:
            return self._adapter.read(self._replaced[name]).astype(np.float32)
        weight = self._base.read(name)
        if name not in self._factors:
            return weight
        found = self._factors[name]
        down = self._adapter.read(found.down).astype(np.float32)
        up = self._adapter.read(found.up).astype(np.float32)
        change = found.scale * (up @ down)
        return weight.astype(np.float32) + (change.T if found.transposed else change)

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        """A function that fills an array with a tensor's entries from a flat index on."""
        if name not in self._factors and name not in self._replaced:
            return self._base.reader(name)
        return fill_from(self.read(name))

    def mapped(self, name: str) -> MappedTensor | None:
        """Where a tensor that the adapter leaves alone lies in a file."""
        if name in self._factors or name in self._replaced:
            return None
        return mapped_tensor(self._base, name)


def with_adapter(model: Model, label: str, path: str, beside: Path) -> Model:
    """A model with a PEFT adapter applied.

    Args:
      model: The model.
      label: What the result is called.
      path: Folder of the adapter.
      beside: Folder of the configuration.

    Returns:
      The model, whose changed tensors are float32.

    Raises:
      FileNotFoundError: If there is no such adapter.
      ValueError: If it is of a kind that is no sum of a weight and a product, or does not fit.
    """
    folder = next((p for p in (Path(path), beside / path) if (p / _CONFIG).is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"adapter {path!r}: there is no {_CONFIG} in it.")
    where = f"adapter '{folder}'"
    config = read_json_object(folder / _CONFIG, where=where)
    _check_config(config, where)
    adapter = open_safetensors(folder / _WEIGHTS)
    factors: dict[str, _Factors] = {}
    replaced: dict[str, str] = {}
    problems = []
    for name in adapter:
        module = name.removeprefix(_PREFIX)
        if name.endswith(_UP):
            continue
        if name.endswith(_DOWN):
            found = _factors(name, module.removesuffix(_DOWN), adapter, config)
            target = f"{module.removesuffix(_DOWN)}.weight"
            problem = _unfit(target, found, adapter, model)
            factors[target] = found
        elif ".lora_" in name:
            problem = f"holds {name!r}, which is neither {_DOWN!r} nor {_UP!r}"
        else:
            target = re.sub(r"\.modules_to_save(\.default)?\.", ".", module)
            replaced[target] = name
            problem = None
            if target not in model.known or model.tensors.shape(target) != adapter[name].shape:
                problem = f"holds {name!r}, which no tensor of {model.label} is like"
        problems += [problem] if problem else []
    if not factors and not problems:
        problems.append(f"holds no {_DOWN!r}")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems[:5])}. Is it an adapter of this model?")
    changed = Adapted(model.tensors, adapter, factors, replaced)
    return dataclasses.replace(
        model,
        label=label,
        tensors=changed,
        fingerprint=f"{model.fingerprint}+{_fingerprint(adapter)}",
    )


def _fingerprint(adapter: SafetensorsReader) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for name in adapter:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(adapter.raw(name)).data)
    return digest.hexdigest()


def _check_config(config: Mapping[str, Any], where: str) -> None:
    kind = str(config.get("peft_type", "LORA")).upper()
    other = [key for key in _OTHER if config.get(key)]
    if kind != "LORA" or other:
        raise ValueError(
            f"{where}: is {kind}{' with ' + ', '.join(other) if other else ''}, and only plain "
            "LoRA can be added to a weight. Merge it with the library that made it, first."
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{where}: has bias={config['bias']!r}, and biases are not applied. Train it with "
            "bias='none', or merge it with the library that made it."
        )


def _factors(
    name: str, module: str, adapter: SafetensorsReader, config: Mapping[str, Any]
) -> _Factors:
    rank = adapter[name].shape[0]
    alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank))
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    up = name.removesuffix(_DOWN) + _UP
    return _Factors(name, up, float(alpha) / divisor, bool(config.get("fan_in_fan_out")))


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name fits."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _unfit(target: str, found: _Factors, adapter: SafetensorsReader, model: Model) -> str | None:
    if found.up not in adapter:
        return f"holds {found.down!r} without {found.up!r}"
    if target not in model.known:
        return f"changes {target!r}, which {model.label} lacks"
    (rank, inputs), (outputs, same) = adapter[found.down].shape, adapter[found.up].shape
    shape = (inputs, outputs) if found.transposed else (outputs, inputs)
    if rank != same or shape != model.tensors.shape(target):
        return f"changes {target!r} by a {shape} matrix, but it is {model.tensors.shape(target)}"
    return None
