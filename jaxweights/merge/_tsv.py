"""TSV-Merge: the leading singular directions of every delta, made orthogonal to each other."""

from __future__ import annotations

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from jaxweights.core._lapack import svd
from jaxweights.core._transform import Transform
from jaxweights.merge._spectral import (
    SpectralSettings,
    above,
    nearest_isometry,
    spectral_merge,
)


def tsv(*, density: float | None = None, **settings: Unpack[SpectralSettings]) -> Transform:
    r"""Sums the leading singular directions of the models' deltas after making them orthogonal.

    With :math:`\tau_i = U_i S_i V_i^\top` cut to its `k` largest singular values and the factors
    of all models side by side, adds :math:`\lambda\, U_\perp S V_\perp^\top` to the base, where
    :math:`U_\perp` is the isometry nearest to :math:`U`: what tasks write into the same direction
    no longer adds up to more than either wanted.

    Every matrix of the layout is merged by itself: each layer and expert, and attention and
    convolution kernels as the matrices that they are. Biases, norms and embedding tables take
    the weighted mean of the deltas, and so do matrices of fewer singular values than models;
    `partition` treats a table that it names as a matrix.

    Args:
      density: Share of each delta's singular values that is kept; None keeps `1 / models`, so
        that the directions of all models fit beside each other.
      **settings: `weights` (one number per model multiplying its delta, any sign; None gives 1
        each), `rank_tol` (singular values up to this fraction of the largest are rounding, and
        their arbitrary directions are left out; None takes `10 eps sqrt(n)`, 8e-5 for 4096
        rows in float32), `scale` (λ), `names`, `out_dtype`, `rounding`, `nonfloat`, as in
        `delta_merge`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a setting is out of range, or a model does not fit the tree.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"kernel": jnp.zeros((2, 2))}
      >>> models = [{"kernel": jnp.array(d)} for d in ([[3.0, 0], [0, 0]], [[0, 0], [0, 2.0]])]
      >>> jw.apply(jw.merge.tsv(), base, models=models)["kernel"].astype(jnp.bfloat16)
      Array([[3, 0],
             [0, 2]], dtype=bfloat16)

    Source: Gargiulo et al. 2024, arXiv:2412.00081, algorithm 1.
    Differs: (1) directions whose singular value is rounding are dropped, in deltas of low rank and
    in linearly dependent factors; copies of one model then give its rank-k truncation.
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"merge.tsv: density={density} must lie in (0, 1].")
    return spectral_merge("merge.tsv", _Tsv(density), **settings)


@dataclasses.dataclass(frozen=True)
class _Tsv:
    density: float | None

    def kept(self, rank: int, models: int) -> int:
        """Singular values kept of each delta."""
        if self.density is None:
            return rank // models
        # A third of 48 is 16, whatever 48 * (1 / 3) rounds to.
        return int(self.density * rank + 1e-6)

    def fits(self, rank: int, models: int) -> bool:
        return self.kept(rank, models) > 0

    def __call__(self, deltas: list[jax.Array], rank_tol: jax.Array) -> jax.Array:
        kept = self.kept(min(deltas[0].shape), len(deltas))
        lefts, values, rights = [], [], []
        for delta in deltas:
            left, value, right = svd(delta)
            live = above(value, rank_tol, value[:1])[:kept]
            lefts.append(left[:, :kept] * live[None])
            values.append(value[:kept] * live)
            rights.append(right[:kept] * live[:, None])
        left = nearest_isometry(jnp.concatenate(lefts, axis=1), rank_tol)
        right = nearest_isometry(jnp.concatenate(rights, axis=0), rank_tol)
        return (left * jnp.concatenate(values)[None]) @ right
