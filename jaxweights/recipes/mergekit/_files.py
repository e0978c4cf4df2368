"""What travels along with the result: its config, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxweights.recipes.mergekit._chat_templates import with_chat_template
from jaxweights.recipes.mergekit._config import MergeConfig, Module
from jaxweights.recipes.mergekit._model_ref import ModelRef
from jaxweights.recipes.mergekit._models import Model
from jaxweights.recipes.mergekit._plan import PlannedTensor
from jaxweights.recipes.mergekit._vocabulary import Vocabulary

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TEXT = ("", "text_config")
_VISION = (("vision_config",), ("num_hidden_layers", "depth"))
# Where a config tells the number of a module's layers, and how it calls it.
_LAYERS = {
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "encoder": (("",), ("encoder_layers", "num_layers")),
    "decoder": (("",), ("decoder_layers", "num_decoder_layers")),
}


def result_files(
    config: MergeConfig,
    models: Mapping[ModelRef, Model],
    planned: Sequence[PlannedTensor],
    vocabulary: Vocabulary | None,
) -> dict[str, str | bytes | Path]:
    """Files of the result by name: those of the base, else of the first model, made to fit."""
    first = models[config.models[0]]
    files: dict[str, Any] = dict(first.files)
    if vocabulary is not None:
        files = {name: file for name, file in files.items() if not _of_tokenizer(name)}
        others = vocabulary.owner.files
        files |= {name: file for name, file in others.items() if _of_tokenizer(name)}
        files["tokenizer.json"] = vocabulary.tokenizer
    if first.config:
        found = _config(config, first, planned, vocabulary)
        files["config.json"] = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    if config.chat_template is not None:
        every = [model.files for model in models.values()]
        files = with_chat_template(files, config.chat_template, every)
    return files


def _of_tokenizer(name: str) -> bool:
    words = ("token", "vocab", "merges", "spiece", "sentencepiece", "chat_template")
    return any(word in name for word in words)


def _config(
    config: MergeConfig,
    first: Model,
    planned: Sequence[PlannedTensor],
    vocabulary: Vocabulary | None,
) -> dict[str, Any]:
    """The first model's config with the layers, the dtype and the vocabulary of the result."""
    found = json.loads(json.dumps(dict(first.config)))
    for module in config.modules:
        if module.is_sliced:
            _count_layers(found, module)
    for level in (found, found.get("text_config")):
        if not isinstance(level, dict):
            continue
        if vocabulary is not None and "vocab_size" in level:
            level["vocab_size"] = vocabulary.rows
        for key in ("torch_dtype", "dtype"):
            if key in level and (config.out_dtype or config.dtype):
                level[key] = config.out_dtype or config.dtype
    return found


def _count_layers(found: dict[str, Any], module: Module) -> None:
    """Makes a config speak of as many layers of a module as the result has."""
    ranges = [part.sources[0].layers or (0, 0) for part in module.slices]
    inside, counts = _LAYERS.get(module.name or "", (_TEXT, _COUNTS))
    for name in inside:
        level = found.get(name) if name else found
        if not isinstance(level, dict):
            continue
        for key in counts:
            if key in level:
                level[key] = sum(stop - start for start, stop in ranges)
        types = level.get("layer_types")
        if isinstance(types, list):
            level["layer_types"] = [t for start, stop in ranges for t in types[start:stop]]
