"""combine_adapters: several adapters of one base become one, from their thin factors alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.adapt._adapters import (
    AdapterLeaf,
    Others,
    RankLoss,
    RankReport,
    check_factor_dtype,
    check_rank,
    read_adapters,
)
from jaxweights.adapt._factors import concatenated, product_norm, relative_tail, truncated
from jaxweights.core import Params, unflatten
from jaxweights.core._paths import fail

Mode = Literal["cat", "svd", "linear"]
_MODES: tuple[Mode, ...] = ("cat", "svd", "linear")
_NAME = "adapt.combine_adapters"


def combine_adapters(
    adapters: Sequence[Params],
    weights: Sequence[float] | jax.Array | np.ndarray | None = None,
    *,
    mode: Mode = "cat",
    rank: int | None = None,
    dtype: DTypeLike = jnp.float32,
    others: Others = "require_equal",
    names: Sequence[str] | None = None,
) -> tuple[Params, RankReport]:
    r"""Makes one adapter of several that were trained on the same base.

    The deltas are :math:`\Delta_i = s_i A_i B_i`, with each leaf's own scaling (`alpha / rank`,
    `alpha / sqrt(rank)` or any other) counted once. No array of the size of a weight is formed.

    | mode | the combined delta | rank |
    |---|---|---|
    | `"cat"` | :math:`\sum_i w_i \Delta_i`, exactly | sum of the ranks |
    | `"svd"` | the best approximation of that sum | `rank` |
    | `"linear"` | :math:`(\sum_i c_i A_i)(\sum_i |c_i| B_i)` | that of all |

    `"linear"`, with :math:`c_i = \mathrm{sign}(w_i s_i) \sqrt{|w_i s_i|}`, is what some tools do.
    Multiplied out it holds cross terms :math:`c_i |c_j| A_i B_j`, products of factors that never
    met in training; the report says how large they are beside the sum. Use it to reproduce a
    result, not to make one.

    A leaf that only some of the adapters change gets the sum of those.

    Args:
      adapters: Trees with `LowRank` leaves, of one structure and over one base.
      weights: One number per adapter, any sign; not normalised. None gives 1 each. May be traced.
      mode: See the table.
      rank: Rank for `"svd"`, cut at what a leaf's sum can have; None takes the highest rank among
        the leaf's adapters.
      dtype: Dtype of the combined factors; all arithmetic is in float32 or wider.
      others: Leaves without factors, such as biases that were trained beside them:
        `"require_equal"` refuses adapters that differ there, `"first"` takes those of the first.
      names: What errors call the adapters.

    Returns:
      A tree like the first, with combined factors and `scaling` 1, and for the path of each its
      `RankLoss`.

    Raises:
      ValueError: If the adapters do not belong together, their ranks differ in mode `"linear"`, or
        a factor is not finite; all leaves are named.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxweights.weights import LowRank
      >>> base = jnp.zeros((2, 2))
      >>> make = lambda d, u: {"kernel": LowRank.over(base, jnp.array([d]).T, jnp.array([u]))}
      >>> first, second = make([1.0, 0.0], [1.0, 2.0]), make([0.0, 1.0], [3.0, 4.0])
      >>> both, report = combine_adapters([first, second], [1.0, 0.5])
      >>> both["kernel"].materialize(), report["kernel"].rank
      (Array([[1. , 2. ],
             [1.5, 2. ]], dtype=float32), 2)

    Source: the modes of peft's `add_weighted_adapter`.
    Differs: (1) `"svd"` works on the factors, by two QR decompositions and the SVD of a core as
    wide as the sum of the ranks. (2) Ranks, and leaves with factors, may differ.
    """
    if mode not in _MODES:
        raise ValueError(
            f"{_NAME}: mode={mode!r} is not one of {', '.join(map(repr, _MODES))}. For TIES, DARE "
            "and other merges of deltas use adapt.merge_adapter_deltas."
        )
    if rank is not None and mode != "svd":
        raise ValueError(f"{_NAME}: rank={rank} goes with mode='svd' only, not {mode!r}.")
    check_rank(_NAME, rank)
    check_factor_dtype(_NAME, dtype)
    tree = read_adapters(_NAME, adapters, others=others, names=names)
    shares = _check_weights(weights, len(adapters))
    if mode == "linear":
        fail(_NAME, filter(None, (_unequal_ranks(leaf) for leaf in tree.leaves.values())))
    merged, report, finite = dict(tree.flat), {}, {}
    for path, leaf in tree.leaves.items():
        width = leaf.rank_for(rank) if mode == "svd" else leaf.rank_sum
        combined = _combine_leaf(
            [w.down for w in leaf.weights],
            [w.up for w in leaf.weights],
            [w.scaling for w in leaf.weights],
            [shares[i] for i in leaf.owners],
            mode=mode,
            rank=width,
            dtype=jnp.dtype(dtype).name,
        )
        down, up, error, finite[path] = combined
        merged[path] = leaf.with_factors(down, up)
        report[path] = RankLoss(down.shape[-1], error)
    tree.refuse_nonfinite(finite)
    return unflatten(tree.structure, merged), report


def _check_weights(weights: Any, count: int) -> jax.Array:
    if weights is None:
        return jnp.ones(count, jnp.float32)
    if not isinstance(weights, Tracer):
        values = np.asarray(weights, np.float64)
        if values.shape != (count,) or not np.isfinite(values).all():
            raise ValueError(
                f"{_NAME}: weights={values.tolist()} must be {count} finite numbers, one per "
                "adapter."
            )
    elif weights.shape != (count,):
        raise ValueError(f"{_NAME}: weights has shape {weights.shape}, not ({count},).")
    return jnp.asarray(weights, jnp.float32)


def _unequal_ranks(leaf: AdapterLeaf) -> str | None:
    ranks = [weight.rank for weight in leaf.weights]
    if len(set(ranks)) == 1:
        return None
    return (
        f"{leaf.path!r}: has ranks {ranks}, and mode='linear' adds factors entry by entry. Use "
        "mode='svd' or 'cat', which take any ranks."
    )


@functools.partial(jax.jit, static_argnames=("mode", "rank", "dtype"))
def _combine_leaf(
    downs: list[jax.Array],
    ups: list[jax.Array],
    scalings: list[jax.Array],
    weights: list[jax.Array],
    *,
    mode: Mode,
    rank: int,
    dtype: str,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Factors, relative error, and whether all is finite, of one leaf."""
    # NumPy's promotion, which holds under jax_numpy_dtype_promotion="strict", too.
    wide = np.result_type(*(x.dtype for x in (*downs, *ups)), np.float32)
    downs, ups = ([x.astype(wide) for x in side] for side in (downs, ups))
    pairs = zip(weights, scalings, strict=True)
    coefficients = [w.astype(wide) * s.astype(wide) for w, s in pairs]
    down, up = concatenated(downs, ups, coefficients)
    error = jnp.zeros((), jnp.float32)
    if mode == "svd":
        down, up, values = truncated(down, up, rank)
        error = relative_tail(values, rank).astype(jnp.float32)
    elif mode == "linear":
        exact = down, up
        down, up = _linear(downs, ups, coefficients)
        rest = jnp.concatenate([exact[0], down], -1), jnp.concatenate([exact[1], -up], -2)
        norm, off = (jnp.sqrt(jnp.sum(jnp.square(product_norm(*p)))) for p in (exact, rest))
        error = (off / jnp.where(norm > 0, norm, 1)).astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(down)) & jnp.all(jnp.isfinite(up))
    return down.astype(dtype), up.astype(dtype), error, finite


def _linear(
    downs: list[jax.Array], ups: list[jax.Array], coefficients: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Sums each side by itself; the sign of a coefficient goes to `down` alone."""
    roots = [jnp.sqrt(jnp.abs(c))[..., None, None] for c in coefficients]
    signs = [jnp.sign(c)[..., None, None] for c in coefficients]
    scaled = [s * r * x for s, r, x in zip(signs, roots, downs, strict=True)]
    up = sum((r * x for r, x in zip(roots[1:], ups[1:], strict=True)), roots[0] * ups[0])
    return sum(scaled[1:], scaled[0]), up
