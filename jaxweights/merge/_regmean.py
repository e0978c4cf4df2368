"""RegMean: the matrices whose outputs are nearest to those of all models on their own data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._context import Context
from jaxweights.core._lapack import cholesky, solve_factored
from jaxweights.core._layout import Layout, is_default_target, is_float, is_vector
from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, path_key, unflatten
from jaxweights.core._stats import Needs, Stats
from jaxweights.core._transform import Transform, stateless
from jaxweights.merge._mean import _mean_of_leaves
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    Weights,
    all_finite,
    check_names,
    check_positive_weights,
    compute_dtype,
    label,
    merge_leaves,
    per_model,
    require_models,
    selected,
)
from jaxweights.merge._views import matrix_views
from jaxweights.weights._axes import View

_NAME = "merge.regmean"


def regmean(
    *,
    stats: Sequence[Stats],
    weights: Weights = None,
    alpha: float = 0.9,
    damping: float = 1e-6,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Fits each matrix to the outputs that the models have on their own inputs.

    With :math:`G_i` the mean outer product of the inputs that matrix :math:`K_i` saw in model
    :math:`i`, minimises :math:`\sum_i w_i \|X_i K - X_i K_i\|^2`:

    .. math:: K = \bar K + \Bigl(\sum_i w_i \tilde G_i + \epsilon I\Bigr)^{-1}
              \sum_i w_i \tilde G_i (K_i - \bar K)

    where :math:`\bar K` is the weighted mean and :math:`\tilde G_i` is :math:`G_i` with its
    off-diagonal entries multiplied by `alpha`. Directions that no example excites take the mean,
    and models that agree keep their values bit for bit.

    Stacked layers and experts are merged one by one, each with its own Gram matrix. Biases, norms,
    embedding tables, and heads and routers without statistics, take the weighted mean.

    Args:
      stats: One `Stats` per model, in the order of `models`, each from
        `calibrate(fn, model, batches, needs=regmean_needs(model))` on that model's own data.
      weights: One number per model, none negative; None gives equal ones.
      alpha: Share of the off-diagonal entries that is kept, in [0, 1]. 0 is a mean weighted by
        input variances; 0.9 suits most encoders, 0.1 T5-like models.
      damping: Ridge towards the mean, as a fraction of the mean diagonal of the sum.
      names: What errors call the models.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), as in `mean`.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If a matrix lacks statistics in some model, or its Gram matrices cannot be
        inverted.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> model = lambda params, x: x @ params["kernel"]
      >>> models = [{"kernel": jnp.zeros((2, 1))}, {"kernel": jnp.ones((2, 1))}]
      >>> data = [jnp.array([[3.0, 0.0]]), jnp.array([[1.0, 0.0]])]  # nobody excites the second
      >>> stats = [
      ...     jw.calibrate(model, m, [x], needs=jw.merge.regmean_needs(m))
      ...     for m, x in zip(models, data)
      ... ]
      >>> merged = jw.apply(jw.merge.regmean(stats=stats), models[0], models=models)
      >>> [f"{x:.2f}" for x in merged["kernel"].ravel()]  # (9 * 0 + 1 * 1) / 10, and the mean
      ['0.10', '0.50']

    Source: Jin et al. 2022, arXiv:2212.09849, equations 1 and 2.
    Differs: (1) a ridge towards the mean; the authors invert the bare sum.
    """
    stats = tuple(stats)
    if not stats:
        raise ValueError(f"{_NAME}: stats is empty. Pass one Stats per model.")
    for i, entry in enumerate(stats):
        if not isinstance(entry, Stats):
            raise TypeError(
                f"{_NAME}: stats[{i}] is a {type(entry).__name__}, not a Stats. Pass what "
                "calibrate(fn, model, batches, needs=regmean_needs(model)) returned."
            )
    if not isinstance(alpha, Tracer) and not 0 <= alpha <= 1:
        raise ValueError(f"{_NAME}: alpha={alpha} must lie in [0, 1].")
    if not damping >= 0:
        raise ValueError(f"{_NAME}: damping={damping} must not be negative.")
    weights = check_positive_weights(_NAME, weights)
    check_names(_NAME, names)
    output = Output.checked(_NAME, out_dtype, rounding, nonfloat)

    def update(params: Params, context: Context) -> Params:
        everything, structure = flatten(params)
        flat = selected(everything, context)
        models = require_models(_NAME, flat, context, names, delta=False)
        per_model(_NAME, "stats", list(range(len(stats))), len(models))
        shares = np.ones(len(models)) if weights is None else weights
        per_model(_NAME, "weights", shares, len(models))
        views = _fitted(flat, stats, context, names)
        solved = {}

        def merge_leaf(path: Path, leaf: Any, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            key = None
            if output.rounds_randomly(leaf):
                key = path_key(context.require("key", _NAME), path)
            dtype, compute = output.dtype_of(leaf), compute_dtype(leaf)
            given = jnp.asarray(shares, compute)
            if path not in views:
                return _mean_of_leaves(
                    leaves[0], leaves[1:], given, key, normalize=True, output=output, dtype=dtype
                )
            merged, finite, solved[path] = _regmean_of_leaves(
                leaves,
                [s.get(path, "gram") for s in stats],
                [s.get(path, "count") for s in stats],
                given,
                jnp.asarray(alpha, compute),
                jnp.asarray(damping, compute),
                key,
                view=views[path],
                output=output,
                dtype=dtype,
            )
            return merged, finite

        new = merge_leaves(_NAME, flat, models, context, output, names, merge_leaf)
        if not any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in solved.values()):
            fail(_NAME, [_unsolved(path, damping) for path, good in solved.items() if not good])
        return unflatten(structure, everything | new)

    return stateless(update, name=_NAME, scope="leaf")


def regmean_needs(params: Params) -> Needs:
    """The statistics that `regmean` wants of each model, for `calibrate`.

    Args:
      params: A model, or its shapes.

    Returns:
      Gram matrices and counts of every matrix but embeddings, heads, routers and norms. Add heads
      by hand where they should be fitted too.

    Example:
      >>> import jax.numpy as jnp
      >>> needs = regmean_needs({"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
      >>> [(path, sorted(names)) for path, names in needs.items()]
      [('up/kernel', ['count', 'gram'])]
    """
    return {
        path: frozenset(("gram", "count"))
        for path, leaf in flatten(params)[0].items()
        if is_float(leaf) and not is_vector(path, leaf) and is_default_target(path)
    }


def _fitted(
    flat: Flat, stats: tuple[Stats, ...], context: Context, names: Sequence[str] | None
) -> dict[Path, View]:
    """Views of the matrices that are fitted; what lacks statistics and should not is one error."""
    floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
    views = matrix_views(_NAME, floats, _layout(context.layout, stats, floats), named=False)
    fitted, problems = {}, []
    for path, view in views.items():
        has = [s.get(path, "gram") is not None for s in stats]
        if not any(has) and not (is_default_target(path) or context.named):
            continue
        for i, entry in enumerate(stats):
            problem = _unfit(path, floats[path], view, entry)
            problems += [f"{problem} This is stats of {label(names, i)}."] if problem else []
        fitted[path] = view
    fail(_NAME, problems)
    return fitted


def _layout(layout: Layout, stats: tuple[Stats, ...], flat: Flat) -> Layout:
    """The layout, in which the axes that calibration saw win: Gram matrices are of those."""
    seen = stats[0].layout
    stated = {path: axes for path, axes in seen.items() if path in flat}
    new = layout.with_stated(stated)
    return Layout(new.entries, layout.traced or seen.traced, new.unclear, new.seen)


def _unfit(path: Path, leaf: Any, view: View, stats: Stats) -> str | None:
    stack = tuple(leaf.shape[a] for a in view.stack_axes(len(leaf.shape)))
    if problem := stats.why_grouped(path, stack):
        return problem
    wanted = {"gram": (*stack, view.in_dim, view.in_dim), "count": stack}
    for statistic, expected in wanted.items():
        value = stats.get(path, statistic)
        if value is None:
            return stats.why_missing(path, statistic).replace(
                "needs=tx.needs(params)", "needs=regmean_needs(params)"
            )
        if tuple(value.shape) != expected:
            return (
                f"{path!r}: the statistic {statistic!r} has shape {tuple(value.shape)}, but a "
                f"weight of shape {tuple(leaf.shape)} needs {expected}. Calibrate this model."
            )
    return None


def _unsolved(path: Path, damping: float) -> str:
    return (
        f"{path!r}: the sum of the Gram matrices is not positive definite in float32 with "
        f"damping={damping:g}, or not finite. Pass a smaller alpha or a larger damping, or "
        "calibrate on more examples."
    )


@functools.partial(jax.jit, static_argnames=("view", "output", "dtype"))
def _regmean_of_leaves(
    leaves: list[jax.Array],
    grams: list[jax.Array],  # (*stack, in, in)
    counts: list[jax.Array],  # (*stack,)
    weights: jax.Array,  # (models,)
    alpha: jax.Array,
    damping: jax.Array,
    key: jax.Array | None,
    *,
    view: View,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The merged leaf, whether it is finite, and whether every system could be solved."""
    wide = [leaf.astype(weights.dtype) for leaf in leaves]
    shares = weights / jnp.sum(weights)
    shift = sum(share * (x - wide[0]) for share, x in zip(shares[1:], wide[1:], strict=True))
    center = wide[0] + shift
    # A model's own Gram matrix is the mean over its tokens, so that more data is not more weight.
    means = [
        gram.astype(weights.dtype) / jnp.maximum(count, 1).astype(weights.dtype)[..., None, None]
        for gram, count in zip(grams, counts, strict=True)
    ]
    pulls = [view.to_matrix(x - center) for x in wide]
    fit = functools.partial(_fit, weights=shares, alpha=alpha, damping=damping)
    moved, solved = map_over_stack(fit, (pulls, means), pulls[0].shape[:-2])
    stored = output.store(center + view.from_matrix(moved), dtype, key)
    solved = jnp.all(solved)
    # What could not be solved is NaN, and has an error of its own.
    return stored, all_finite(stored) | ~solved, solved


def _fit(
    operands: tuple[list[jax.Array], list[jax.Array]],
    *,
    weights: jax.Array,
    alpha: jax.Array,
    damping: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Least-squares shift of one matrix from the mean, and whether it could be found."""
    deltas, grams = operands  # (in, out), (in, in), per model
    n = deltas[0].shape[0]
    identity = jnp.eye(n, dtype=weights.dtype)
    total, pull = jnp.zeros_like(grams[0]), jnp.zeros_like(deltas[0])
    for weight, delta, gram in zip(weights, deltas, grams, strict=True):
        # Not alpha * gram + (1 - alpha) * diagonal, whose sum on the diagonal would round.
        damped = weight * jnp.where(identity > 0, gram, alpha * gram)
        total += damped
        pull += jnp.matmul(damped, delta, precision="highest")
    mean_diagonal = jnp.trace(total) / n
    # Without any data the system is the identity, and the shift zero.
    ridge = jnp.where(mean_diagonal > 0, damping * mean_diagonal, 1)
    with jax.default_matmul_precision("highest"):
        factor = cholesky(total + ridge * identity)
        moved = solve_factored(factor, pull)
    # A sum, because maxima may lose NaN; a failed factorization is NaN throughout.
    return moved, jnp.isfinite(jnp.sum(factor * 0))
