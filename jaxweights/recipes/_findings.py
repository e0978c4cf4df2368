"""What became of a model's leaves, found out tensor by tensor while it was changed."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.core import Layout
from jaxweights.core._plan import describe_leaf, leaf_bytes
from jaxweights.recipes._leaves import (
    LeafResult,
    difference,
    singular_values,
    spectra_name,
    why_left,
    worst_leaves,
)
from jaxweights.recipes._recipe import Recipe
from jaxweights.weights._axes import View


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was seen of one tensor.

    Attributes:
      layer: Its layer; 0 where it has none.
      bytes_before: Bytes of its arrays before.
      bytes_after: Bytes of its arrays after.
      representation: What it is after.
      changed: Whether a step changed it.
      zeros: Share of its entries that are zero after.
      errors: Relative errors of its matrices.
      spectra: Singular values before and after, where the report shows them.
    """

    layer: int
    bytes_before: int
    bytes_after: int
    representation: str
    changed: bool
    zeros: float
    errors: tuple[float, ...]
    spectra: tuple[list[float], list[float]] | None


class Findings:
    """What became of the leaves of a model; many threads may look at tensors at the same time.

    Args:
      recipe: What was run, for the reasons.
      layout: Axes of the leaves.
      shapes: Abstract leaves, by path.
    """

    def __init__(self, recipe: Recipe, layout: Layout, shapes: Mapping[str, Any]):
        """Has seen nothing yet."""
        self._recipe = recipe
        self._layout = layout
        self._shapes = shapes
        self._seen: dict[str, list[Seen]] = {}
        self._lock = threading.Lock()

    def look(self, path: str, layer: int | None, leaf: Any, new: Any) -> Seen:
        """Compares a tensor before and after, and keeps what the report says of it.

        Args:
          path: The leaf that it belongs to.
          layer: Its layer, if it has one.
          leaf: The tensor before: the leaf of a tree, with or without a stack of one layer.
          new: The same after.

        Returns:
          What was seen.
        """
        changed = new is not leaf
        axes = self._layout.get(path)
        errors, zeros, pair = (), 0.0, None
        if changed:
            view = None if axes is None else View.of(leaf.shape, axes)
            found, zero = difference(leaf, new, view)
            errors, zeros = tuple(np.asarray(found, float).ravel().tolist()), float(zero)
            middle = self._shapes[path].shape[0] // 2 if layer is not None else None
            if view is not None and self._recipe.output.report and layer == middle:
                pair = (singular_values(leaf, view), singular_values(new, view))
        one = Seen(
            layer or 0,
            leaf_bytes(leaf),
            leaf_bytes(new),
            describe_leaf(new),
            changed,
            zeros,
            errors,
            pair,
        )
        self.add(path, one)
        return one

    def add(self, path: str, one: Seen) -> None:
        """Takes in what was seen of a tensor, now or by an earlier run; the newest counts."""
        with self._lock:
            others = [other for other in self._seen.get(path, ()) if other.layer != one.layer]
            self._seen[path] = [*others, one]

    def leaves(self) -> tuple[LeafResult, ...]:
        """What became of each leaf, in the order of the in-memory report."""
        return tuple(self._leaf(path) for path in sorted(self._shapes))

    def spectra(self) -> dict[str, tuple[list[float], list[float]]]:
        """Singular values before and after, of the middle matrices of the worst leaves."""
        leaves = self.leaves()
        candidates = [leaf for leaf in leaves if leaf.changed and leaf.path in self._layout]
        found = {}
        for leaf in worst_leaves(candidates):
            pair = next((s.spectra for s in self._seen[leaf.path] if s.spectra is not None), None)
            if pair is not None:
                found[spectra_name(leaf, View.of(leaf.shape, self._layout[leaf.path]))] = pair
        return found

    def _leaf(self, path: str) -> LeafResult:
        shaped = self._shapes[path]
        if path not in self._seen:  # nobody looked: it was copied
            self.look(path, None, shaped, shaped)
        seen = sorted(self._seen[path], key=lambda one: one.layer)
        changed = any(one.changed for one in seen)
        return LeafResult(
            path=path,
            shape=tuple(shaped.shape),
            parameters=int(np.prod(shaped.shape, dtype=np.int64)),
            bytes_before=sum(one.bytes_before for one in seen),
            bytes_after=sum(one.bytes_after for one in seen),
            representation=seen[0].representation,
            changed=changed,
            why="" if changed else why_left(path, shaped, self._layout, self._recipe),
            zeros=float(np.mean([one.zeros for one in seen])) if changed else 0.0,
            errors=tuple(error for one in seen for error in one.errors),
        )
