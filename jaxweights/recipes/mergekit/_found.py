"""The numbers of a merge report, with what tensors and models are called on its page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxweights.recipes.mergekit._models import LayerName
from jaxweights.stream._delta_stats import DeltaStats


@dataclasses.dataclass(frozen=True)
class Found:
    """The numbers with what tensors and models are called on the page."""

    stats: Sequence[DeltaStats]
    models: dict[str, str]  # short names by label, of those that are not the origin
    origins: tuple[str, ...]
    layered: tuple[tuple[int, str, DeltaStats], ...]  # layer, kind and numbers of matrices

    @classmethod
    def of(cls, stats: Sequence[DeltaStats]) -> Found:
        labels = list(dict.fromkeys(label for one in stats for label in one.models))
        layered = []
        stacks = {p.before for one in stats if (p := LayerName.of(one.name)) is not None}
        for one in stats:
            parts = LayerName.of(one.name)
            if parts is None or len(one.shape) < 2:
                continue
            kind = re.sub(r"\.?weight$", "", re.sub(r"\.\d+\.", ".*.", parts.behind).lstrip("."))
            where = f"{parts.before.rstrip('.')}: " if len(stacks) > 1 else ""
            layered.append((parts.layer, where + (kind or "weight"), one))
        origins = tuple(dict.fromkeys(one.origin for one in stats))
        return cls(stats, short_names(labels), origins, tuple(layered))

    @property
    def has_pairs(self) -> bool:
        """Whether any tensor has two deltas."""
        return any(len(one.models) > 1 for one in self.stats)

    def grams(self, stats: Sequence[DeltaStats]) -> np.ndarray:
        """`(models, models)`, sums of products of whole deltas."""
        total = np.zeros((len(self.models),) * 2)
        for one in stats:
            places = self._places(one)
            np.add.at(total, np.ix_(places, places), one.gram)
        return total

    def mean_cosine(self, stats: Sequence[DeltaStats]) -> np.ndarray:
        """`(models, models)`, mean over tensors that both models change; NaN where none is."""
        total, count = np.zeros((2, len(self.models), len(self.models)))
        for one in stats:
            places = np.ix_(self._places(one), self._places(one))
            norms = np.diagonal(one.gram) > 0
            np.add.at(total, places, one.cosine)
            np.add.at(count, places, np.outer(norms, norms))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def _places(self, one: DeltaStats) -> list[int]:
        order = list(self.models)
        return [order.index(label) for label in one.models]


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, as many as tell them apart."""
    for parts in range(1, 5):
        short = ["/".join(Path(label).parts[-parts:]) or label for label in labels]
        if len(set(short)) == len(labels):
            return {a: _clipped(b) for a, b in zip(labels, short, strict=True)}
    return {label: label for label in labels}


def _clipped(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:12]}…{name[-15:]}"


def pair_cosines(one: DeltaStats) -> np.ndarray:
    """Cosines of the pairs of models that both change a tensor."""
    changed = np.flatnonzero(np.diagonal(one.gram) > 0)
    i, j = np.triu_indices(changed.size, 1)
    return one.cosine[changed[i], changed[j]]
