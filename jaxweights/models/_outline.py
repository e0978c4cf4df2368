"""A model whose tensors are not read yet, and where each of them belongs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from jaxweights.core._paths import fail
from jaxweights.models._arrange import nest, stored_names
from jaxweights.models._convert import name_map
from jaxweights.models._differences import checkpoint_differences
from jaxweights.models._load import Pretrained, read_config, tokenizer_path_of
from jaxweights.models._names import TensorRule
from jaxweights.models._registry import build

_ASKER = "models.outline"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor of a checkpoint belongs.

    Attributes:
      stored: Its name in the checkpoint.
      written: The name under which it is written.
      rule: How it becomes part of a leaf, and a leaf becomes it.
      layer: Which layer of a stacked leaf it is, or None.
    """

    stored: str
    written: str
    rule: TensorRule
    layer: int | None


@dataclasses.dataclass(frozen=True)
class Outline:
    """A model without values.

    Attributes:
      pretrained: The model, with abstract arrays as parameters.
      places: Its tensors, in the order in which they are written.
      carried: Names of tensors that the model does not use.
    """

    pretrained: Pretrained
    places: tuple[Place, ...]
    carried: tuple[str, ...]


def outline(path: str | os.PathLike[str]) -> Outline:
    """Opens a checkpoint of dense tensors under the names of Hugging Face, and reads no tensor.

    Args:
      path: A folder with safetensors, or with Orbax arrays under the same names.

    Returns:
      The model and the places of its tensors.

    Raises:
      ValueError: If the checkpoint is of another kind, or does not fit its config.
    """
    from jaxweights.checkpoint import open_checkpoint

    source = open_checkpoint(path)
    if not source.is_torch or source.format == "gguf" or source.quantization:
        raise ValueError(
            f"{_ASKER}: '{path}': only dense tensors under the names of Hugging Face are read one "
            "by one."
        )
    config = read_config(source)
    names = name_map(config, "huggingface")
    expected = names.expected()
    carried = tuple(n for n in source.names if names.is_carried(names.canonical(n)))
    stored = stored_names((n for n in source.names if n not in carried), names, _ASKER)
    fail(_ASKER, checkpoint_differences(source.shape, stored, names))
    if names.tied_head is not None and names.tied_head[0] in stored:
        raise ValueError(
            f"{_ASKER}: '{path}': holds {names.tied_head[0]!r}, which its config ties to the "
            "embedding; whether both are equal is only seen in memory."
        )
    places = tuple(
        Place(stored[name], names.written_name(name), rule, layer)
        for name, (rule, layer) in expected.items()
    )
    dtypes: dict[str, set[np.dtype]] = {}
    for place in places:
        dtypes.setdefault(place.rule.path, set()).add(source.dtype(place.stored))
    fail(
        _ASKER,
        [
            f"{leaf!r}: its layers are {sorted(map(str, found))}. Cast them to one dtype."
            for leaf, found in dtypes.items()
            if len(found) > 1
        ],
    )
    leaves = {
        rule.path: jax.ShapeDtypeStruct(
            (names.num_layers, *rule.shape) if rule.stacked else rule.shape,
            next(iter(dtypes[rule.path])),
        )
        for rule in names.rules
    }
    params: Any = nest(leaves)
    pretrained = Pretrained(build(config), params, config, tokenizer_path_of(source), source, {})
    return Outline(pretrained, places, carried)
