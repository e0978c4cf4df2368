"""merge_adapter_deltas: any merge of models, applied to what adapters add to their base."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.adapt._adapters import (
    AdapterLeaf,
    AdapterTrees,
    Others,
    RankLoss,
    RankReport,
    check_factor_dtype,
    check_rank,
    read_adapters,
)
from jaxweights.adapt._factors import relative_tail, truncated_dense
from jaxweights.core import Flat, Params, Path, Transform, apply, partition, unflatten
from jaxweights.weights import View

_NAME = "adapt.merge_adapter_deltas"


def merge_adapter_deltas(
    tx: Transform,
    adapters: Sequence[Params],
    *,
    rank: int | None = None,
    key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    others: Others = "require_equal",
    names: Sequence[str] | None = None,
) -> tuple[Params, RankReport]:
    """Merges adapters by TIES, DARE, Breadcrumbs or another merge of models.

    Each adapter's delta is formed, the merge sees them as models of a base of zeros, and the result
    is cut to `rank` by its singular values. One leaf is dense at a time, unless the merge ranks
    the whole tree together (as `merge.ties()` does by default; `merge.ties(scope="leaf")` does
    not): then all deltas are.

    What drops entries makes a delta of higher rank than the adapters had, so that something is
    lost here even at the sum of their ranks; the report says how much.

    Args:
      tx: The merge, such as `merge.ties(density=0.2, weights=[1, 0.5])`; weights are its own.
      adapters: Trees with `LowRank` leaves, of one structure and over one base. One that does not
        change a leaf has a delta of zeros there.
      rank: Rank of the result, cut at what a leaf can have; None takes the highest rank among
        the leaf's adapters.
      key: Randomness, for merges that draw.
      dtype: Dtype of the factors.
      others: As in `combine_adapters`.
      names: What errors call the adapters.

    Returns:
      A tree like the first adapter, with merged factors and `scaling` 1, and for the path of each
      its `RankLoss`.

    Raises:
      ValueError: As `combine_adapters`, or as the merge.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> from jaxweights.weights import LowRank
      >>> make = lambda up: {"kernel": LowRank.over(jnp.zeros((1, 3)), jnp.ones((1, 1)), up)}
      >>> adapters = [make(jnp.array([[4.0, 1.0, 2.0]])), make(jnp.array([[2.0, -3.0, 0.0]]))]
      >>> merged, _ = merge_adapter_deltas(jw.merge.ties(density=1.0), adapters)
      >>> merged["kernel"].materialize().round(4)
      Array([[ 3., -3.,  2.]], dtype=float32)

    Source: the modes of peft's `add_weighted_adapter` that end in `_svd`.
    Differs: (1) TIES elects signs by the weighted deltas and divides by their weights, as in its
    paper, where peft elects by the unweighted ones and divides by their number. (2) Merges of the
    factors themselves, entry by entry, are left out: the factors' entries mean nothing alone.
    """
    if not isinstance(tx, Transform):
        raise TypeError(f"{_NAME}: {tx!r} is no transform. Pass a merge, such as merge.ties().")
    check_rank(_NAME, rank)
    check_factor_dtype(_NAME, dtype)
    tree = read_adapters(_NAME, adapters, others=others, names=names)
    merged, report, finite = dict(tree.flat), {}, {}
    for group in (
        [list(tree.leaves)] if tx.scope in ("block", "tree") else [[path] for path in tree.leaves]
    ):
        deltas = _merged_deltas(tx, tree, group, len(adapters), key)
        for path in group:
            leaf = tree.leaves[path]
            width = leaf.rank_for(rank, dense=True)
            view = leaf.weights[0].view
            down, up, error, finite[path] = _to_factors(
                deltas.pop(path), view=view, rank=width, dtype=jnp.dtype(dtype).name
            )
            merged[path] = leaf.with_factors(down, up)
            report[path] = RankLoss(width, error)
    tree.refuse_nonfinite(finite)
    return unflatten(tree.structure, merged), report


def _merged_deltas(
    tx: Transform, tree: AdapterTrees, paths: list[Path], count: int, key: jax.Array | None
) -> Flat:
    """Dense merged deltas of some leaves, in the leaves' own shapes."""
    leaves = {path: tree.leaves[path] for path in paths}
    zeros = {path: jnp.zeros(leaf.weights[0].shape, jnp.float32) for path, leaf in leaves.items()}
    models = [{path: _delta_of(leaf, i) for path, leaf in leaves.items()} for i in range(count)]
    layout = {re.escape(path): leaf.weights[0].view.axes for path, leaf in leaves.items()}
    # A rule that names them: adapters of embeddings are merged like all others.
    return dict(apply(partition((".*", tx)), zeros, models=models, key=key, layout=layout))


def _delta_of(leaf: AdapterLeaf, i: int) -> jax.Array:
    if i not in leaf.owners:
        return jnp.zeros(leaf.weights[0].shape, jnp.float32)
    return leaf.weights[leaf.owners.index(i)].delta.materialize().astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("view", "rank", "dtype"))
def _to_factors(
    delta: Any, *, view: View, rank: int, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    down, up, values = truncated_dense(view.to_matrix(delta), rank)
    finite = jnp.all(jnp.isfinite(values))
    error = relative_tail(values, rank).astype(jnp.float32)
    return down.astype(dtype), up.astype(dtype), error, finite
