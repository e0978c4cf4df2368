"""Writes a model's weights with what belongs to them, in each format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np

from jaxweights.checkpoint.exchange._microscaled import E2M1, E2M3
from jaxweights.checkpoint.exchange._settings import fp8_as_compressed
from jaxweights.quantize._nf4 import NF4_LEVELS
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._weight import is_weight

if TYPE_CHECKING:
    from jaxweights.checkpoint.exchange._module import LazyWeight

Format = Literal[
    "orbax",
    "safetensors",
    "gptq",
    "gptq_v2",
    "awq",
    "compressed-tensors",
    "bitsandbytes",
    "gguf",
]
FORMATS: tuple[Format, ...] = get_args(Format)


def write_checkpoint(
    destination: Path,
    form: Format,
    pretrained: Any,
    params: Any,
    *,
    provenance: Any = None,
    overwrite: bool = False,
    target: Literal["vllm"] | None = None,
) -> None:
    """Writes parameters so that they can be loaded again, here or by other tools.

    Args:
      destination: A folder to make.
      form: `orbax` keeps represented weights bit for bit; `safetensors` holds the dense weights
        under the names that other tools read, with those tensors of the source that the model
        does not use; the others hold the integers of `Quantized` weights as those tools do.
      pretrained: The model whose parameters they are.
      params: The parameters, perhaps with represented weights.
      provenance: How they came about.
      overwrite: Whether an existing destination may be replaced.
      target: "vllm" also demands what its kernels need, of a quantized format.
    """
    from jaxweights.checkpoint import save_tree, write_safetensors
    from jaxweights.models import checkpoint_from_params, config_to_dict, export_checkpoint
    from jaxweights.weights import materialize

    files = companion_files(pretrained)
    if form == "orbax":
        config = config_to_dict(pretrained.config)
        files.pop("config.json")
        save_tree(
            destination,
            params,
            config=config,
            provenance=provenance,
            files=files,
            overwrite=overwrite,
        )
        return
    metadata: Any = {} if provenance is None else {"jaxweights": provenance.to_json()}
    if form != "safetensors":
        if form == "gguf":  # its metadata have types, and those of another GGUF file stay
            source = pretrained.source
            metadata = source.metadata if source.format == "gguf" else None
        export_checkpoint(
            destination,
            params,
            pretrained.config,
            form=form,
            target=target,
            settings=kept_settings(form, pretrained.source),
            files=files,
            carried={**pretrained.carried, **kept_activations(form, pretrained.source)},
            metadata=metadata,
            overwrite=overwrite,
        )
        return
    dense = jax.tree.map(np.asarray, materialize(params))
    tensors = checkpoint_from_params(dense, pretrained.config) | dict(pretrained.carried)
    write_safetensors(destination, tensors, metadata=metadata, files=files, overwrite=overwrite)


def write_lazily(
    destination: Path,
    form: Format,
    tensors: Mapping[str, LazyWeight],
    pretrained: Any,
    *,
    carried: Mapping[str, Any],
    provenance: Any = None,
    target: Literal["vllm"] | None = None,
    overwrite: bool = False,
) -> None:
    """`write_checkpoint`, of tensors that are made when they are looked at, each twice.

    Args:
      destination: A folder to make; for `gguf` also a file.
      form: Any format but `orbax`.
      tensors: Under the names of the format, in its orientation.
      pretrained: The model whose tensors they are.
      carried: Further tensors, which the model does not use.
      provenance: How they came about.
      target: As in `write_checkpoint`.
      overwrite: As in `write_checkpoint`.
    """
    from jaxweights.checkpoint import write_safetensors
    from jaxweights.checkpoint._write_safetensors import LazyTensor
    from jaxweights.checkpoint.exchange._module import LazyWeight
    from jaxweights.models._export import export_tensors
    from jaxweights.models._gguf_export import as_ggml_reads, rope_divisors

    def declared(tensor: LazyWeight) -> LazyTensor:
        array = tensor.read()  # which tells its shape and dtype
        return LazyTensor(array.shape, array.dtype, tensor.read)

    source, config = pretrained.source, pretrained.config
    files = companion_files(pretrained)
    metadata: Any = {} if provenance is None else {"jaxweights": provenance.to_json()}
    if form == "safetensors":
        dense = {name: declared(tensor) for name, tensor in tensors.items()}
        write_safetensors(
            destination, dense | dict(carried), metadata=metadata, files=files, overwrite=overwrite
        )
        return
    made: dict[str, Any] = dict(tensors)
    if form == "gguf":
        metadata = source.metadata if source.format == "gguf" else None
        made = {
            name: LazyWeight(lambda read=tensor.read: as_ggml_reads(read()))
            for name, tensor in tensors.items()
        } | rope_divisors(config)
    export_tensors(
        destination,
        made | dict(carried),
        config,
        form=form,  # type: ignore[arg-type]
        target=target,
        settings=kept_settings(form, source),
        files=files,
        metadata=metadata,
        overwrite=overwrite,
    )


def kept_settings(form: Format, source: Any) -> Mapping[str, Any] | None:
    """What a checkpoint's own `quantization_config` says, where the format says the same."""
    given = source.quantization
    if form == "compressed-tensors" and given.get("quant_method") == "fp8":
        return fp8_as_compressed(given)
    return given if form.startswith(str(given.get("quant_method"))) else None


def kept_activations(form: Format, source: Any) -> dict[str, np.ndarray]:
    """Tensors by which a runtime rounds activations, where the format stays the same."""
    if form != "compressed-tensors" or kept_settings(form, source) is None:
        return {}
    return {name: source.read(name) for name in source.activations}


def check_formats(formats: Iterable[Format], pretrained: Any, params: Any) -> None:
    """Refuses parameters that one of the formats cannot hold, before anything is written."""
    _check_formats(formats, pretrained.config, params)


def check_formats_of_shapes(
    formats: Iterable[Format], config: Any, leaves: Mapping[str, Any]
) -> None:
    """`check_formats` of parameters that are not computed yet, before hours are spent on them.

    What only values tell is left to `check_formats`: scales beyond float16, zero points of 0. All
    layers of a stack have the same shapes, so one of them speaks for all.

    Args:
      formats: The formats.
      config: The model's.
      leaves: Abstract arrays and represented weights of these, by path.
    """
    from jaxweights.models._arrange import nest
    from jaxweights.models._convert import name_map

    one = dataclasses.replace(config, num_layers=1)
    stacked = {rule.path for rule in name_map(config, "huggingface").rules if rule.stacked}
    for form in formats:
        examples = {path: _example(leaf, form, path in stacked) for path, leaf in leaves.items()}
        _check_formats([form], one, nest(examples))


def _check_formats(formats: Iterable[Format], config: Any, params: Any) -> None:
    from jaxweights.models import check_export

    for form in formats:
        if form not in ("orbax", "safetensors"):
            check_export(params, config, form=form)


def _example(leaf: Any, form: Format, stacked: bool) -> Any:
    """A leaf of the given shapes, of one layer, that takes no memory.

    Its values are such as the format takes, if it takes any of these shapes.
    """

    def ones(x: Any) -> np.ndarray:
        shape = (1, *x.shape[1:]) if stacked else x.shape
        return np.broadcast_to(np.ones((), x.dtype), shape)

    example = jax.tree.map(ones, leaf)
    if is_weight(getattr(leaf, "base", None)):
        return dataclasses.replace(example, base=_example(leaf.base, form, stacked))
    if isinstance(leaf, Codebook) and leaf.bits == 4 and leaf.table.shape[-1] == 16:
        levels = NF4_LEVELS if form == "bitsandbytes" else E2M1
        return dataclasses.replace(example, table=np.broadcast_to(levels, example.table.shape))
    if isinstance(leaf, Codebook) and leaf.bits == 6 and leaf.table.shape[-1] == 64:
        return dataclasses.replace(example, table=np.broadcast_to(E2M3, example.table.shape))
    if not isinstance(leaf, Quantized) or leaf.group_index is None:
        return example
    # Inputs in an order that no consecutive groups have.
    *_, in_dim = leaf.group_index.shape
    full = leaf.full_group or -(-in_dim // leaf.scale.shape[-2])
    index = (np.arange(in_dim)[::-1] // full).astype(leaf.group_index.dtype)
    moved = np.broadcast_to(index, example.group_index.shape)
    return dataclasses.replace(example, group_index=moved)


def companion_files(pretrained: Any) -> dict[str, str | Path]:
    """Files that travel along with a model's weights: config, tokenizer, licence."""
    from jaxweights.models import config_to_dict

    source = pretrained.source
    files: dict[str, str | Path] = dict(source.files)
    if source.format == "gguf":
        files |= _tokenizer_files(pretrained)
    if source.format == "gguf" or "config.json" not in files:
        files["config.json"] = json.dumps(config_to_dict(pretrained.config), indent=2)
    return files


def _tokenizer_files(pretrained: Any) -> dict[str, str | Path]:
    """A GGUF file's tokenizer as the files that transformers reads."""
    from jaxweights.models import load_tokenizer

    if pretrained.tokenizer_path is None:
        return {}
    metadata: Mapping[str, Any] = pretrained.source.metadata
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and int(index) < len(tokens):
            config[f"{name}_token"] = str(tokens[int(index)])
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = str(metadata["tokenizer.chat_template"])
    return {
        "tokenizer.json": load_tokenizer(pretrained).to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
    }
