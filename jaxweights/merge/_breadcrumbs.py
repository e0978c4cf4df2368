"""Model Breadcrumbs: mask both tails of each delta."""

from __future__ import annotations

from typing import Unpack

from jaxweights.core._transform import Transform
from jaxweights.merge._delta import DeltaSettings, delta_merge
from jaxweights.merge._delta_leaf import Compat, Scope
from jaxweights.merge._delta_tree import PerModel


def breadcrumbs(
    *,
    density: PerModel = 0.15,
    outliers: PerModel = 0.006,
    normalize: bool = False,
    scope: Scope = "leaf",
    compat: Compat = "paper",
    **settings: Unpack[DeltaSettings],
) -> Transform:
    """Drops the largest and the smallest entries of each delta, and adds the weighted sum.

    The `outliers` share of largest entries goes first, then the next `density` share is kept; where
    the two exceed 1, fewer outliers go. The paper's percentiles are β = 1 - density - outliers from
    below and γ = 1 - outliers.

    Args:
      density: Share of entries kept.
      outliers: Share of the largest entries that is dropped.
      normalize: Whether to divide by the sum of |weights|.
      scope: What is ranked together: the inputs of one output (`"row"`), each matrix of a
        `"leaf"`, or the `"tree"`.
      compat: How counts are rounded, as in `delta_merge`.
      **settings: `weights`, `scale` (the authors search from 0.2), `names`, `out_dtype`,
        `rounding`, `nonfloat`, as in `delta_merge`.

    Returns:
      The transform.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base, model = {"kernel": jnp.zeros((1, 4))}, {"kernel": jnp.array([[1.0, 9.0, 3.0, 2.0]])}
      >>> tx = jw.merge.breadcrumbs(density=0.5, outliers=0.25)
      >>> jw.apply(tx, base, models=[model])["kernel"]
      Array([[0., 0., 3., 2.]], dtype=float32)

    Source: Davari and Belilovsky 2023, arXiv:2312.06795; defaults from the authors' search.
    Differs: (1) each matrix is ranked, as the paper says; the authors' code does `scope="row"`.
    """
    return delta_merge(
        sparsifier="outliers",
        density=density,
        outliers=outliers,
        normalize="models" if normalize else "none",
        scope=scope,
        compat=compat,
        name="merge.breadcrumbs",
        **settings,
    )


def breadcrumbs_ties(
    *,
    density: PerModel = 0.15,
    outliers: PerModel = 0.006,
    normalize: bool = False,
    scope: Scope = "leaf",
    compat: Compat = "paper",
    **settings: Unpack[DeltaSettings],
) -> Transform:
    """Drops both tails of each delta, then sums the deltas that agree with the elected sign.

    Args:
      density: Share of entries kept.
      outliers: Share of the largest entries that is dropped.
      normalize: Whether each entry is divided by the sum of |weights| of the models that agree
        there.
      scope: What is ranked together: the inputs of one output (`"row"`), each matrix of a
        `"leaf"`, or the `"tree"`.
      compat: How counts are rounded, as in `delta_merge`.
      **settings: `weights`, `scale`, `names`, `out_dtype`, `rounding`, `nonfloat`, as in
        `delta_merge`.

    Returns:
      The transform.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"kernel": jnp.zeros((1, 2))}
      >>> models = [{"kernel": jnp.array([[1.0, 2.0]])}, {"kernel": jnp.array([[-3.0, 1.0]])}]
      >>> tx = jw.merge.breadcrumbs_ties(density=1.0)
      >>> jw.apply(tx, base, models=models)["kernel"]
      Array([[-3.,  3.]], dtype=float32)

    Source: Davari and Belilovsky 2023, arXiv:2312.06795, with the sign election of Yadav et al.
    2023, arXiv:2306.01708.
    """
    return delta_merge(
        sparsifier="outliers",
        density=density,
        outliers=outliers,
        consensus="sum",
        normalize="entries" if normalize else "none",
        scope=scope,
        compat=compat,
        name="merge.breadcrumbs_ties",
        **settings,
    )
