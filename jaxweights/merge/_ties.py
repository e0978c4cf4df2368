"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from typing import Literal, Unpack

from jaxweights.core._transform import Transform
from jaxweights.merge._delta import DeltaSettings, delta_merge
from jaxweights.merge._delta_leaf import Compat, Rescale, Scope
from jaxweights.merge._delta_tree import PerModel


def ties(
    *,
    density: PerModel = 0.2,
    combine: Literal["mean", "sum", "max"] = "mean",
    rescale: Rescale = "none",
    scope: Scope | None = None,
    compat: Compat = "paper",
    **settings: Unpack[DeltaSettings],
) -> Transform:
    """Trims each delta to its largest entries, elects a sign per entry, merges what agrees with it.

    Args:
      density: Share of entries that trimming keeps, one for all models or one per model.
      combine: `"mean"` weighted over the models that agree, `"sum"`, or `"max"` in magnitude.
      rescale: As in `delta_merge`.
      scope: What is trimmed together, `"tree"` or `"leaf"`; None takes that of `compat`.
      compat: `"paper"` ranks all entries of a model together, and gives entries whose sum is zero
        the sign of the majority; `"mergekit"` ranks each matrix, rounds counts down, takes plus.
      **settings: `weights`, `scale`, `names`, `out_dtype`, `rounding`, `nonfloat`, as in
        `delta_merge`.

    Returns:
      The transform.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"kernel": jnp.zeros((1, 3))}
      >>> deltas = ([4.0, 1.0, 2.0], [2.0, -3.0, 0.0])
      >>> models = [{"kernel": jnp.array([delta])} for delta in deltas]
      >>> jw.apply(jw.merge.ties(density=1.0), base, models=models)["kernel"]
      Array([[ 3., -3.,  2.]], dtype=float32)

    Source: Yadav et al. 2023, arXiv:2306.01708.
    Differs: (1) exactly the stated number of entries is kept; the authors' code keeps one more and
    all ties. (2) Divisors sum |w|.
    """
    mode = {"mean": ("sum", "entries"), "sum": ("sum", "none"), "max": ("max", "none")}
    if combine not in mode:
        raise ValueError(f"merge.ties: combine={combine!r} is not one of 'mean', 'sum', 'max'.")
    how, normalize = mode[combine]
    return delta_merge(
        sparsifier="magnitude",
        density=density,
        rescale=rescale,
        consensus="sum",
        combine=how,  # type: ignore[arg-type]
        normalize=normalize,  # type: ignore[arg-type]
        scope=scope or ("tree" if compat == "paper" else "leaf"),
        compat=compat,
        name="merge.ties",
        **settings,
    )
