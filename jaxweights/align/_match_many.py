"""match_many: several models renumbered until each fits the mean of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.align._descent import Descent, nonfinite
from jaxweights.align._similarity import inner_product
from jaxweights.align._spec import PermutationSpec
from jaxweights.align._weight_matching import check_pair, draw_orders
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, fail, flatten, unflatten
from jaxweights.merge._models import compute_dtype


class MatchedMany(NamedTuple):
    """What `match_many` found.

    Attributes:
      permutations: For every model, the permutations that align it; the first changes too.
      average: The mean of the aligned models, in the dtypes of the first.
      objective: Σ⟨A, B⟩ over all pairs of models, at the start and after every model that was
        improved, float64; never falls.
      rounds: Rounds over the models, the last of which changed nothing if it converged.
      converged: Whether no model can be improved any more.
    """

    permutations: tuple[dict[str, np.ndarray], ...]
    average: Params
    objective: np.ndarray
    rounds: int
    converged: bool


def match_many(
    spec: PermutationSpec,
    models: Sequence[Params],
    *,
    key: jax.Array,
    max_rounds: int = 50,
    max_sweeps: int = 100,
) -> MatchedMany:
    """Renumbers several models so that they come closest to one another, and averages them.

    Visits the models in random order and matches each to the mean of the others as they are by
    then, until none can be improved.

    Args:
      spec: Names the axes.
      models: Two or more models of the same shapes.
      key: Draws all orders.
      max_rounds: Most rounds over the models.
      max_sweeps: Most sweeps of a single match.

    Returns:
      The permutations of every model, and the mean of the permuted models.

    Raises:
      ValueError: If there are fewer than two models, or one does not fit the spec.

    Example:
      >>> a = {"up": jax.random.normal(jax.random.key(0), (4, 8)), "down": jnp.ones((8, 2))}
      >>> axes = {"up": (None, "hidden"), "down": ("hidden", None)}
      >>> spec = jw.align.PermutationSpec.of(a, axes)
      >>> b = jw.align.apply_permutation(spec, a, {"hidden": jnp.arange(8)[::-1]})
      >>> found = jw.align.match_many(spec, [a, b, a], key=jax.random.key(1))
      >>> bool(jnp.allclose(jnp.sort(found.average["up"]), jnp.sort(a["up"])))
      True

    Source: Ainsworth et al. 2022, Git Re-Basin, arXiv:2209.04836, Algorithm 3.
    Differs: (1) stops when no assignment gains, not when the norm of the mean stands still.
    """
    name = "align.match_many"
    if len(models) < 2:
        raise ValueError(f"{name}: {len(models)} models were given. Pass at least two.")
    for setting, value in (("max_rounds", max_rounds), ("max_sweeps", max_sweeps)):
        if value < 1:
            raise ValueError(f"{name}: {setting}={value} must be at least 1.")
    for i, model in enumerate(models[1:], start=1):
        check_pair(name, spec, models[0], model, ("models[0]", f"models[{i}]"))
    structure = flatten(models[0])[1]
    flat: list[Flat] = [flatten(model)[0] for model in models]
    found = [spec.identity() for _ in models]
    draw = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), "uint32")))
    orders = draw_orders(spec, draw)
    objective = [_agreement(flat)]
    if not np.isfinite(objective[0]):
        fail(name, [line for i, x in enumerate(flat) for line in nonfinite(x, f"models[{i}]")])
    rounds, settled = 0, False
    while rounds < max_rounds and not settled:
        rounds, settled = rounds + 1, True
        for i in draw.permutation(len(models)):
            others = _mean([x for j, x in enumerate(flat) if j != i])
            descent = Descent(name, spec, others, flat[i], found[i])
            descent.run(orders, max_sweeps)
            # A gain is one over the mean; over the sum it is that many times as large.
            gain = (descent.objective[-1] - descent.objective[0]) * (len(models) - 1)
            if len(descent.objective) > 1:
                settled = False
                found[i] = descent.permutations
                flat[i] = flat[i] | descent.theirs
                objective.append(objective[-1] + gain)
    mean = {p: x.astype(flat[0][p].dtype) for p, x in _mean(flat).items() if is_float(x)}
    average = unflatten(structure, flat[0] | mean)
    return MatchedMany(tuple(found), average, np.array(objective), rounds, settled)


def _agreement(flat: Sequence[Flat]) -> float:
    """Sum of the inner products of all pairs."""
    return sum(inner_product(a, b) for i, a in enumerate(flat) for b in flat[i + 1 :])


@jax.jit
def _mean(flat: Sequence[Flat]) -> Flat:
    """Means of the floating leaves in float32; the others are those of the first."""

    def leaf(*leaves: jax.Array) -> jax.Array:
        if not is_float(leaves[0]):
            return leaves[0]
        dtype = compute_dtype(leaves[0])
        # As a shift from the first, so that equal models keep their mean bit for bit.
        first = leaves[0].astype(dtype)
        shift = sum((x.astype(dtype) - first for x in leaves[1:]), jnp.zeros_like(first))
        return first + shift / len(leaves)

    return {path: leaf(*(x[path] for x in flat)) for path in flat[0]}
