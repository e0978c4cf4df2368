"""weight_matching: the renumbering of one model's units that brings it closest to another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxweights.align._descent import Descent
from jaxweights.align._permute import check_permutations, permute_flat
from jaxweights.align._spec import Permutations, PermutationSpec
from jaxweights.core._paths import Params, fail, flatten

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

    Heads are first matched together with the permutations inside them: every pair of heads is
    compared as its own best inner assignments make it, until that gains nothing over matching
    them in turn.

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
    along stacks of layers, experts or heads; one assignment is solved for each. (3) Heads and what
    is inside them are matched together at first.
    """
    name = "align.weight_matching"
    check_pair(name, spec, params_a, params_b)
    if max_sweeps < 1:
        raise ValueError(f"{name}: max_sweeps={max_sweeps} must be at least 1.")
    orders = _orders(name, spec, key, order)
    ours, theirs = flatten(params_a)[0], flatten(params_b)[0]
    found = check_permutations(name, spec, start or {})
    descent = Descent(name, spec, ours, permute_flat(spec, theirs, found), found)
    sweeps = descent.run(orders, max_sweeps)
    return Matching(descent.permutations, np.array(descent.objective), sweeps, not descent.stale)


def _orders(
    name: str, spec: PermutationSpec, key: jax.Array | None, order: Order | None
) -> Iterator[Sequence[str]]:
    if order is None:
        if key is None:
            raise ValueError(
                f"{name}: key is missing: the order of the permutations is drawn. Pass "
                "key=jax.random.key(...), or order."
            )
        seed = np.asarray(jax.random.key_data(key)).reshape(-1)
        return draw_orders(spec, np.random.default_rng(seed))
    names = spec.names
    problems = [
        f"order[{i}]={list(sweep)} must name every permutation once: {', '.join(map(repr, names))}."
        for i, sweep in enumerate(order)
        if sorted(sweep) != sorted(names)
    ]
    fail(name, problems if order else ["order is empty. Pass at least one sweep, or a key."])
    return (order[min(i, len(order) - 1)] for i in itertools.count())


def draw_orders(spec: PermutationSpec, draw: np.random.Generator) -> Iterator[Sequence[str]]:
    """Random orders of the permutations, without end."""
    names = spec.names
    return ([names[i] for i in draw.permutation(len(names))] for _ in itertools.count())


def check_pair(
    name: str,
    spec: PermutationSpec,
    params_a: Params,
    params_b: Params,
    labels: tuple[str, str] = ("params_a", "params_b"),
) -> None:
    """Refuses trees that do not fit the spec or one another."""
    for label, params in zip(labels, (params_a, params_b), strict=True):
        spec.check(params, f"{name}: {label}")
    ours, theirs = flatten(params_a)[0], flatten(params_b)[0]
    fail(
        name,
        [
            f"{path!r}: is {theirs[path].shape} in {labels[1]} but {leaf.shape} in {labels[0]}. "
            "Only models of the same shapes are aligned."
            for path, leaf in ours.items()
            if path in spec.axes and hasattr(leaf, "shape") and theirs[path].shape != leaf.shape
        ],
    )
