"""joint: a weight as the sum of a quantized, a sparse and a low-rank part, fitted together."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._context import Context
from jaxweights.core._host import where_not_finite
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, unflatten
from jaxweights.core._stats import Needs
from jaxweights.core._targets import stack_sizes
from jaxweights.core._transform import Transform, stateless, widest
from jaxweights.quantize._around import (
    changed_leaves,
    check_quantizer,
    needs_around,
    quantize_alone,
)
from jaxweights.quantize._calibrated import nonfinite_statistics
from jaxweights.quantize._joint_fit import Settings, fit_leaf
from jaxweights.quantize._settings import (
    check_count,
    check_float_dtype,
    check_numbers,
    check_positive,
)
from jaxweights.weights._axes import View
from jaxweights.weights._weight import is_weight

_TOO_LARGE = (
    "Choose a wider dtype, repair the checkpoint, or leave this weight out with `partition`."
)


def joint(
    quantizer: Transform,
    *,
    rank: int = 0,
    outliers: float = 0.0,
    sweeps: int = 3,
    dtype: DTypeLike = jnp.bfloat16,
) -> Transform:
    r"""Splits weights into quantized, sparse and low-rank parts that share one objective.

    Minimises :math:`\operatorname{tr}(D^\top H D)`, :math:`D = W - Q - S - A B`, with H the Gram
    matrix of the layer's inputs, by turns: the outliers S are the entries of :math:`W - AB` with
    the largest :math:`w_{ij}^2 H_{ii}`; Q is what the quantizer makes of :math:`W - S - AB`; and
    AB is the best low-rank matrix for :math:`W - S - Q` (`low_rank_of`). No sweep makes a matrix
    worse, because the best parts so far are kept. For a matrix that no token reached, such as that
    of an expert, all inputs count alike.

    Args:
      quantizer: Any transform that treats each leaf by itself, such as `round_to_nearest` or
        `gptq`. Leaves that it does not change stay as they are.
      rank: Columns of A, 0 for no low-rank part. It takes `rank * (in + out)` values.
      outliers: Share of the entries that are stored apart, in [0, 1); 0 for no sparse part. 0.005
        takes 0.24 bits a weight in bfloat16.
      sweeps: Turns, at least 1.
      dtype: Dtype of A, B and the outliers' values.

    Returns:
      A transform from dense matrices to `LowRank` over `Outliers` over what the quantizer makes,
      without the parts that are not asked for. It needs the statistics "gram" and "count".

    Raises:
      TypeError: If the quantizer is no transform, or a setting is of the wrong kind.
      ValueError: If a setting is out of range; on a tree, if the rank exceeds a side of a matrix,
        a leaf is represented already, a statistic is missing or not finite, or as the quantizer.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> tx = jw.quantize.joint(jw.quantize.gptq(bits=3), rank=4, outliers=0.01)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> weight = jw.apply(tx, params, stats=stats)["kernel"]
      >>> type(weight).__name__, weight.base.describe()
      ('LowRank', 'Outliers(Quantized(bits=3), count=20)')

    Source: Q + AB by turns: Saha et al. 2024, arXiv:2405.18886 (CALDERA), Algorithm 1; outliers
      beside a quantized weight: Dettmers et al. 2023, arXiv:2306.03078 (SpQR).
    Differs: (1) The factors stay floating. (2) Outliers are chosen by :math:`w^2 H_{ii}` of the
      whole matrix, not by the error of rounding within a group, and are added to the base, not put
      in place of it.
    """
    settings = _check("quantize.joint", quantizer, rank, outliers, sweeps, dtype)
    return _transform("quantize.joint", quantizer, settings)


def low_rank_residual(
    quantizer: Transform, *, rank: int, dtype: DTypeLike = jnp.bfloat16
) -> Transform:
    r"""Adds to a quantized weight the low-rank matrix that best undoes the error of its outputs.

    One turn of `joint`: :math:`W \approx Q + AB` with the AB of the least
    :math:`\operatorname{tr}(D^\top H D)`. At the same rank, an unweighted decomposition of the
    residual leaves several times as much of the outputs' error where inputs are correlated.

    Args:
      quantizer: As in `joint`.
      rank: Columns of A, at least 1.
      dtype: Dtype of the factors.

    Returns:
      A transform from dense matrices to `LowRank` over what the quantizer makes. It needs the
      statistics "gram" and "count".

    Raises:
      TypeError: As `joint`.
      ValueError: As `joint`.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> tx = jw.quantize.low_rank_residual(jw.quantize.round_to_nearest(bits=3), rank=4)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].rank
      4

    Source: Liu et al. 2024, arXiv:2410.21271 (EoRA); Zhang et al. 2024, arXiv:2410.06040 (QERA).
    Differs: (1) The inverse root of the Gram matrix is not formed, so that none is needed.
    """
    name = "quantize.low_rank_residual"
    settings = _check(name, quantizer, rank, 0.0, 1, dtype, least_rank=1)
    return _transform(name, quantizer, settings)


def loftq(
    quantizer: Transform,
    *,
    rank: int,
    iterations: int = 1,
    alpha: float | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Transform:
    r"""Starts low-rank adapters where they undo what quantizing their base did to the weight.

    By turns :math:`Q = q(W - s A B)` and :math:`s A B` the truncated singular value decomposition
    of :math:`W - Q`, both sides with the root of the singular values. Then train only the factors:
    `split(params, adapt.factors)`. Needs no data; with data, `low_rank_residual` fits outputs.

    Args:
      quantizer: As in `joint`.
      rank: Columns of A, at least 1.
      iterations: Turns, at least 1; those that make a matrix worse are not kept.
      alpha: :math:`s` is `alpha / rank`; None means `rank`. The product does not depend on it.
      dtype: Dtype of the factors.

    Returns:
      A transform from dense matrices to `LowRank` over what the quantizer makes.

    Raises:
      TypeError: As `joint`.
      ValueError: As `joint`.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> rounded = jw.quantize.round_to_nearest(bits=4, group_size=32)
      >>> start = jw.apply(jw.quantize.loftq(rounded, rank=8), params)["kernel"]
      >>> error = lambda weight: float(jnp.linalg.norm(weight.materialize() - params["kernel"]))
      >>> error(start) < 0.9 * error(start.base)
      True

    Source: Li et al. 2023, arXiv:2310.08659, Algorithm 1.
    Differs: (1) The best turn is kept; absmax scales may make a later one worse.
    """
    name = "quantize.loftq"
    settings = _check(name, quantizer, rank, 0.0, iterations, dtype, least_rank=1)
    if alpha is not None:
        check_positive(name, alpha=alpha)
    scaling = 1.0 if alpha is None else float(alpha) / rank
    settings = dataclasses.replace(settings, weighted=False, scaling=scaling)
    return _transform(name, quantizer, settings)


def _check(
    name: str,
    quantizer: Any,
    rank: int,
    outliers: float,
    sweeps: int,
    dtype: DTypeLike,
    *,
    least_rank: int = 0,
) -> Settings:
    check_quantizer(name, quantizer)
    check_count(name, "rank", rank, least=least_rank)
    check_numbers(name, outliers=outliers)
    if not 0 <= outliers < 1:
        raise ValueError(f"{name}: outliers={outliers} must lie in [0, 1): a share of the entries.")
    check_count(name, "iterations" if name.endswith("loftq") else "sweeps", sweeps)
    if rank == 0 and outliers == 0:
        raise ValueError(
            f"{name}: rank=0 and outliers=0 leave nothing beside the quantized part. Ask for one "
            "of them, or apply the quantizer alone."
        )
    check_float_dtype(name, dtype=dtype)
    return Settings(rank, float(outliers), sweeps, True, 1.0, np.dtype(dtype))


def _transform(name: str, quantizer: Transform, settings: Settings) -> Transform:
    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(params)
        if settings.weighted and any(is_float(x) and len(x.shape) > 1 for x in flat.values()):
            context.require("stats", name)
        changed = changed_leaves(quantizer, flat, context)
        views = _views(name, changed, flat, context, settings)
        new, problems = dict(flat), []
        for done, (path, view) in enumerate(views.items(), start=1):
            quantize = functools.partial(quantize_alone, quantizer, flat, context, path)
            new[path] = fit_leaf(
                flat[path], quantize, _gram(context, path, settings), view, settings
            )
            problems += _overflown(path, new[path], settings)
            if context.progress is not None:
                context.progress(path, done, len(views))
        fail(name, problems)
        return unflatten(structure, new)

    def needs(params: Params, *, named: bool = False) -> Needs:
        return needs_around(name, quantizer, params, named=named, weighted=settings.weighted)

    made = stateless(
        update,
        name=f"{name}({quantizer.name})",
        needs=needs,
        reads_statistics=settings.weighted or quantizer.reads_statistics,
        scope=widest(("leaf", quantizer.scope)),
    )
    if quantizer.for_leaf is None:
        return made
    alone = lambda path: _transform(name, quantizer.on(path), settings)  # noqa: E731
    return dataclasses.replace(made, for_leaf=alone)


def _views(
    name: str, changed: list[Path], flat: Flat, context: Context, settings: Settings
) -> dict[Path, View]:
    """Views of the leaves to fit; every leaf that cannot be is one error."""
    views: dict[Path, View] = {}
    problems = []
    for path in changed:
        leaf = flat[path]
        if is_weight(leaf):
            problems.append(
                f"{path!r}: is already a {type(leaf).__name__}, whose structure the sum would "
                "break. Apply it to the dense weight, or leave this one out with `partition`."
            )
            continue
        problems += _too_large(path, leaf, settings)
        view = views[path] = View.of(leaf.shape, context.layout[path])
        most = min(view.in_dim, view.out_dim)
        if settings.rank > most:
            problems.append(
                f"{path!r}: rank={settings.rank} exceeds what a matrix ({view.in_dim}, "
                f"{view.out_dim}) can have. Choose at most {most}, or leave it out with "
                "`partition`."
            )
        if settings.weighted:
            stats: Any = context.stats
            if stats.get(path, "gram") is None:
                problems.append(stats.why_missing(path, "gram"))
            elif problem := stats.why_other_axes(path, view.axes.inputs) or stats.why_grouped(
                path, stack_sizes(leaf, view)
            ):
                problems.append(problem)
    fail(name, problems)
    if settings.weighted:
        stats = context.stats
        fail(name, nonfinite_statistics(stats, views, "gram"))
    return views


def _too_large(path: Path, leaf: jax.Array, settings: Settings) -> list[str]:
    """Complains about values that outliers, which are the largest, cannot be."""
    if not settings.outliers or isinstance(leaf, Tracer | jax.ShapeDtypeStruct) or not leaf.size:
        return []
    largest = float(jnp.max(jnp.abs(jnp.asarray(leaf).astype(jnp.float32))))
    if not float(jnp.finfo(settings.dtype).max) < largest < np.inf:
        return []
    return [
        f"{path!r}: holds values up to {largest:g}, too large for outliers in {settings.dtype}. "
        f"{_TOO_LARGE}"
    ]


def _overflown(path: Path, weight: Any, settings: Settings) -> list[str]:
    """Complains about factors that are not finite."""
    factors = [weight.down, weight.up] if settings.rank else []
    if not any(not isinstance(part, Tracer) and len(where_not_finite(part)) for part in factors):
        return []
    return [f"{path!r}: its factors are too large for {settings.dtype}. {_TOO_LARGE}"]


def _gram(context: Context, path: Path, settings: Settings) -> jax.Array | None:
    return context.stats.get(path, "gram") if settings.weighted and context.stats else None
