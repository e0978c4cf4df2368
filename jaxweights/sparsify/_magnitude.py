"""magnitude: the smallest weights go."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.core._transform import Transform
from jaxweights.sparsify._groups import GroupName, Tail, make_group
from jaxweights.sparsify._prune import Form, Sparsity, prune

_NAME = "sparsify.magnitude"


def magnitude(
    *,
    sparsity: Sparsity | None = None,
    group: GroupName = "leaf",
    block: int | None = None,
    keep: int | None = None,
    of: int | None = None,
    tail: Tail = "error",
    normalize: bool = False,
    min_keep: float = 0.01,
    form: Form = "masked",
) -> Transform:
    r"""Removes the weights of smallest magnitude; needs no data.

    In every group of :math:`g` weights exactly :math:`\lfloor s g \rfloor` are removed, those with
    the lowest :math:`|w|` and of equal ones the first in flat order. Nothing is sorted. Weights
    already removed from a `Masked` leaf stay removed and count; a group that has more zeros than it
    is asked for keeps them. Stacked matrices are ranked each for itself.

    Args:
      sparsity: Fraction of zeros in [0, 1). Also a scalar array or a function of `context.step`,
        for ramps in a training loop; then the count is that of its float32 value.
      group: What is ranked together: "leaf", one matrix; "output", the inputs of one output;
        "input_block", `block` consecutive inputs with all outputs; "global", all leaves together.
      block: Inputs per block.
      keep: Weights that stay in every run of `of` along the input axis, instead of `sparsity`. Not
        the number of zeros: keep=1, of=4 removes three of four.
      of: Length of a run.
      tail: What becomes of a last run of `t < of` inputs: "error" refuses it, "dense" keeps it
        whole, "partial" keeps `ceil(keep * t / of)` of it.
      normalize: Divides the scores of each matrix by their L2 norm; matters for "global" only.
      min_keep: For "global", the fraction of every matrix that stays in any case.
      form: "masked" gives `Masked` leaves, over the dense or quantized leaf that was there;
        "dense" writes the zeros into the arrays.

    Returns:
      The transform.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range, or two contradict; when it sees a tree, if a group
        would keep nothing, a run does not divide an input axis, or a leaf is sparser already.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"mlp": {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}}
      >>> pruned = jw.apply(jw.sparsify.magnitude(keep=2, of=4), params)
      >>> int(pruned["mlp"]["kernel"].mask.sum())
      1024

    Source: Han et al. 2015, arXiv:1506.02626; the global ranking with normalized scores as in
      jaxpruner, Lee et al. 2023, arXiv:2304.14082.
    Differs: (1) Counts are exact also where magnitudes tie, and of ties the first are removed; the
      usual threshold removes all of them. (2) A group is never emptied. (3) Runs go along the input
      axis.
    """
    chosen = make_group(_NAME, group=group, block=block, keep=keep, of=of, tail=tail)

    def score(weight: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        if not normalize:
            return weight, {}
        wide = weight.astype(jnp.float32)
        norm = jnp.linalg.norm(wide)
        return wide / jnp.where(norm == 0, jnp.ones_like(norm), norm), {}

    return prune(
        score,
        name=_NAME,
        group=chosen,
        sparsity=sparsity,
        form=form,
        min_keep=min_keep if chosen.name == "global" else 0.0,
    )
