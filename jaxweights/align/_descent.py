"""Coordinate descent: one exact assignment after another, each with the others as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from jaxweights.align._assignment import best_assignment
from jaxweights.align._joint import JointSimilarity
from jaxweights.align._permute import follow, permute_flat
from jaxweights.align._similarity import Similarity, inner_product
from jaxweights.align._spec import Permutations, PermutationSpec
from jaxweights.core._layout import is_float
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import Flat, fail


class Descent:
    """Coordinate descent over the permutations of a spec.

    Args:
      name: What errors call the caller.
      spec: Names the axes.
      ours: The model that stays.
      theirs: The other model, already permuted by `permutations`.
      permutations: Where it starts.

    Attributes:
      theirs: The other model, permuted by all that was found.
      objective: Its history.
      stale: Permutations whose leaves changed since they were solved.
    """

    def __init__(
        self,
        name: str,
        spec: PermutationSpec,
        ours: Flat,
        theirs: Flat,
        permutations: Permutations,
    ) -> None:
        self.name, self.spec = name, spec
        kept = [path for path in spec.axes if path in ours]
        self.ours: Flat = {path: ours[path] for path in kept}
        self.theirs: Flat = {path: theirs[path] for path in kept}
        self.permutations = spec.identity() | dict(permutations)
        self.objective = [inner_product(self.ours, self.theirs)]
        if not np.isfinite(self.objective[0]):
            fail(name, nonfinite(self.ours, "params_a") + nonfinite(self.theirs, "params_b"))
        self.similarities = {key: Similarity(spec, [key], self.ours) for key in spec.names}
        leaves = {key: set(spec.leaves_of(key)) for key in spec.names}
        self.neighbours = {
            key: {other for other in spec.names if other != key and leaves[key] & leaves[other]}
            for key in spec.names
        }
        self.stale = set(spec.names)
        joint = {key: JointSimilarity(spec, key, self.ours) for key in spec.names}
        self.joint = {key: value for key, value in joint.items() if value.inner}

    def run(self, orders: Iterator[Sequence[str]], max_sweeps: int) -> int:
        """Sweeps until nothing can be improved, and says how often it did."""
        sweeps = 0
        while sweeps < max_sweeps and self.stale:
            self.sweep(next(orders))
            sweeps += 1
        return sweeps

    def sweep(self, order: Sequence[str]) -> None:
        """Visits what is stale once."""
        waiting = list(order)
        workers = min(os.cpu_count() or 1, 8)
        with futures.ThreadPoolExecutor(workers) as pool:
            while waiting:
                together: list[str] = []
                while waiting and not self.neighbours[waiting[0]].intersection(together):
                    name = waiting.pop(0)
                    # What a permutation of this group changes is no leaf of this one.
                    if name in self.stale:
                        together.append(name)
                self._solve(together, pool.submit, 2 * workers)

    def _solve_jointly(self, name: str) -> bool:
        """Moves units together with what is inside them, wherever that is a gain."""
        moves, gain = self.joint[name].best_moves(self.ours, self.theirs)
        if gain > 0:
            self._accept(moves, gain)
            self.stale |= moves.keys()
        return gain > 0

    def _solve(self, names: Sequence[str], submit: Callable[..., Any], ahead: int) -> None:
        """Improves permutations that share no leaf."""
        for name in [name for name in names if name in self.joint]:
            if not self._solve_jointly(name):
                del self.joint[name]
        shapes = {name: self.spec.shape_of(name) for name in names}
        moves = {name: np.zeros(shapes[name], np.int32) for name in names}
        gains = dict.fromkeys(names, 0.0)
        running: list[tuple[str, Any, Any]] = []

        def collect() -> None:
            name, place, job = running.pop(0)
            move, gain = job.result()
            moves[name][place] = move
            gains[name] += gain

        for name in names:
            for place, block in self.similarities[name].blocks(self.ours, self.theirs):
                running.append((name, place, submit(_assign, block)))
                if len(running) > ahead:
                    collect()
        while running:
            collect()
        for name in names:
            self.stale.discard(name)
            if gains[name] > 0:
                self._accept({name: moves[name]}, gains[name])

    def _accept(self, moves: dict[str, np.ndarray], gain: float) -> None:
        paths = {path for name in moves for path in self.spec.leaves_of(name)}
        leaves = {path: self.theirs[path] for path in self.theirs if path in paths}
        self.theirs |= permute_flat(self.spec, leaves, moves)
        self.permutations = follow(self.spec, self.permutations, moves)
        self.objective.append(self.objective[-1] + gain)
        self.stale |= set().union(*(self.neighbours[name] for name in moves))


def _assign(block: jax.Array) -> tuple[np.ndarray, float]:
    """Best assignments of a stack of matrices, and what they gain together."""
    matrices = np.asarray(block)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    solved = [best_assignment(matrix) for matrix in flat]
    moves = np.stack([move for move, _ in solved])
    return moves.reshape(matrices.shape[:-1]), sum(gain for _, gain in solved)


def nonfinite(flat: Mapping[str, Any], label: str) -> list[str]:
    """Every leaf of a model that is not finite."""
    return [
        f"{label}: {describe_nonfinite(path, leaf)}"
        for path, leaf in flat.items()
        if is_float(leaf) and not bool(jax.numpy.isfinite(leaf).all())
    ]
