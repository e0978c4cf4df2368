"""Merges that give every model's vectors factors, which lengths and angles decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.merge._models import Output
from jaxweights.merge._per_leaf import Group, LeafJob, Merged, check_count, per_leaf
from jaxweights.merge._sphere import Measuring, Vectors, measured, vectors_in, weighted_sum

# Factors `(models, vectors)`, and whether the method has something to say about the leaf.
Factors = Callable[[Vectors], Measuring[tuple[jax.Array, jax.Array | None]]]


@dataclasses.dataclass(frozen=True)
class SphereMerge:
    """What a spherical merge does to a leaf.

    Args:
      name: What errors call it.
      factors: Measures a leaf's vectors, and gives the factors.
      output: How results are stored.
      deltas: Whether the models' differences to the tree are merged, and added to it.
      group: What one vector is.
      tree_is_model: Whether the tree is the first of the models.
      fewest: Least number of models, besides the tree.
      most: Greatest number; None for any.
      remedy: Ends the error about their number.
      report: Called with the paths of all leaves that were found odd, outside of `jit`.
    """

    name: str
    factors: Factors
    output: Output
    deltas: bool = False
    group: Group = "leaf"
    tree_is_model: bool = False
    fewest: int = 1
    most: int | None = None
    remedy: str = ""
    report: Callable[[list[Path]], None] | None = None

    def check_count(self, given: int) -> None:
        """Refuses a number of models that the method does not take."""
        check_count(self.name, given, self.fewest, self.most, self.remedy)


def spherical(merge: SphereMerge, *, names: Sequence[str] | None) -> Transform:
    """The transform that does it.

    Args:
      merge: What is done.
      names: What the user calls the models.

    Returns:
      The transform; it acts on every floating leaf.
    """

    def merge_leaf(job: LeafJob) -> Merged:
        models = [job.base, *job.models] if merge.tree_is_model else job.models
        how = {"axes": job.axes, "deltas": merge.deltas}
        measuring = merge.factors(vectors_in(job.base, len(models), job.axes))
        factors, odd = measured(measuring, job.base, models, **how)
        value, finite = weighted_sum(
            job.base, models, factors, job.key, **how, output=merge.output, dtype=job.dtype
        )
        return Merged(value, finite, odd)

    return per_leaf(
        merge.name,
        merge_leaf,
        output=merge.output,
        names=names,
        fewest=merge.fewest,
        most=merge.most,
        remedy=merge.remedy,
        delta=merge.deltas,
        group=merge.group,
        report=merge.report,
        settings=merge,
    )
