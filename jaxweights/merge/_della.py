"""DELLA: drop entries of each delta at random, the smaller the likelier."""

from __future__ import annotations

from typing import Unpack

from jaxweights.core._transform import Transform
from jaxweights.merge._dare import default_rescale
from jaxweights.merge._delta import DeltaSettings, delta_merge
from jaxweights.merge._delta_leaf import Compat, Rescale
from jaxweights.merge._delta_tree import PerModel


def della(
    *,
    density: PerModel = 0.7,
    epsilon: PerModel = 0.07,
    normalize: bool = True,
    rescale: Rescale | None = None,
    compat: Compat = "paper",
    **settings: Unpack[DeltaSettings],
) -> Transform:
    r"""Drops entries by chance, the smaller the likelier, then merges what agrees in sign.

    Among the n inputs of one output, the entry of rank r by magnitude (0 the smallest; a bias or
    norm is one such group) is kept with probability :math:`p = \rho - \epsilon + 2 \epsilon r /
    (n-1)` and divided by it, so that the mean over keys is the delta itself. Needs a key. Signs
    are then elected, and what agrees is averaged, as in `ties`.

    Args:
      density: Mean probability ρ to keep an entry; 1 drops nothing.
      epsilon: Half the range of probabilities; ρ ± ε must lie between 0 and 1.
      normalize: Whether each entry is divided by the sum of |weights| of the models that agree
        there.
      rescale: As in `delta_merge`; None takes that of `compat`.
      compat: `"paper"` divides by the probability; `"mergekit"` restores the L1 norm of each
        matrix.
      **settings: `weights`, `scale` (the authors use 1.1), `names`, `out_dtype`, `rounding`,
        `nonfloat`, as in `delta_merge`.

    Returns:
      The transform.

    Raises:
      ValueError: If a probability would leave (0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, jaxweights as jw
      >>> base = {"kernel": jnp.zeros((3, 64))}
      >>> model = {"kernel": jnp.ones((3, 64)) * jnp.array([[1.0], [2.0], [3.0]])}
      >>> tx = jw.merge.della(density=0.5, epsilon=0.25)
      >>> merged = jw.apply(tx, base, models=[model], key=jax.random.key(0))
      >>> [sorted(set(row.tolist())) for row in merged["kernel"]]
      [[0.0, 4.0], [0.0, 4.0], [0.0, 4.0]]

    Source: Deep et al. 2024, arXiv:2406.11617; the authors' window is 2ε.
    Differs: (1) equal magnitudes share the mean of their ranks. (2) A sum that is zero elects plus.
    """
    return delta_merge(
        sparsifier="ranked",
        density=density,
        epsilon=epsilon,
        rescale=default_rescale(rescale, compat),
        consensus="sum",
        normalize="entries" if normalize else "none",
        compat=compat,
        name="merge.della",
        **settings,
    )


def della_linear(
    *,
    density: PerModel = 0.7,
    epsilon: PerModel = 0.07,
    normalize: bool = False,
    rescale: Rescale | None = None,
    compat: Compat = "paper",
    **settings: Unpack[DeltaSettings],
) -> Transform:
    """Drops entries by chance, the smaller the likelier, and adds the weighted sum of the rest.

    Args:
      density: As in `della`.
      epsilon: As in `della`; at 0 it is `dare_linear`.
      normalize: Whether to divide by the sum of |weights|.
      rescale: As in `della`.
      compat: As in `della`.
      **settings: `weights`, `scale`, `names`, `out_dtype`, `rounding`, `nonfloat`, as in
        `delta_merge`.

    Returns:
      The transform.

    Raises:
      ValueError: If a probability would leave (0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, jaxweights as jw
      >>> base, model = {"kernel": jnp.zeros((8, 8))}, {"kernel": jnp.ones((8, 8))}
      >>> tx = jw.merge.della_linear(density=0.5, epsilon=0.25)
      >>> merged = jw.apply(tx, base, models=[model], key=jax.random.key(0))
      >>> sorted(set(merged["kernel"].ravel().tolist()))  # all are equal, so all have one rank
      [0.0, 2.0]

    Source: Deep et al. 2024, arXiv:2406.11617.
    Differs: (1) as in `della`.
    """
    return delta_merge(
        sparsifier="ranked",
        density=density,
        epsilon=epsilon,
        rescale=default_rescale(rescale, compat),
        normalize="models" if normalize else "none",
        compat=compat,
        name="merge.della_linear",
        **settings,
    )
