"""Units with permutations inside them: heads are compared as their best inner matches make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.align._assignment import best_assignment
from jaxweights.align._permute import permute_flat
from jaxweights.align._similarity import Similarity, inner_products
from jaxweights.align._spec import PermutationSpec
from jaxweights.core._paths import Path

# A gain in the sum of float32 products that rounding cannot make up, as a share of the sum.
_SURE = 1e-5


class JointSimilarity:
    """Similarity of the units of one permutation, each pair under its best inner permutations.

    A leaf with one inner permutation is exact in it. One with several (an output projection whose
    input has queries and values inside heads) is not linear in them; it counts as it lies, and the
    gain is measured afterwards.

    Args:
      spec: Names the axes.
      name: The outer permutation.
      flat: A tree, for its shapes and dtypes.

    Attributes:
      inner: Permutations that differ along this one and what it differs along, nothing else.
    """

    def __init__(self, spec: PermutationSpec, name: str, flat: Mapping[Path, Any]) -> None:
        self.spec, self.name, self.flat = spec, name, flat
        above = (*spec.over.get(name, ()), name)
        self.inner = [key for key, entry in spec.over.items() if entry == above]
        self.paths = [path for path in spec.leaves_of(name) if path in flat]
        on_leaf = {p: [c for c in self.inner if p in spec.leaves_of(c)] for p in self.paths}
        self.inside = {
            child: Similarity(
                spec, (name, child), flat, [p for p in on_leaf if on_leaf[p] == [child]]
            )
            for child in self.inner
        }
        rest = [path for path, children in on_leaf.items() if len(children) != 1]
        self.outside = Similarity(spec, (name,), flat, rest)

    def best_moves(
        self, ours: Mapping[Path, Any], theirs: Mapping[Path, Any]
    ) -> tuple[dict[str, np.ndarray], float]:
        """Moves of the permutation and those inside it, and what they gain.

        Places in the stack where nothing is surely gained stay.

        Args:
          ours: The model that stays.
          theirs: The other, as permuted so far.

        Returns:
          Moves by name, and their gain.
        """
        names = [self.name, *self.inner]
        moves = {name: self.spec.identity()[name].copy() for name in names}
        scale = np.zeros(self.spec.shape_of(self.name)[:-1])
        for i in range(self.outside.shape[0]) if self.outside.stacked else (None,):
            place = ... if i is None else i
            outside = np.asarray(self.outside.at(ours, theirs, i))
            inside = [np.asarray(x.at(ours, theirs, i)) for x in self.inside.values()]
            for rest in np.ndindex(outside.shape[:-2]):
                found = _best_nested(outside[rest], [x[rest] for x in inside])
                at = rest if place is ... else (place, *rest)
                scale[at] = found[1]
                for name, move in zip(names, found[0], strict=True):
                    moves[name][at] = move
        leaves = {path: theirs[path] for path in self.paths}
        moved = permute_flat(self.spec, leaves, moves)
        over = self.spec.over.get(self.name, ())
        before, after = (
            np.asarray(inner_products(self.spec, over, ours, x), np.float64)
            for x in (leaves, moved)
        )
        sure = after - before > _SURE * scale
        for name, identity in self.spec.identity().items():
            if name in moves:
                wide = sure.reshape(sure.shape + (1,) * (identity.ndim - sure.ndim))
                moves[name] = np.where(wide, moves[name], identity)
        return moves, float((after - before)[sure].sum())


def _best_nested(outside: np.ndarray, inside: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """Assigns units whose inner entries are assigned for every pair.

    Args:
      outside: `(n, n)`, what does not depend on inner permutations.
      inside: `(n, n, m, m)` of every inner permutation.

    Returns:
      The unit for every unit and the entries inside, `(n,)` and `(n, m)`; the sum of magnitudes.
    """
    n = len(outside)
    total = outside.astype(np.float64)
    choices = []
    for pairs in inside:
        choice = np.zeros(pairs.shape[:3], np.int32)
        for i, j in np.ndindex(n, n):
            choice[i, j], gain = best_assignment(pairs[i, j])
            total[i, j] += pairs[i, j].trace(dtype=np.float64) + gain
        choices.append(choice)
    best, _ = best_assignment(total)
    rows = np.arange(n)
    return [best, *(choice[rows, best] for choice in choices)], float(
        np.abs(total[rows, best]).sum()
    )
