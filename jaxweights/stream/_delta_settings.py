"""What a delta merge does with one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxweights.merge._delta import DeltaMerge
from jaxweights.merge._delta_leaf import Row
from jaxweights.merge._models import per_model


@dataclasses.dataclass(frozen=True)
class DeltaSettings:
    """One tensor's delta merge; numbers are per model.

    Args:
      row: The method's row of the table.
      weights: Weight of each delta.
      density: Share of each that is kept.
      outliers: Share of the largest entries that is dropped.
      scale: λ.
      models: Names, for random draws.
      seed: Of the run, for random draws.
    """

    row: Row
    weights: tuple[float, ...]
    density: tuple[float, ...]
    outliers: tuple[float, ...]
    scale: float
    models: tuple[str, ...]
    seed: int


def can_slice(settings: Any) -> bool:
    """Whether a transform's settings are those of a delta merge over the whole tree."""
    return (
        isinstance(settings, DeltaMerge)
        and settings.row.scope == "tree"
        and settings.row.sparsifier in ("none", "magnitude", "outliers")
        and settings.row.rescale == "none"
        and settings.output.rounding == "nearest"
        and settings.output.dtype is None
    )


def delta_settings(merge: DeltaMerge, names: Sequence[str], seed: int) -> DeltaSettings:
    """A transform's settings, spread over models of some names."""

    def spread(argument: str, value: Any, default: float) -> tuple[float, ...]:
        given = default if value is None else value
        return tuple(map(float, per_model("stream", argument, given, len(names))))

    return DeltaSettings(
        row=merge.row,
        weights=spread("weights", merge.weights, 1.0),
        density=spread("density", merge.density, 1.0),
        outliers=spread("outliers", merge.outliers, 0.0),
        scale=float(merge.scale),
        models=tuple(merge.names or names),
        seed=seed,
    )
