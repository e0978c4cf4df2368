"""Transforms a model block by block: read, calibrate, transform, keep, go on."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.calibrate._blocks import BlockPrograms, LayerInput, apply_inside
from jaxweights.core import Path as LeafPath
from jaxweights.core import Stats, Transform
from jaxweights.core._paths import fail
from jaxweights.core._plan import leaf_bytes
from jaxweights.recipes._bytes import say_bytes
from jaxweights.recipes._download import Progress
from jaxweights.recipes.onload._block_files import BlockFiles
from jaxweights.recipes.onload._hidden_states import HiddenStates
from jaxweights.recipes.onload._layers import Layers
from jaxweights.recipes.onload._needs import Bytes, needed_bytes
from jaxweights.recipes.onload._stages import Again, plan_stages, why_not_in_blocks
from jaxweights.stream._memory import release_freed_pages

TASK = "Blocks"
# What a caller wants to keep of a leaf before and after, as JSON: `look(path, layer, old, new)`.
Look = Callable[[LeafPath, int, Any, Any], Any]
_TOKENS = (jax.ShapeDtypeStruct((1, 8), np.int32),)


class BlockRun:
    """One run over the blocks of a model.

    Everything that can be refused is refused when it is made: nothing of the model is read then.

    Args:
      asker: Start of the error messages.
      layers: The model.
      transforms: What is done to each block, in order.
      batches: Calibration batches; empty where no transform reads statistics.
      again: As in `plan_stages`.
      key: Randomness, folded with each stage's number and each layer's.
      memory: Most bytes that the process may hold.

    Raises:
      ValueError: If a transform looks beyond a block, or the memory does not suffice.
    """

    def __init__(
        self,
        asker: str,
        layers: Layers,
        transforms: Sequence[Transform],
        batches: Sequence[Any],
        *,
        again: Again = "each_block",
        key: jax.Array | None = None,
        memory: int | None = None,
    ):
        """Plans, and compiles what collects statistics."""
        self._asker = asker
        self._layers = layers
        self._key = key
        forward = lambda params, *inputs: layers.pretrained.model.apply(  # noqa: E731
            {"params": params}, *inputs
        )
        batch = batches[0] if batches else _TOKENS
        self._programs = BlockPrograms(forward, layers.pretrained.params, batch)
        inside = self._programs.model.inside
        fail(asker, filter(None, (why_not_in_blocks(tx, inside) for tx in transforms)))
        self._stages = plan_stages(transforms, again)
        # Stages that compare blocks with what they were before them.
        self._comparing = {
            number
            for number, stage in enumerate(self._stages)
            if stage.reads is not None
            and self._programs.compares(stage.transform.needs(layers.shapes))
        }
        if self._comparing and again != "each_block":
            raise ValueError(
                f"{asker}: again={again!r}: what makes up for errors of inputs "
                "(error_propagation, asymmetric_calibration) compares every block of layers with "
                "the original one, so they are gone through one by one. Choose 'each_block'."
            )
        reads = {stage.reads for stage in self._stages if stage.reads is not None}
        self._streams = sorted(reads | self._comparing)
        if self._streams and not batches:
            raise ValueError(f"{asker}: there is no batch to calibrate on. Pass at least one.")
        self._batches = list(batches) if self._streams else []
        self.needed: Bytes = needed_bytes(layers, self._programs, self._stages, self._batches)
        if memory is not None and self.needed.total > memory:
            raise ValueError(
                f"{asker}: memory={say_bytes(memory)} does not suffice: one block needs about "
                f"{say_bytes(self.needed.total)} ({self.needed}). Give "
                f"{say_bytes(self.needed.total)} or more, or take smaller batches."
            )
        read = self._programs.read_shapes
        self._carried = [read(layers.shapes, batch).carried for batch in self._batches]
        self._shared_leaves: dict[LeafPath, Any] = {}

    @property
    def programs(self) -> BlockPrograms:
        """The programs of the model's layers."""
        return self._programs

    @property
    def disk_bytes(self) -> int:
        """Bytes of the files that lie beside the result while it is made."""
        states = HiddenStates(Path(), self._carried).nbytes
        blocks = sum(map(leaf_bytes, self._layers.shapes.values()))
        return 2 * len(self._streams) * states + blocks

    def run(self, folder: Path, *, look: Look, progress: Progress) -> BlockFiles:
        """Transforms all blocks that are not done.

        Args:
          folder: Where finished blocks and what the next one reads are kept; a run goes on with
            what an earlier one left there.
          look: Is given each leaf of a block before and after.
          progress: Called with (task, blocks done, blocks in all).

        Returns:
          The finished blocks.
        """
        folder.mkdir(exist_ok=True)
        files, states = BlockFiles(folder), HiddenStates(folder, self._carried)
        count = self._layers.count
        first = self._first(files, states)
        progress(TASK, first, count)
        if first < count:
            model = self._programs.model
            self._shared_leaves = {p: self._layers.read(p) for p in sorted(model.shared.reads)}
            if first == 0:
                self._enter(states)
        for layer in range(first, count):
            self._transform(layer, files, states, look)
            progress(TASK, layer + 1, count)
        return files

    def _first(self, files: BlockFiles, states: HiddenStates) -> int:
        """The first layer that is not done."""
        done = 0
        while done < self._layers.count and files.is_there(done):
            done += 1
        if done == self._layers.count:
            return done
        # A block is done when the next one's inputs are there, too.
        while done and not all(states.are_there(stream, done) for stream in self._streams):
            done -= 1
        return done

    def _enter(self, states: HiddenStates) -> None:
        """Runs what comes before the layers, once for all of them."""
        if not self._streams:
            return
        paths = self._programs.model.carry.reads
        leaves = {path: self._layers.read(path) for path in sorted(paths)}
        self._refuse_full(states)
        first, *others = self._streams
        states.write(first, 0, (self._programs.enter(leaves, one) for one in self._batches))
        for stream in others:
            states.write(stream, 0, states.read(first, 0))

    def _refuse_full(self, states: HiddenStates) -> None:
        wanted, folder = self.disk_bytes, states.folder
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise OSError(
                errno.ENOSPC,
                f"{self._asker}: what lies beside the result while it is made takes {wanted} "
                f"bytes, but only {free} are free on its disk. Free some space, choose another "
                "disk, or calibrate on fewer tokens.",
            )

    def _transform(self, layer: int, files: BlockFiles, states: HiddenStates, look: Look) -> None:
        """Makes one block, and what the next one reads."""
        inside = self._programs.model.inside
        block = self._layers.block(inside, layer)
        behind = {0: block}  # the block behind so many stages
        for number, stage in enumerate(self._stages):
            stats = Stats({}, (), self._programs.layout)
            if stage.reads is not None:
                needs = stage.transform.needs(self._layers.shapes | block)
                original = number if number in self._comparing else None
                inputs = self._inputs(states, stage.reads, layer, original)
                stats = self._programs.calibrate(needs, block, inputs, layer)
            release_freed_pages()
            block = self._apply(number, block, stats, layer)
            behind[number + 1] = block
        del stats
        release_freed_pages()
        changed = {path: leaf for path, leaf in block.items() if leaf is not behind[0][path]}
        said = {path: look(path, layer, behind[0][path], block[path]) for path in inside}
        files.write(layer, changed, said)
        if layer + 1 == self._layers.count:
            return
        for stream in self._streams:
            inputs, given = self._inputs(states, stream, layer), behind[stream]
            outs = (self._programs.advance(given, one, layer) for one in inputs)
            states.write(stream, layer + 1, outs)
        for stream in self._streams:
            states.drop(stream, layer)
        release_freed_pages()

    def _apply(
        self, number: int, block: dict[LeafPath, Any], stats: Stats, layer: int
    ) -> dict[LeafPath, Any]:
        key = self._key
        for part in (number, layer):
            key = None if key is None else jax.random.fold_in(key, part)
        transform, flat = self._stages[number].transform, self._layers.shapes | block
        return apply_inside(transform, flat, [*block], stats, stats.layout, key)

    def _inputs(
        self, states: HiddenStates, stream: int, layer: int, original: int | None = None
    ) -> Iterator[LayerInput]:
        """What a layer reads batch by batch, and what another stream has in its place."""
        on_device = lambda arrays: [jax.numpy.asarray(array) for array in arrays]  # noqa: E731
        others = itertools.repeat(None) if original is None else states.read(original, layer)
        for batch, carried, other in zip(
            self._batches, states.read(stream, layer), others, strict=False
        ):
            one = self._programs.read(self._shared_leaves, batch, on_device(carried))
            yield one if other is None else one._replace(original=on_device(other))
