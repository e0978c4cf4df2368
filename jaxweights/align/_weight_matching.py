"""weight_matching: the renumbering of one model's units that brings it closest to another."""

from __future__ import annotations

import concurrent.futures as futures
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxweights.align._assignment import best_assignment
from jaxweights.align._permute import check_permutations, follow, permute_flat
from jaxweights.align._similarity import Similarity, inner_product
from jaxweights.align._spec import Permutations, PermutationSpec
from jaxweights.core._layout import is_float
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import Flat, Params, fail, flatten

Order = Sequence[Sequence[str]]


class Matching(NamedTuple):
    """What `weight_matching` found.

    Attributes:
      permutations: By name, int32 `(*stack, size)`; `apply_permutation` takes them to the second
        model.
      objective: Σ⟨A, π(B)⟩ over all leaves at the start and after every permutation that was
        improved, float64; never falls. ‖A − π(B)‖² falls by twice its rise.
      sweeps: Rounds over the permutations, the last of which changed nothing if it converged.
      converged: Whether no single permutation can be improved any more.
    """

    permutations: dict[str, np.ndarray]
    objective: np.ndarray
    sweeps: int
    converged: bool


def weight_matching(
    spec: PermutationSpec,
    params_a: Params,
    params_b: Params,
    *,
    key: jax.Array | None = None,
    order: Order | None = None,
    start: Permutations | None = None,
    max_sweeps: int = 100,
) -> Matching:
    """Renumbers the units of `params_b` so that its weights come closest to those of `params_a`.

    Visits the permutations in random order, and solves for each the exact assignment that is best
    while the others stay, until none can be improved. Similarities are products of whole leaves in
    float32 at the highest precision on the device; assignments are solved on the host. The result
    is a local optimum: it may depend on the order.

    A permutation is visited again only after one that shares a leaf with it has changed, and
    permutations that share none are solved at the same time; neither changes the result.

    Args:
      spec: Names the axes.
      params_a: The model that stays.
      params_b: The model to renumber, of the same shapes.
      key: Draws the order of every sweep.
      order: Names of the permutations in the order of each sweep, instead of a key; sweeps
        beyond the last follow it again.
      start: Permutations to improve; None starts with none.
      max_sweeps: Most rounds.

    Returns:
      The permutations and the history of the objective.

    Raises:
      ValueError: If a tree does not fit the spec or is not finite, or neither key nor order is
        given.

    Example:
      >>> a = {"up": jax.random.normal(jax.random.key(0), (4, 8)), "down": jnp.ones((8, 2))}
      >>> axes = {"up": (None, "hidden"), "down": ("hidden", None)}
      >>> spec = jw.align.PermutationSpec.of(a, axes)
      >>> b = jw.align.apply_permutation(spec, a, {"hidden": jnp.array([3, 1, 0, 2, 7, 6, 5, 4])})
      >>> found = jw.align.weight_matching(spec, a, b, key=jax.random.key(1))
      >>> found.permutations["hidden"].tolist()
      [2, 1, 3, 0, 7, 6, 5, 4]

    Source: Ainsworth et al. 2022, Git Re-Basin, arXiv:2209.04836, Algorithm 1.
    Differs: (1) a permutation changes only if the objective rises. (2) Permutations may differ
    along stacks of layers, experts or heads; one assignment is solved for each.
    """
    name = "align.weight_matching"
    for label, params in (("params_a", params_a), ("params_b", params_b)):
        spec.check(params, f"{name}: {label}")
    if max_sweeps < 1:
        raise ValueError(f"{name}: max_sweeps={max_sweeps} must be at least 1.")
    orders = _orders(name, spec, key, order)
    ours, theirs = flatten(params_a)[0], flatten(params_b)[0]
    fail(name, _unlike(ours, theirs))
    found = check_permutations(name, spec, start or {})
    descent = Descent(name, spec, ours, permute_flat(spec, theirs, found), found)
    sweeps = 0
    while sweeps < max_sweeps and descent.stale:
        descent.sweep(next(orders))
        sweeps += 1
    return Matching(descent.permutations, np.array(descent.objective), sweeps, not descent.stale)


def _orders(
    name: str, spec: PermutationSpec, key: jax.Array | None, order: Order | None
) -> Iterator[Sequence[str]]:
    names = spec.names
    if order is None:
        if key is None:
            raise ValueError(
                f"{name}: key is missing: the order of the permutations is drawn. Pass "
                "key=jax.random.key(...), or order."
            )
        seed = np.asarray(jax.random.bits(key, (4,), "uint32"))
        draw = np.random.default_rng(seed)
        return ([names[i] for i in draw.permutation(len(names))] for _ in iter(int, 1))
    problems = [
        f"order[{i}]={list(sweep)} must name every permutation once: {', '.join(map(repr, names))}."
        for i, sweep in enumerate(order)
        if sorted(sweep) != sorted(names)
    ]
    fail(name, problems if order else ["order is empty. Pass at least one sweep, or a key."])
    return (order[min(i, len(order) - 1)] for i in _count())


def _count() -> Iterator[int]:
    i = 0
    while True:
        yield i
        i += 1


def _unlike(ours: Flat, theirs: Flat) -> list[str]:
    return [
        f"{path!r}: is {theirs[path].shape} in params_b but {leaf.shape} in params_a. Only models "
        "of the same shapes are aligned."
        for path, leaf in ours.items()
        if hasattr(leaf, "shape") and getattr(theirs.get(path), "shape", leaf.shape) != leaf.shape
    ]


class Descent:
    """Coordinate descent on its way.

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
            fail(name, _nonfinite(self.ours, "params_a") + _nonfinite(self.theirs, "params_b"))
        self.similarities = {key: Similarity(spec, [key], self.ours) for key in spec.names}
        leaves = {key: set(spec.leaves_of(key)) for key in spec.names}
        self.neighbours = {
            key: {other for other in spec.names if other != key and leaves[key] & leaves[other]}
            for key in spec.names
        }
        self.stale = set(spec.names)

    def sweep(self, order: Sequence[str]) -> bool:
        """Visits what is stale once, and says whether anything changed."""
        before = len(self.objective)
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
        return len(self.objective) > before

    def _solve(self, names: Sequence[str], submit: Callable[..., Any], ahead: int) -> None:
        """Improves permutations that share no leaf."""
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
                self._accept(name, moves[name], gains[name])

    def _accept(self, name: str, move: np.ndarray, gain: float) -> None:
        leaves = {path: self.theirs[path] for path in self.spec.leaves_of(name)}
        self.theirs |= permute_flat(self.spec, leaves, {name: move})
        self.permutations = follow(self.spec, self.permutations, {name: move})
        self.objective.append(self.objective[-1] + gain)
        self.stale |= self.neighbours[name]


def _assign(block: jax.Array) -> tuple[np.ndarray, float]:
    """Best assignments of a stack of matrices, and what they gain together."""
    matrices = np.asarray(block)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    solved = [best_assignment(matrix) for matrix in flat]
    moves = np.stack([move for move, _ in solved])
    return moves.reshape(matrices.shape[:-1]), sum(gain for _, gain in solved)


def _nonfinite(flat: Mapping[str, Any], label: str) -> list[str]:
    return [
        f"{label}: {describe_nonfinite(path, leaf)}"
        for path, leaf in flat.items()
        if is_float(leaf) and not bool(jax.numpy.isfinite(leaf).all())
    ]
