"""NuSLERP: SLERP of two weighted models, or of their deltas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._transform import Transform
from jaxweights.merge._delta_leaf import Compat
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    check_choice,
    check_weights,
    per_model,
)
from jaxweights.merge._per_leaf import GROUPS, Group
from jaxweights.merge._slerp import Antipodal, refuse_antipodal
from jaxweights.merge._sphere import Measuring, Vectors, arcs, slerp_factors
from jaxweights.merge._spherical import SphereMerge, spherical

_MERGEKIT_ZERO = 1e-6  # weights whose sum is smaller count as equal there


def nuslerp(
    *,
    weights: Weights = None,
    deltas: bool = False,
    group: Group = "leaf",
    antipodal: Antipodal | None = None,
    compat: Compat = "paper",
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Interpolates between two models, or between their deltas, along the arc between them.

    Both models are given to `apply`; the tree gives structure and dtypes and, with `deltas`, is the
    base. The place on the arc is :math:`t = w_2 / (w_1 + w_2)`.

    Args:
      weights: One number per model; None gives equal ones. May be a traced array.
      deltas: Whether the models' differences to the tree are interpolated and added to it, not
        the models themselves. Deltas of fine-tunes differ in direction where the models hardly do.
      group: What one vector is: a `"leaf"` (each layer or expert of a stack), the inputs of one
        `"output"`, or the outputs of one `"input"`.
      antipodal: As in `slerp`.
      compat: `"paper"`, or `"mergekit"`: weights whose sum is below 1e-6 count as equal.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the tree's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), whose mean is exact.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If the weights sum to zero, the number of models is not two, or vectors are
        antipodal.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"w": jnp.array([1.0, 1.0])}
      >>> models = [{"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([1.0, 2.0])}]
      >>> merged = jw.apply(jw.merge.nuslerp(deltas=True), base, models=models)
      >>> [round(x, 3) for x in merged["w"].tolist()]
      [1.707, 1.707]

    Source: mergekit's method of this name; no paper.
    Differs: (1) weights that sum to zero and antipodal vectors are errors.
    """
    name = "merge.nuslerp"
    check_choice(name, "group", group, GROUPS)
    check_choice(name, "compat", compat, ("paper", "mergekit"))
    check_choice(name, "antipodal", antipodal, (None, "error", "lerp"))
    weights = check_weights(name, weights, normalize=False)
    if weights is not None and compat == "paper":
        _check_sum(name, weights)
    output = Output.checked(name, out_dtype, rounding, nonfloat)
    strict = (antipodal or ("error" if compat == "paper" else "lerp")) == "error"

    def factors(vectors: Vectors) -> Measuring[tuple[jax.Array, jax.Array]]:
        given = per_model(name, "weights", np.ones(2) if weights is None else weights, 2)
        t = _place(jnp.asarray(given, vectors.dtype), compat=compat)
        return slerp_factors((yield from arcs(vectors)), t)

    merge = SphereMerge(
        name,
        factors,
        output,
        deltas=deltas,
        group=group,
        fewest=2,
        most=2,
        remedy="`slerp` takes the tree and one model; `karcher` merges more than two.",
        report=functools.partial(refuse_antipodal, name) if strict else None,
    )
    return spherical(merge, names=names)


def _check_sum(name: str, weights: Any) -> None:
    if isinstance(weights, Tracer):
        return
    if abs(weights.sum()) <= 1e-8 * np.abs(weights).sum():
        raise ValueError(
            f"{name}: weights={weights.tolist()} sum to {weights.sum():g}, so they name no place "
            "between the models. Change them."
        )


@functools.partial(jax.jit, static_argnames="compat")
def _place(weights: jax.Array, *, compat: Compat) -> jax.Array:
    """Where on the arc two weights lie; 0 is the first model."""
    total = weights[0] + weights[1]
    t = weights[1] / total
    return jnp.where(jnp.abs(total) < _MERGEKIT_ZERO, 0.5, t) if compat == "mergekit" else t
