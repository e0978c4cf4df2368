"""Averages of the checkpoints of one run: exponentially weighted, or the latest few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxweights.core._transform import Transform
from jaxweights.merge._mean import BASE, mean_of
from jaxweights.merge._models import Nonfloat, Output, Rounding


def ema(
    *,
    decay: float,
    debias: bool = True,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Averages checkpoints, the latest most: what `running_ema` would have given.

    The `models`, oldest first, are :math:`\theta_1 \dots \theta_T` of
    :math:`e_t = d\, e_{t-1} + (1 - d)\, \theta_t`.

    Args:
      decay: d, in [0, 1).
      debias: Whether :math:`e_0 = 0` and the result is divided by :math:`1 - d^T`; otherwise
        :math:`e_0` is the tree that is transformed.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), as in `mean`.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If `decay` is out of range, or a model does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> run = [{"bias": jnp.array([x])} for x in (0.0, 0.0, 4.0)]
      >>> jw.apply(jw.merge.ema(decay=0.5, debias=False), run[0], models=run[1:])["bias"]
      Array([2.], dtype=float32)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"merge.ema: decay={decay} must lie in [0, 1).")
    output = Output.checked("merge.ema", out_dtype, rounding, nonfloat)

    def weigh(count: int) -> tuple[list[int], Any]:
        weights = (1 - decay) * float(decay) ** np.arange(count)[::-1]
        if debias:
            return list(range(count)), weights
        return [BASE, *range(count)], np.append(float(decay) ** count, weights)

    return mean_of("merge.ema", weigh, normalize=True, names=names, output=output)


def lawa(
    *,
    last: int,
    every: int = 1,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    """Averages the latest checkpoints of a run, with equal weights.

    The `models` are the checkpoints, oldest first. Checkpoints far apart, of runs with a high
    learning rate, gain most.

    Args:
      last: How many are averaged.
      every: Spacing: 1 takes neighbours, 2 every second one, counted from the latest.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), as in `mean`.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If there are too few checkpoints, or one does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> run = [{"bias": jnp.array([x])} for x in (9.0, 1.0, 9.0, 3.0)]
      >>> jw.apply(jw.merge.lawa(last=2, every=2), run[-1], models=run)["bias"]
      Array([2.], dtype=float32)

    Source: Sanyal et al. 2023, Early weight averaging meets high learning rates, arXiv:2306.03241.
    """
    for argument, value in (("last", last), ("every", every)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"merge.lawa: {argument}={value} must be a positive integer.")
    output = Output.checked("merge.lawa", out_dtype, rounding, nonfloat)

    def weigh(count: int) -> tuple[list[int], Any]:
        needed = (last - 1) * every + 1
        if count < needed:
            raise ValueError(
                f"merge.lawa: last={last}, every={every} needs {needed} checkpoints, but "
                f"{count} were given. Pass more models, or average fewer."
            )
        return list(range(count))[::-1][::every][:last], np.ones(last)

    return mean_of("merge.lawa", weigh, normalize=True, names=names, output=output)
