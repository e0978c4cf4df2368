"""Writes parameters with represented weights as the quantized checkpoints of other programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from jaxweights.core._paths import flatten, unflatten
from jaxweights.models._arrange import write_tree
from jaxweights.models._bert import BertConfig
from jaxweights.models._convert import name_map
from jaxweights.models._gguf_export import gguf_tensors, write_gguf_model
from jaxweights.models._hf_json import config_to_dict
from jaxweights.models._llama_config import LlamaConfig
from jaxweights.weights._weight import is_weight

if TYPE_CHECKING:
    from jaxweights.checkpoint.exchange._write import Form

_ASKER = "models.export_checkpoint"


def export_checkpoint(
    destination: str | os.PathLike[str],
    params: Any,
    config: LlamaConfig | BertConfig,
    *,
    form: Form | Literal["gguf"],
    target: Literal["vllm"] | None = None,
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
    carried: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model with quantized kernels so that transformers, vLLM or llama.cpp load it.

    Stacked leaves are written layer by layer, and dense leaves as they are: `lm_head` and
    embeddings usually. Where a `Masked` is over a `Quantized`, removed weights get the code of 0.

    Args:
      destination: A folder to make; for `gguf` also a file whose name ends in `.gguf`, while a
        folder gets a `model.gguf`.
      params: The model's parameters, some of them `Quantized`, or what else the format holds.
      config: Of the model.
      form: As in `write_quantized`, or `gguf`, of which the Llama family is written: quantized
        leaves as Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, embeddings too.
      target: "vllm" also demands what its Marlin kernels need of integers.
      settings: Further entries of `quantization_config`, such as those that a checkpoint had.
      files: More files of the folder by name: tokenizer, licence. A `config.json` among them is
        kept and gets the `quantization_config`; else it is made.
      carried: Further tensors by name, that the model does not use.
      metadata: Text by key for the file's own metadata; for `gguf`, the metadata of a GGUF file,
        tokenizer included, which then is not made from `files`.
      overwrite: Whether an existing destination may be replaced.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False.
      ValueError: If a weight does not fit the format; all are listed and nothing is written.

    Example:
      >>> import tempfile, pathlib, jax, jax.numpy as jnp, jaxweights as jw
      >>> config = LlamaConfig(
      ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2
      ... )
      >>> tokens = jnp.zeros((1, 4), jnp.int32)
      >>> model = jw.models.build(config)
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> run = lambda params, tokens: model.apply({"params": params}, tokens)
      >>> rounding = jw.quantize.round_to_nearest(bits=4, group_size=32)
      >>> tx = jw.partition(("layers/.*/kernel", rounding), (".*", jw.identity()))
      >>> params = jw.apply(tx, params, layout=jw.infer_layout(run, params, tokens))
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
      >>> export_checkpoint(folder, params, config, form="compressed-tensors")
      >>> jw.models.load_pretrained(folder).params["layers"]["mlp"]["up"]["kernel"].bits
      4
    """
    params = _without_masks(params)
    if form == "gguf":
        tensors = gguf_tensors(params, config)
    else:
        tensors = _torch_tensors(params, config) | dict(carried or {})
    export_tensors(
        destination,
        tensors,
        config,
        form=form,
        target=target,
        settings=settings,
        files=files,
        metadata=metadata,
        overwrite=overwrite,
    )


def export_tensors(
    destination: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    config: LlamaConfig | BertConfig,
    *,
    form: Form | Literal["gguf"],
    target: Literal["vllm"] | None = None,
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """`export_checkpoint`, of tensors under the names of the format, which may be `LazyWeight`."""
    from jaxweights.checkpoint.exchange import write_quantized

    if form == "gguf":
        if target is not None:
            raise ValueError(f"{_ASKER}: target={target!r} is for safetensors, not for gguf.")
        assert isinstance(config, LlamaConfig)
        write_gguf_model(
            destination, tensors, config, metadata=metadata, files=files or {}, overwrite=overwrite
        )
        return
    rest = dict(files or {})
    write_quantized(
        destination,
        tensors,
        form=form,
        config=_config_json(rest.pop("config.json", None), config),
        target=target,
        settings=settings,
        files=rest,
        metadata=metadata,
        overwrite=overwrite,
    )


def check_export(
    params: Any,
    config: LlamaConfig | BertConfig,
    *,
    form: Form | Literal["gguf"],
    target: Literal["vllm"] | None = None,
) -> None:
    """Refuses what `export_checkpoint` would, and writes nothing.

    Args:
      params: As there.
      config: As there.
      form: As there.
      target: As there.

    Raises:
      ValueError: If a weight does not fit the format; all are listed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxweights as jw
      >>> config = LlamaConfig(
      ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2
      ... )
      >>> model = jw.models.build(config)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
      >>> check_export(params, config, form="gptq")
      Traceback (most recent call last):
        ...
      ValueError: ...no tensor is quantized...
    """
    from jaxweights.checkpoint._write_gguf import plan_gguf
    from jaxweights.checkpoint.exchange._write import check_quantized

    params = _without_masks(params)
    if form == "gguf":
        plan_gguf(gguf_tensors(params, config))
    else:
        check_quantized(_torch_tensors(params, config), form=form, target=target)


def _torch_tensors(params: Any, config: LlamaConfig | BertConfig) -> dict[str, Any]:
    return write_tree(params, name_map(config, "huggingface"), asker=_ASKER, represented=True)


def _without_masks(params: Any) -> Any:
    from jaxweights.checkpoint.exchange._module import without_mask

    flat, structure = flatten(params)
    bare = {path: without_mask(x) if is_weight(x) else x for path, x in flat.items()}
    return unflatten(structure, bare)


def _config_json(given: Any, config: LlamaConfig | BertConfig) -> dict[str, Any]:
    if given is None:
        return config_to_dict(config)
    if isinstance(given, os.PathLike):
        with open(given, "rb") as file:
            given = file.read()
    return json.loads(given)
