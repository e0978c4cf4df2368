"""Shards of safetensors that a stream fills."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxweights.checkpoint._disk import lengthen
from jaxweights.checkpoint._write_safetensors import (
    TensorPlan,
    head_of,
    plan_shards,
    shard_name,
    write_index,
)
from jaxweights.stream._destination import Place


class SafetensorsFiles:
    """Safetensors with their index.

    Args:
      plans: The tensors, in the order in which they are cut into shards.
      max_shard_bytes: Most bytes of tensors a file.
    """

    def __init__(self, plans: Sequence[TensorPlan], max_shard_bytes: int):
        """Cuts the tensors into shards."""
        self._shards = plan_shards(list(plans), max_shard_bytes)
        self.nbytes = sum(plan.nbytes for plan in plans)
        count = len(self._shards)
        self.names = tuple(shard_name(i, count) for i in range(1, count + 1))

    def make(self, folder: Path, *, anew: bool) -> Mapping[str, Place]:
        """Writes the head of every shard, which has its full length from the start."""
        places: dict[str, Place] = {}
        for name, shard in zip(self.names, self._shards, strict=True):
            file = folder / name
            head, starts = head_of(shard, {"format": "pt"})
            if anew:
                file.write_bytes(head)
            lengthen(file, len(head) + sum(plan.nbytes for plan in shard))
            for plan, start in starts:
                locate = functools.partial(_in_one_file, file, start, plan.nbytes)
                places[plan.name] = Place(plan.nbytes, locate)
        return places

    def finish(self, folder: Path, checksums: Mapping[str, str]) -> None:
        """Writes the index, where there are several shards."""
        if len(self._shards) > 1:
            shards = zip(self.names, self._shards, strict=True)
            weight_map = {plan.name: name for name, shard in shards for plan in shard}
            write_index(folder, weight_map, self.nbytes)


def _in_one_file(file: Path, start: int, nbytes: int, position: int) -> tuple[Path, int, int]:
    return file, start + position, nbytes - position
