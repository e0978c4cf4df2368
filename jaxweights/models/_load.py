"""Loads a model, its parameters and what belongs to them from a path."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core._paths import flatten, unflatten
from jaxweights.models._arrange import check_tree
from jaxweights.models._bert import Bert
from jaxweights.models._convert import name_map, params_from_checkpoint
from jaxweights.models._llama import Llama
from jaxweights.models._names import NameMap
from jaxweights.models._registry import ModelConfig, build, config_from_dict, config_from_gguf
from jaxweights.weights._microscaling import InputForm
from jaxweights.weights._weight import is_weight, materialize

if TYPE_CHECKING:
    from jaxweights.checkpoint import Checkpoint

_ASKER = "models.load_pretrained"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its weights.

    Attributes:
      model: The Flax module.
      params: Its parameters, to be given as `model.apply({"params": params}, ...)`.
      config: Sizes and options.
      tokenizer_path: File from which `load_tokenizer` makes the tokenizer, or None.
      source: The checkpoint that was read.
      carried: Tensors under torch's names that the model does not use (a pooler, position
        ids, biases of zero that AutoGPTQ adds), so that a copy need not lose them.
    """

    model: Llama | Bert
    params: Any
    config: ModelConfig
    tokenizer_path: Path | None
    source: Checkpoint
    carried: Mapping[str, np.ndarray]


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    remat: bool = False,
    dequantize: bool | None = None,
) -> Pretrained:
    """Loads a checkpoint of any known format and architecture.

    Args:
      path: A folder with safetensors and `config.json`, a GGUF file, or an Orbax checkpoint with
        its config: of a parameter tree, or of tensors under the names that safetensors have.
      dtype: Dtype to which dense float parameters are cast, and in which represented weights
        materialise, whose integers and scales stay as they are. None keeps the checkpoint's, which
        is float32 for quantized GGUF blocks.
      remat: Whether the model computes activations again in the backward pass.
      dequantize: Whether quantized tensors become the dense weights that they stand for; False
        keeps their integers as represented weights, on which a lifted model runs. None keeps
        those of GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8 and Orbax and makes GGUF's blocks
        dense. A stacked leaf whose layers no single representation holds becomes dense.

    Returns:
      Model, parameters on the default device, config, and where they came from.

    Raises:
      FileNotFoundError: If there is nothing to read.
      ValueError: If the file is damaged, has no config, is of an unknown architecture, or does
        not hold the tensors that its config asks for.

    Warns:
      UserWarning: If the checkpoint's runtime rounds activations too, of which only weights are
        read.

    Example:
      >>> import json, tempfile, pathlib, jaxweights as jw
      >>> config = jw.models.LlamaConfig(
      ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2
      ... )
      >>> tokens = jnp.zeros((1, 4), jnp.int32)
      >>> params = jw.models.build(config).init(jax.random.key(0), tokens)["params"]
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
      >>> jw.checkpoint.write_safetensors(
      ...     folder,
      ...     jw.models.checkpoint_from_params(params, config),
      ...     files={"config.json": json.dumps(jw.models.config_to_dict(config))},
      ... )
      >>> loaded = load_pretrained(folder)
      >>> loaded.model.apply({"params": loaded.params}, tokens).shape
      (1, 4, 64)
    """
    from jaxweights.checkpoint import load_tree, open_checkpoint

    source = open_checkpoint(path)
    if (rounding := _how_to_round_inputs(source.quantization)) is not None:
        warnings.warn(
            f"{_ASKER}: '{path}': its quantization_config has inputs rounded ({rounding[0]!r}) "
            "while the model runs; only the weights are read, and the model runs on float "
            f"activations. {rounding[1]}",
            stacklevel=2,
        )
    config = read_config(source)
    carried: dict[str, np.ndarray] = {}
    if source.is_torch and source.format != "gguf":  # what GGUF has beyond it is in the config
        carried = carried_tensors(source, name_map(config, "huggingface"))
    if not source.is_torch:
        params = load_tree(path).tree
        params = materialize(params) if dequantize else params
        check_tree(flatten(params)[0], name_map(config, "huggingface"), asker=_ASKER)
    else:
        keep = source.format != "gguf" if dequantize is None else not dequantize
        tensors = _Tensors(source, represented=keep, without=carried)
        params = params_from_checkpoint(tensors, config)
    return Pretrained(
        model=build(config, remat=remat),
        params=_on_device(params, dtype),
        config=config,
        tokenizer_path=tokenizer_path_of(source),
        source=source,
        carried=carried,
    )


class _Lazy:
    """A tensor whose shape is known and whose values are read when asked for."""

    def __init__(self, source: Checkpoint, name: str, represented: bool):
        self.shape = source.shape(name)
        self.read = lambda: source.represented(name) if represented else source.read(name)


class _Tensors(Mapping[str, _Lazy]):
    """A checkpoint as a mapping, read one tensor at a time."""

    def __init__(
        self, source: Checkpoint, *, represented: bool = False, without: Collection[str] = ()
    ):
        self._source = source
        self._represented = represented
        self._names = dict.fromkeys(name for name in source.names if name not in without)

    def __getitem__(self, name: str) -> _Lazy:
        if name not in self._names:
            raise KeyError(name)
        return _Lazy(self._source, name, self._represented)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_AGAIN = "The description is written again with compressed-tensors."


def _how_to_round_inputs(quantization: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a config calls the rounding of inputs, and which transforms do it; None if it has none.

    Args:
      quantization: `quantization_config`, from an untrusted file.
    """
    if quantization.get("quant_method") == "fp8":
        tile = quantization.get("weight_block_size")
        groups = f"input_group_size={tile[1]}" if isinstance(tile, list) and len(tile) == 2 else ""
        return "activation_scheme", f"Apply quantize.fp8_dynamic({groups}) to round them. {_AGAIN}"
    groups = quantization.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    told = [g.get("input_activations") for g in groups if isinstance(g, Mapping)]
    told = [one for one in told if one]
    if not told:
        return None
    told = [one for one in told if isinstance(one, Mapping)]
    advice = []
    if any((one.get("type", "int"), one.get("num_bits")) == ("int", 8) for one in told):
        advice.append("Apply quantize.int8_dynamic() for products of integers.")
    floats = [one for one in told if one.get("type") == "float"]
    grouped = [one for one in floats if one.get("strategy") == "group"]
    blocks = [
        one
        for one in grouped
        if one.get("num_bits") in (4, 6) or one.get("scale_dtype") == "torch.uint8"
    ]
    forms = [f"mxfp{one.get('num_bits')!s:.80}" for one in blocks]
    forms += ["nvfp4" for one in floats if one.get("strategy") == "tensor_group"]
    floats = [one for one in floats if one.get("num_bits") == 8 and one not in blocks]
    if floats:
        size = floats[0].get("group_size") if floats[0].get("strategy") == "group" else None
        groups = f"input_group_size={size}" if size else ""
        advice.append(f"Apply quantize.fp8_dynamic({groups}) for products of 8-bit floats.")
    for form in sorted(set(forms) & set(get_args(InputForm))):
        advice.append(f"Apply quantize.round_inputs(form={form!r}) to round them.")
    return "input_activations", " ".join([*advice, _AGAIN])


def carried_tensors(source: Checkpoint, names: NameMap) -> dict[str, np.ndarray]:
    """Tensors that the model has no use for; among them biases of zero, which AutoGPTQ adds."""
    expected = names.expected()
    found = {}
    for name in source.names:
        canonical = names.canonical(name)
        if names.is_carried(canonical):
            found[name] = source.read(name)
        elif canonical.endswith(".bias") and canonical not in expected:
            values = source.read(name)
            if values.ndim == 1 and not np.any(values):
                found[name] = values
    return found


def read_config(source: Checkpoint) -> ModelConfig:
    """The config of the model that a checkpoint holds."""
    if source.format == "gguf":
        return config_from_gguf(source.metadata, _Tensors(source))
    if not source.config:
        raise ValueError(
            f"{_ASKER}: '{source.path}' has no config.json. Put the model's beside the weights; "
            "for parameters saved with save_tree, pass config=config_to_dict(config)."
        )
    if source.unread is not None:
        raise ValueError(
            f"{_ASKER}: '{source.path}': the quantization_config of its config.json: "
            f"{source.unread}."
        )
    return config_from_dict(source.config)


def _on_device(params: Any, dtype: DTypeLike | None) -> Any:
    """Leaves as JAX arrays, in `dtype`; parts of represented weights keep their dtypes."""
    flat, structure = flatten(params)

    def place(leaf: Any) -> Any:
        if is_weight(leaf):
            leaf = jax.tree.map(jnp.asarray, leaf)
            return leaf if dtype is None else leaf.astype(dtype) or leaf
        if not isinstance(leaf, np.ndarray | jax.Array):
            return jax.tree.map(jnp.asarray, leaf)
        if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(leaf, dtype)
        return jnp.asarray(leaf)

    return unflatten(structure, {path: place(leaf) for path, leaf in flat.items()})


def tokenizer_path_of(source: Checkpoint) -> Path | None:
    """The file from which a checkpoint's tokenizer is made."""
    if "tokenizer.json" in source.files:
        return source.files["tokenizer.json"]
    if source.format == "gguf" and "tokenizer.ggml.tokens" in source.metadata:
        return source.path
    return None
