"""Perplexity of a model before and behind its change, of which one block is held at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.calibrate._blocks import BlockPrograms
from jaxweights.calibrate._scanned import ScannedModel
from jaxweights.core import Path as LeafPath
from jaxweights.recipes._download import Progress
from jaxweights.recipes._perplexity import PerplexityScore, nll_of_logits, score_windows
from jaxweights.recipes._tokens import equal_batches
from jaxweights.recipes.onload._block_files import BlockFiles
from jaxweights.recipes.onload._hidden_states import HiddenStates
from jaxweights.recipes.onload._layers import Layers
from jaxweights.recipes.onload._needs import tree_bytes
from jaxweights.stream._memory import release_freed_pages

TASK = "Measuring blocks"
_STREAMS = ("before", "after")


class BlockMeasure:
    """Measures the original model and the changed one in one pass over their blocks.

    Args:
      asker: Start of the error messages.
      layers: The original model.
      programs: Its programs.
      tokens: `(windows, time)`, integers.
      batch: Windows at a time.

    Raises:
      ValueError: If what the model does behind its layers cannot be told from them.
    """

    def __init__(
        self, asker: str, layers: Layers, programs: BlockPrograms, tokens: np.ndarray, batch: int
    ):
        """Plans, and compiles what makes likelihoods of what the last block gives."""
        self._layers, self._programs = layers, programs
        self._count, self._length = tokens.shape
        self._batches = [(rows,) for rows in equal_batches(tokens, min(batch, len(tokens)))]
        self._model = programs.of(self._batches[0])
        if self._model.exit is None:
            raise ValueError(
                f"{asker}: the model reads its layers' results otherwise than one behind the "
                "other, so it cannot be measured block by block. Leave `evaluate` out, or remove "
                "`memory`."
            )
        self._leave = jax.jit(_leave, static_argnames="model")
        one = programs.read_shapes(layers.shapes, self._batches[0])
        self._carried = [one.carried] * len(self._batches)
        self.needed = self._needed_bytes(one)

    def run(self, folder: Path, files: BlockFiles, progress: Progress) -> dict[str, Any]:
        """Measures both.

        Args:
          folder: Where what the blocks pass on is kept.
          files: The changed blocks.
          progress: Called with (task, blocks done, blocks in all).

        Returns:
          Scores by "before" and "after".
        """
        folder.mkdir(exist_ok=True)
        states, programs, count = HiddenStates(folder, self._carried), self._programs, self._count
        leaves = self._read(self._model.carry.reads)
        states.write(0, 0, (programs.enter(leaves, batch) for batch in self._batches))
        states.write(1, 0, states.read(0, 0))
        del leaves
        shared = self._read(self._model.shared.reads)
        for layer in range(self._layers.count):
            progress(TASK, layer, self._layers.count)
            block: dict[LeafPath, Any] = self._layers.block(self._model.inside, layer)
            for stream in range(len(_STREAMS)):
                if stream:
                    changed = {path: files.read(layer, path) for path in files.paths(layer)}
                    block |= jax.tree.map(jnp.asarray, changed)
                outs = (
                    programs.advance(block, programs.read(shared, batch, carried), layer)
                    for batch, carried in self._carried_by(states, stream, layer)
                )
                states.write(stream, layer + 1, outs)
                states.drop(stream, layer)
            del block
            release_freed_pages()
        progress(TASK, self._layers.count, self._layers.count)
        assert self._model.exit is not None
        leaves = self._read(self._model.exit.reads)
        scores: dict[str, PerplexityScore] = {}
        for stream, when in enumerate(_STREAMS):
            found: list[float] = []
            for (rows,), carried in self._carried_by(states, stream, self._layers.count):
                nll = self._leave(leaves, jnp.asarray(rows), carried, model=self._model)
                found += np.asarray(nll, np.float64).tolist()
            states.drop(stream, self._layers.count)
            scores[when] = score_windows(np.asarray(found[:count]), self._length)
        return dict(scores)

    def _read(self, paths: Any) -> dict[LeafPath, jax.Array]:
        return {path: self._layers.read(path) for path in sorted(paths)}

    def _carried_by(
        self, states: HiddenStates, stream: int, layer: int
    ) -> Iterator[tuple[Any, list[jax.Array]]]:
        for batch, arrays in zip(self._batches, states.read(stream, layer), strict=True):
            yield batch, [jnp.asarray(array) for array in arrays]

    def _needed_bytes(self, one: Any) -> int:
        """What making likelihoods takes, and what the blocks take, whichever is more."""
        assert self._model.exit is not None
        leaves = {path: self._layers.shapes[path] for path in self._model.exit.reads}
        rows = jax.ShapeDtypeStruct(self._batches[0][0].shape, jnp.int32)
        program = self._leave.lower(leaves, rows, one.carried, model=self._model).compile()
        analysis = program.memory_analysis()  # None where a platform does not tell
        temporaries = 0 if analysis is None else analysis.temp_size_in_bytes
        behind = 2 * tree_bytes(leaves) + temporaries + tree_bytes(one.carried)
        block = self._layers.block_shapes(self._model.inside)
        return max(behind, 2 * tree_bytes(block) + 4 * tree_bytes((one.shared, one.carried)))


def _leave(
    leaves: dict[LeafPath, Any], rows: jax.Array, carried: list[jax.Array], *, model: ScannedModel
) -> jax.Array:
    assert model.exit is not None
    logits, *_ = model.exit.run(leaves, [rows], carried)
    return nll_of_logits(logits, rows)
