"""What running a model block by block takes, told before it is run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxweights.calibrate._blocks import BlockPrograms, apply_inside
from jaxweights.core import Path, Stats
from jaxweights.core._plan import leaf_bytes
from jaxweights.recipes._bytes import say_bytes
from jaxweights.recipes.onload._layers import Layers
from jaxweights.recipes.onload._stages import Stage
from jaxweights.stream._memory import resident_bytes

# What a method holds beside a leaf and its statistics: float32 copies of the leaves that share
# them, and a damped Gram matrix, its factor and what the factorization works in.
_WIDE_BYTES = 20
_GRAMS = 4
# Compiled programs and what compiling them takes; measured on CPU: 190 MB for a Llama's GPTQ.
_PROGRAMS = 224 << 20


@dataclasses.dataclass(frozen=True)
class Bytes:
    """What is held at the same time, in bytes.

    Attributes:
      process: What the process holds before, with the programs that it will compile.
      block: The tensors of one block, before and after.
      statistics: Of the inputs of one block.
      batch: Activations of one batch.
      method: What the method works in.
      outside: What is read of an embedding or head at once, when no block is held.
    """

    process: int
    block: int
    statistics: int
    batch: int
    method: int
    outside: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        inside = self.block + self.statistics + max(self.batch, self.method)
        return self.process + max(inside, self.outside)

    def __str__(self) -> str:
        """In words, for errors."""
        parts = [
            (self.process, "for the process and its programs"),
            (self.block, "for the tensors of a block"),
            (self.statistics, "for their statistics"),
            (self.batch, "for the activations of a batch"),
            (self.method, "for what the method works in"),
            (self.outside, "for the embedding alone"),
        ]
        return ", ".join(f"{say_bytes(count)} {what}" for count, what in parts if count)


def needed_bytes(
    layers: Layers,
    programs: BlockPrograms,
    stages: Sequence[Stage],
    batches: Sequence[Any],
) -> Bytes:
    """Counts what a run will hold, from shapes; compiles the programs that collect statistics.

    Args:
      layers: The model.
      programs: Its programs.
      stages: What is done.
      batches: What it is calibrated on.

    Returns:
      The counts.
    """
    inside = programs.model.inside
    block = before = layers.block_shapes(inside)
    statistics = batch = method = 0
    for stage in stages:
        stats = Stats({}, (), programs.layout)
        if stage.reads is not None:
            needs = stage.transform.needs(layers.shapes | block)
            largest = max(batches, key=tree_bytes)
            one = programs.read_shapes(layers.shapes, largest)
            if programs.compares(needs):
                one = one._replace(original=one.carried)
            stats, temporaries = programs.abstract(needs, block, one)
            # Beside what comes in: what goes out, and NumPy's copy of one of them.
            passing = tree_bytes((one.shared, one.original)) + 3 * tree_bytes(one.carried)
            batch = max(batch, temporaries + passing)
        statistics = max(statistics, tree_bytes(stats.values))
        method = max(method, _method_bytes(block, stats))
        block = _after(layers, stage, block, stats, inside)
    sizes = [math.prod(leaf.shape) for leaf in before.values()]
    # A block is read while none is held, and one of its leaves is made dense to be compared.
    held = tree_bytes(before) + tree_bytes(block)
    held = max(held + 8 * max(sizes), 2 * tree_bytes(before))
    outside = [tree_bytes(leaf) for path, leaf in layers.shapes.items() if path not in before]
    process = resident_bytes() + _PROGRAMS
    return Bytes(process, held, statistics, batch, method, 3 * max(outside, default=0))


def _after(
    layers: Layers, stage: Stage, block: Any, stats: Stats, inside: Sequence[Path]
) -> dict[Path, Any]:
    """Abstract leaves of a block behind a stage."""
    flat = layers.shapes | block

    def run(leaves: list[Any], stats: Stats, key: jax.Array) -> dict[Path, Any]:
        given = dict(zip(flat, leaves, strict=True))  # in the tree's order, not that of the keys
        return apply_inside(stage.transform, given, inside, stats, stats.layout, key)

    return jax.eval_shape(run, list(flat.values()), stats, jax.random.key(0))


def _method_bytes(block: Any, stats: Stats) -> int:
    """What a method works in at most, of the leaves that share their statistics."""
    most = 0
    for owner in dict.fromkeys(stats.owner(path) for path in block):
        sharing = [leaf for path, leaf in block.items() if stats.owner(path) == owner]
        entries = sum(math.prod(leaf.shape) for leaf in sharing)
        held = tree_bytes(stats.values.get(owner, {}))
        most = max(most, _WIDE_BYTES * entries + _GRAMS * held)
    return most


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, abstract ones too."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))
