"""The straight line between two models."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._apply import apply
from jaxweights.core._context import Context
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Params, Path, flatten, path_key, unflatten
from jaxweights.core._transform import Transform, stateless
from jaxweights.merge._models import (
    Nonfloat,
    Output,
    Rounding,
    all_finite,
    check_names,
    compute_dtype,
    merge_leaves,
    require_models,
    selected,
)

Alphas = Sequence[float] | np.ndarray | jax.Array

_NAME = "merge.interpolate"


def interpolate(
    *,
    alpha: float | jax.Array = 0.5,
    extrapolate: bool = False,
    names: Sequence[str] | None = None,
    out_dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    nonfloat: Nonfloat = "base",
) -> Transform:
    r"""Goes part of the way from the base to one model.

    :math:`(1 - \alpha)\theta_0 + \alpha\theta_1`: the base is the tree that is transformed, and
    `models` holds the other one. Fine-tuned models gain robustness that way (WiSE-FT), and keep
    what fine-tuning would forget. At 0 and at 1 the result is either model bit for bit.

    Args:
      alpha: Share of the model; 0.5 is the authors' choice without validation data. May be traced,
        and is differentiable. For one per layer, use `partition`.
      extrapolate: Whether `alpha` may lie outside of [0, 1].
      names: What errors call the model, as a list of one.
      out_dtype: Dtype of the merged leaves; None keeps the base's.
      rounding: `"nearest"`, or `"stochastic"` (needs a key), as in `mean`.
      nonfloat: As in `mean`.

    Returns:
      The transform; it acts on every floating leaf.

    Raises:
      ValueError: If `alpha` is out of range, or there is not exactly one model.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> base, model = {"bias": jnp.array([1.0])}, {"bias": jnp.array([3.0])}
      >>> jw.apply(jw.merge.interpolate(alpha=0.25), base, models=[model])["bias"]
      Array([1.5], dtype=float32)

    Source: Wortsman et al. 2021, WiSE-FT, arXiv:2109.01903.
    """
    _check_alphas(_NAME, alpha, extrapolate)
    return _interpolation(alpha, names, Output.checked(_NAME, out_dtype, rounding, nonfloat))


def interpolate_path(
    base: Params,
    model: Params,
    alphas: Alphas,
    *,
    extrapolate: bool = False,
    out_dtype: DTypeLike | None = None,
) -> Params:
    """Every model on a grid between two, stacked, for `jax.vmap` over the line.

    Args:
      base: The model at 0.
      model: The model at 1.
      alphas: Shares of `model`, `(points,)`.
      extrapolate: Whether they may lie outside of [0, 1].
      out_dtype: Dtype of the floating leaves; None keeps the base's.

    Returns:
      A tree like `base` whose leaves have the points in front. For models that do not fit into
      memory so many times, see `iterate_path`.

    Raises:
      ValueError: If the models do not match, or an alpha is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> base, model = {"bias": jnp.array([1.0])}, {"bias": jnp.array([3.0])}
      >>> path = interpolate_path(base, model, [0.0, 0.5, 1.0])
      >>> jax.vmap(lambda params: params["bias"][0] ** 2)(path)
      Array([1., 4., 9.], dtype=float32)
    """
    if np.ndim(alphas) != 1:
        raise ValueError(
            f"merge.interpolate_path: alphas has shape {np.shape(alphas)}. Pass one number a point."
        )
    _check_alphas("merge.interpolate_path", alphas, extrapolate)
    if not isinstance(alphas, jax.Array):
        alphas = np.asarray(alphas, np.float64)
    tx = _interpolation(alphas, None, Output.checked(_NAME, out_dtype, "nearest", "base"))
    return apply(tx, base, models=[model])


def iterate_path(
    base: Params,
    model: Params,
    alphas: Sequence[float] | np.ndarray,
    *,
    extrapolate: bool = False,
    out_dtype: DTypeLike | None = None,
) -> Iterator[tuple[float, Params]]:
    """Yields every model on a grid between two, one at a time.

    Args:
      base: The model at 0.
      model: The model at 1.
      alphas: Shares of `model`.
      extrapolate: Whether they may lie outside of [0, 1].
      out_dtype: Dtype of the floating leaves; None keeps the base's.

    Yields:
      Pairs of alpha and model. All alphas share one compiled program.

    Example:
      >>> import jax.numpy as jnp
      >>> base, model = {"bias": jnp.array([1.0])}, {"bias": jnp.array([3.0])}
      >>> [float(params["bias"][0]) for _, params in iterate_path(base, model, [0.0, 0.5])]
      [1.0, 2.0]
    """
    for alpha in alphas:
        tx = interpolate(alpha=float(alpha), extrapolate=extrapolate, out_dtype=out_dtype)
        yield float(alpha), apply(tx, base, models=[model])


def _check_alphas(name: str, alpha: Any, extrapolate: bool) -> None:
    if isinstance(alpha, Tracer):
        return
    values = np.asarray(alpha, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: alpha={alpha} must be finite.")
    if not extrapolate and ((values < 0) | (values > 1)).any():
        raise ValueError(
            f"{name}: alpha={alpha} lies outside of [0, 1]. Pass extrapolate=True to go beyond "
            "the two models."
        )


def _interpolation(alpha: Any, names: Sequence[str] | None, output: Output) -> Transform:
    """`alpha` of shape `()`, or `(points,)` for leaves with the points in front."""
    check_names(_NAME, names)
    points = np.shape(alpha)

    def update(params: Params, context: Context) -> Params:
        everything, structure = flatten(params)
        flat = selected(everything, context)
        models = require_models(_NAME, flat, context, names, delta=False)
        if len(models) != 1:
            raise ValueError(
                f"{_NAME}: {len(models)} models were given. Pass exactly one beside the base; for "
                "more, use `mean` or `task_arithmetic`."
            )

        def merge_leaf(path: Path, leaf: Any, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            key = None
            if output.rounds_randomly(leaf):
                key = path_key(context.require("key", _NAME), path)
            share = jnp.asarray(alpha, compute_dtype(leaf))
            return _interpolate_leaf(
                leaf, leaves[0], share, key, output=output, dtype=output.dtype_of(leaf)
            )

        new = merge_leaves(_NAME, flat, models, context, output, names, merge_leaf)
        for path, leaf in new.items():
            if points and not is_float(leaf):
                new[path] = jnp.broadcast_to(leaf, (*points, *np.shape(leaf)))
        return unflatten(structure, everything | new)

    return stateless(update, name=_NAME, scope="entry" if output.rounding == "nearest" else "leaf")


@functools.partial(jax.jit, static_argnames=("output", "dtype"))
def _interpolate_leaf(
    base: jax.Array,
    model: jax.Array,
    alpha: jax.Array,
    key: jax.Array | None,
    *,
    output: Output,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    first, second = base.astype(alpha.dtype), model.astype(alpha.dtype)

    def point(a: jax.Array) -> jax.Array:
        # Two products: first + a * (second - first) would not end at second. The ends are taken
        # as they are, because a product with 0 loses the sign of -0.
        mixed = (1 - a) * first + a * second
        return output.store(jnp.where(a == 0, first, jnp.where(a == 1, second, mixed)), dtype, key)

    stored = jax.vmap(point)(alpha) if alpha.ndim else point(alpha)
    return stored, all_finite(stored)
