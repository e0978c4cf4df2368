"""A checkpoint's tensors under the names of a format, each made when it is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core._paths import Path, fail
from jaxweights.models._arrange import stored_names
from jaxweights.models._convert import name_map, tell_convention
from jaxweights.models._differences import checkpoint_differences
from jaxweights.models._names import Convention, TensorRule
from jaxweights.models._registry import ModelConfig
from jaxweights.weights._weight import is_weight

if TYPE_CHECKING:
    from jaxweights.checkpoint import Checkpoint

_ASKER = "models.lazy_tensors"
# Given the leaf that a tensor belongs to, and the tensor as one matrix or vector of that leaf.
Change = Callable[[Path, Any], Any]


def lazy_tensors(
    source: Checkpoint,
    config: ModelConfig,
    *,
    convention: Convention,
    represented: bool,
    dtype: DTypeLike | None = None,
    change: Change | None = None,
) -> dict[str, Any]:
    """What `write_tree` makes of a model, but tensor by tensor: nothing is read before it is used.

    Args:
      source: A checkpoint of tensors under the names of Hugging Face or of GGUF.
      config: Of its model.
      convention: Whose names and orientations the tensors get.
      represented: Whether quantized tensors stay so, or are read as the dense ones that they
        stand for.
      dtype: Dtype to which floats are cast, and in which represented weights materialise.
      change: What is done to each tensor on the way.

    Returns:
      A `LazyWeight` by name, in the order in which they are written.

    Raises:
      ValueError: If tensors are missing, unexpected or misshapen, all of which are listed, or a
        head is stored that differs from the embedding that the config ties it to.
    """
    from jaxweights.checkpoint.exchange._module import LazyWeight

    if not source.is_torch:
        raise ValueError(
            f"{_ASKER}: '{source.path}' holds a tree of parameters, not tensors under the names of "
            "Hugging Face or GGUF."
        )
    names = name_map(config, tell_convention(source.names))
    left = set(carried_names(source, config))
    stored = stored_names((n for n in source.names if n not in left), names, _ASKER)
    fail(_ASKER, checkpoint_differences(source.shape, stored, names))
    expected = names.expected().items()
    places = {(rule.path, layer): (stored[name], rule) for name, (rule, layer) in expected}
    if names.tied_head is not None and names.tied_head[0] in stored:
        head, path = names.tied_head
        _check_tied(source, stored[head], places[path, None][0])
    written = name_map(config, convention)

    def lazy(rule: TensorRule, layer: int | None) -> LazyWeight:
        held, given = places[rule.path, layer]

        def read() -> Any:
            part = given.from_checkpoint(
                source.represented(held) if represented else source.read(held)
            )
            if dtype is not None:
                part = _cast(part, dtype)
            if change is not None:
                part = change(rule.path, part)
            made = rule.to_checkpoint(part)
            # What was read where it lies mapped would stay in this process.
            if (place := source.mapped(held)) is not None:
                made = made if is_weight(made) else np.array(made)
                place.forget(0, math.prod(source.shape(held)))
            return made

        return LazyWeight(read)

    wanted = written.expected().items()
    return {written.written_name(name): lazy(rule, layer) for name, (rule, layer) in wanted}


def carried_names(source: Checkpoint, config: ModelConfig) -> tuple[str, ...]:
    """Names of tensors that the model has no use for; among them biases of zero."""
    from jaxweights.models._load import carried_tensors

    if source.format == "gguf":
        names = name_map(config, "gguf")
        return tuple(n for n in source.names if names.is_carried(names.canonical(n)))
    return tuple(carried_tensors(source, name_map(config, "huggingface")))


def _cast(part: Any, dtype: DTypeLike) -> Any:
    if is_weight(part):
        return part.astype(dtype) or part
    is_float = jax.numpy.issubdtype(part.dtype, jax.numpy.floating)
    return part.astype(np.dtype(dtype)) if is_float else part


def _check_tied(source: Checkpoint, head: str, embedding: str) -> None:
    """Refuses a head of its own where the config says that the embedding is the head."""
    if not np.array_equal(source.read(head), source.read(embedding), equal_nan=True):
        raise ValueError(
            f"{_ASKER}: {head!r} differs from the embedding, but the config ties them. Set "
            "tie_word_embeddings to false in config.json."
        )
