"""Models that a configuration names: opened, with their layers counted."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxweights.checkpoint import open_checkpoint
from jaxweights.stream._checkpoint import why_unread

# How checkpoints number their layers: `model.layers.3.`, `transformer.h.3.`, `encoder.block.3.`.
_LAYER = re.compile(r"((?:.*?\.)?(?:layers|layer|h|blocks|block)\.)(\d+)(\..+)")


@dataclasses.dataclass(frozen=True)
class LayerName:
    """A tensor's name as the number of a layer with what stands before and behind it."""

    before: str
    layer: int
    behind: str

    @classmethod
    def of(cls, name: str) -> LayerName | None:
        """The parts of a name, or None where it is not in a layer."""
        found = _LAYER.fullmatch(name)
        return found and cls(found[1], int(found[2]), found[3])

    def at(self, layer: int) -> str:
        """The same tensor's name in another layer."""
        return f"{self.before}{layer}{self.behind}"


@dataclasses.dataclass(frozen=True)
class Model:
    """An opened model.

    Args:
      label: What the configuration calls it.
      tensors: Its tensors: a `Checkpoint` or what reads like one.
      names: Their names.
      config: Its `config.json`.
      files: Files that travel along, by name.
      fingerprint: What tells its contents from others, quickly.
    """

    label: str
    tensors: Any
    names: tuple[str, ...]
    config: Mapping[str, Any]
    files: Mapping[str, Any]
    fingerprint: str

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The names as a set."""
        return frozenset(self.names)

    @functools.cached_property
    def stacks(self) -> dict[str, int]:
        """Number of layers by what stands before their numbers."""
        stacks: dict[str, int] = {}
        for name in self.names:
            parts = LayerName.of(name)
            if parts is not None:
                stacks[parts.before] = max(stacks.get(parts.before, 0), parts.layer + 1)
        return stacks

    def only(self, names: Collection[str]) -> Model:
        """The same model with some of its tensors."""
        return dataclasses.replace(self, names=tuple(n for n in self.names if n in names))

    def depth(self, name: str) -> float:
        """Where a tensor stands, from 0 for the first layer to 1 for the last."""
        parts = LayerName.of(name)
        if parts is None:
            return 0.0 if is_before_layers(name) else 1.0
        count = self.stacks[parts.before]
        return parts.layer / (count - 1) if count > 1 else 1.0


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers comes before them, as embeddings do."""
    return any(word in name for word in ("emb", "wte", "wpe"))


def open_model(label: str, path: str, beside: Path) -> Model:
    """Opens a model that lies where the command runs, or beside the configuration."""
    places = [Path(path).expanduser(), beside / path]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise FileNotFoundError(
            f"model {path!r} is neither a folder here nor beside the configuration, nor the name "
            "of an earlier document. Models are not downloaded: give the folder that holds one."
        )
    checkpoint = open_checkpoint(place)
    if (reason := why_unread(checkpoint)) is not None:
        raise ValueError(reason)
    return Model(
        label,
        checkpoint,
        checkpoint.names,
        checkpoint.config,
        checkpoint.files,
        checkpoint.fingerprint(sampled=True),
    )
