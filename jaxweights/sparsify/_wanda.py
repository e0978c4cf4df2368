"""wanda: the weights whose products with the inputs are smallest go."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxweights.core._host import on_host
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.sparsify._groups import GroupName, Tail, make_group
from jaxweights.sparsify._prune import Form, Sparsity, prune

_NAME = "sparsify.wanda"

Fallback = Literal["error", "magnitude"]


def wanda(
    *,
    sparsity: Sparsity | None = None,
    group: GroupName = "output",
    block: int | None = None,
    keep: int | None = None,
    of: int | None = None,
    tail: Tail = "error",
    min_keep: float = 0.01,
    fallback: Fallback = "error",
    form: Form = "masked",
) -> Transform:
    r"""Removes the weights that multiply the weakest inputs with the smallest factors.

    The score of a weight is :math:`|W_{jo}| \, \|X_j\|_2`, with :math:`\|X_j\|_2` the norm of input
    :math:`j` over the calibration tokens. In every group exactly :math:`\lfloor s g \rfloor`
    weights with the lowest scores are removed; what stays is not changed. Within outputs, and in
    runs, the weights of a convolution with feature groups go by the inputs of their own group.

    Args:
      sparsity: As in `magnitude`.
      group: As in `magnitude`; the paper ranks the inputs of each output for themselves.
      block: As in `magnitude`.
      keep: As in `magnitude`; without `group`, which then must be left out.
      of: As in `magnitude`.
      tail: As in `magnitude`.
      min_keep: As in `magnitude`.
      fallback: What becomes of a matrix whose inputs no calibration token reached, such as an
        expert that was never chosen: "error", or "magnitude", which ranks it by magnitude.
      form: As in `magnitude`.

    Returns:
      The transform; it needs the statistics `second_moment` and `count`.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: As `magnitude`; if statistics are missing, belong to another model, are not
        finite, or a matrix saw no token and `fallback` is "error".

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> tx = jw.sparsify.wanda(sparsity=0.5)
      >>> stats = jw.calibrate(
      ...     lambda p, x: x @ p["kernel"], params, [x], needs=tx.needs(params)
      ... )
      >>> jw.apply(tx, params, stats=stats)["kernel"].mask.sum(axis=0).tolist() == [32] * 32
      True

    Source: Sun et al. 2023, arXiv:2306.11695, equation 1.
    Differs: (1) Counts are exact also where scores tie. (2) Runs are counted by what they keep. (3)
      The mean over tokens stands for the sum, which matters for "global" only.
    """
    if fallback not in get_args(Fallback):
        raise ValueError(f"{_NAME}: fallback={fallback!r} must be 'error' or 'magnitude'.")
    if of is not None and group == "output":
        group = "leaf"  # the default does not contradict keep and of
    chosen = make_group(_NAME, group=group, block=block, keep=keep, of=of, tail=tail)

    def score(
        weight: jax.Array, *, second_moment: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        mean = second_moment / jnp.maximum(count, 1).astype(second_moment.dtype)
        mean = jnp.where(count == 0, jnp.ones_like(mean), mean)
        report = {"count": count, "finite": jnp.isfinite(jnp.sum(second_moment * 0))}
        return wanda_scores(weight, mean), report

    def verify(path: Path, report: dict[str, Any]) -> str | None:
        if not np.all(report["finite"]):
            return (
                f"{path!r}: the statistic 'second_moment' is not finite. Calibrate again, on data "
                "on which the model's activations are finite."
            )
        silent = np.argwhere(on_host(report["count"]) == 0)
        if fallback == "magnitude" or not len(silent):
            return None
        where = ", ".join(str(index.tolist()) for index in silent[:5] if len(index))
        which = f"{len(silent)} of its matrices, at stack index {where}" if where else "it"
        return (
            f"{path!r}: no calibration token reached {which} (count is 0), so there are no inputs "
            "to rank by. Calibrate on more data, or pass fallback='magnitude'."
        )

    return prune(
        score,
        name=_NAME,
        group=chosen,
        sparsity=sparsity,
        form=form,
        needs=("second_moment", "count"),
        min_keep=min_keep if chosen.name == "global" else 0.0,
        verify=verify,
    )


def wanda_scores(
    weight: Float[Array, "in out"], second_moment: Float[Array, "in"]
) -> Float[Array, "in out"]:
    r"""Scores :math:`|W_{jo}| \, \sqrt{m_j}` of one matrix.

    Args:
      weight: `(in, out)`, floats.
      second_moment: Sum or mean of the squares of each input, `(in,)`, float32.

    Returns:
      Scores, `(in, out)`, float32.

    Example:
      >>> wanda_scores(jnp.array([[-2.0], [3.0]]), jnp.array([4.0, 0.0]))[:, 0].tolist()
      [4.0, 0.0]

    Source: Sun et al. 2023, arXiv:2306.11695, equation 1.
    """
    norms = jnp.sqrt(second_moment.astype(jnp.float32))
    return jnp.abs(weight).astype(jnp.float32) * norms[:, None]
