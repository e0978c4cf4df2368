"""Isotropic merging: all directions of the summed delta count alike."""

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

_POWER_STEPS = 4  # a norm to compare rounding with, wanted to a factor of two


def iso_c(**settings: Unpack[SpectralSettings]) -> Transform:
    r"""Adds the sum of the deltas with all its singular values made equal to their mean.

    :math:`\theta_0 + \lambda \bar\sigma U V^\top` with :math:`\sum_i w_i \tau_i = U \Sigma V^\top`.
    Directions that few tasks use are then no longer drowned by those that all share.

    Only the directions of the sum's numerical rank are kept, and only their singular values are
    averaged: beyond it, as in sums of low-rank adapters, singular vectors are arbitrary. Deltas of
    models stored in a narrow dtype carry its rounding in every direction; raise `rank_tol`
    where the deltas are known to be of low rank.

    Args:
      **settings: `weights`, `rank_tol`, `scale` (λ, searched in (0, 3] by the authors), `names`,
        `out_dtype`, `rounding`, `nonfloat`, as in `tsv`, and so are the leaves that are no
        matrices.

    Returns:
      The transform; it acts on every floating leaf.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base, model = {"kernel": jnp.zeros((2, 2))}, {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> jw.apply(jw.merge.iso_c(), base, models=[model])["kernel"].round(3)
      Array([[2., 0.],
             [0., 2.]], dtype=float32)

    Source: Marczak et al. 2025, arXiv:2502.04959, algorithm 1.
    """
    return spectral_merge("merge.iso_c", _IsoC(), **settings)


def iso_cts(*, common: float = 0.8, **settings: Unpack[SpectralSettings]) -> Transform:
    r"""Adds common and task-specific directions of the deltas, all of the same singular value.

    Keeps the leading directions of the sum of the deltas, and for each task the leading ones of
    what its delta writes into other output directions; makes all of them orthogonal and gives
    them their mean singular value.

    Args:
      common: Share of the directions that come from the sum, in (0, 1]; the rest is divided evenly
        between the models, and the share is moved so that it can be.
      **settings: As in `iso_c`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a setting is out of range, or a model does not fit the tree.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base = {"kernel": jnp.zeros((2, 2))}
      >>> models = [{"kernel": jnp.array(d)} for d in ([[3.0, 0], [0, 0]], [[0, 0], [0, 1.0]])]
      >>> jw.apply(jw.merge.iso_cts(), base, models=models)["kernel"].round(3)
      Array([[2., 0.],
             [0., 2.]], dtype=float32)

    Source: Marczak et al. 2025, arXiv:2502.04959, algorithm 2.
    """
    if not 0 < common <= 1:
        raise ValueError(f"merge.iso_cts: common={common} must lie in (0, 1].")
    return spectral_merge("merge.iso_cts", _IsoCts(common), **settings)


@dataclasses.dataclass(frozen=True)
class _IsoC:
    def fits(self, rank: int, models: int) -> bool:
        return True

    def __call__(self, deltas: list[jax.Array], rank_tol: jax.Array) -> jax.Array:
        left, values, right = svd(sum(deltas[1:], start=deltas[0]))
        live = above(values, rank_tol, values[:1])
        return _mean_of_live(values, live) * ((left * live[None]) @ right)


@dataclasses.dataclass(frozen=True)
class _IsoCts:
    common: float

    def fits(self, rank: int, models: int) -> bool:
        return True

    def __call__(self, deltas: list[jax.Array], rank_tol: jax.Array) -> jax.Array:
        rank, count = min(deltas[0].shape), len(deltas)
        each = min(round((rank - int(rank * self.common)) / count), rank // count)
        shared = rank - each * count
        left, values, right = svd(sum(deltas[1:], start=deltas[0]))
        live = above(values, rank_tol, values[:1])[:shared]
        lefts, rights = [left[:, :shared] * live[None]], [right[:shared] * live[:, None]]
        kept, lives = [values[:shared]], [live]
        outputs = rights[0]  # what the common directions write, (shared, out)
        for delta in deltas if each else ():
            own, value, written = svd(delta - (delta @ outputs.T) @ outputs)
            # Against the whole delta: where nothing but rounding is left, none of it counts.
            live = above(value, rank_tol, _spectral_norm(delta))[:each]
            lefts.append(own[:, :each] * live[None])
            rights.append(written[:each] * live[:, None])
            kept.append(value[:each])
            lives.append(live)
        isometry = nearest_isometry(jnp.concatenate(lefts, axis=1), rank_tol) @ nearest_isometry(
            jnp.concatenate(rights, axis=0), rank_tol
        )
        return _mean_of_live(jnp.concatenate(kept), jnp.concatenate(lives)) * isometry


def _mean_of_live(values: jax.Array, live: jax.Array) -> jax.Array:
    return jnp.sum(values * live) / jnp.maximum(jnp.sum(live), 1)


def _spectral_norm(matrix: jax.Array) -> jax.Array:
    """Largest singular value, from below, by power iteration from the longest row."""
    vector = _unit(matrix)[jnp.argmax(jnp.sum(jnp.square(_unit(matrix)), axis=1))]
    for _ in range(_POWER_STEPS):
        vector = _unit(matrix.T @ (matrix @ vector))
    return jnp.linalg.norm(matrix @ vector) / jnp.maximum(jnp.linalg.norm(vector), 1)


def _unit(x: jax.Array) -> jax.Array:
    """Scaled so that squares neither overflow nor underflow."""
    largest = jnp.max(jnp.abs(x))
    return x / jnp.where(largest > 0, largest, 1)
