"""Context: what a transform may read besides the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxweights.core._layout import Layout
from jaxweights.core._paths import Flat, Path
from jaxweights.core._stats import Stats

Progress = Callable[[Path, int, int], None]

_REMEDIES = {
    "stats": "pass stats=calibrate(fn, params, batches, needs=tx.needs(params))",
    "models": "pass models=[...], trees of the same structure as params",
    "grads": "pass grads, a tree of the same structure as params",
    "step": "pass step, the number of updates so far",
    "key": "pass key=jax.random.key(...): this transform draws random numbers",
    "layout": "pass layout=infer_layout(fn, params, *inputs)",
}


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Everything that `update` reads besides parameters and state; a pytree.

    Args:
      stats: Calibration statistics.
      models: Other models, as flat trees.
      grads: Gradients, as a flat tree.
      step: Updates so far, int32 scalar.
      key: A `jax.random.key`; transforms fold each leaf's path into it.
      layout: Which axes of each leaf form its matrix.
      named: Whether a rule of `partition` named the leaves: then a leaf that a transform would
        leave alone by default is transformed, and one that it cannot transform is an error.
      only: Paths that may change; None for all. Rules still see every name.
      tied: Pairs (path, other path) of leaves that are one array; the tree holds the first.
      progress: Called on the host with (path, done, total) after each leaf.
    """

    stats: Stats | None = None
    models: tuple[Flat, ...] | None = None
    grads: Flat | None = None
    step: jax.Array | None = None
    key: jax.Array | None = None
    layout: Layout = dataclasses.field(default=Layout(), metadata=_STATIC)
    named: bool = dataclasses.field(default=False, metadata=_STATIC)
    only: frozenset[Path] | None = dataclasses.field(default=None, metadata=_STATIC)
    tied: tuple[tuple[Path, Path], ...] = dataclasses.field(default=(), metadata=_STATIC)
    progress: Progress | None = dataclasses.field(default=None, metadata=_STATIC)

    def require(self, field: str, asker: str) -> Any:
        """A field that must be there.

        Raises:
          ValueError: If it is missing, naming it and saying how to supply it.
        """
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"{asker}: {field!r} is missing: {_REMEDIES[field]}.")
        return value
