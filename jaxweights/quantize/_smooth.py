"""smooth: SmoothQuant, moving the difficulty of activations into the weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.core._context import Context
from jaxweights.core._paths import Params, fail, flatten, unflatten
from jaxweights.core._transform import Transform
from jaxweights.quantize._folds import Fold, check_folds, fold_scale, inner, keep_scale
from jaxweights.quantize._groups import (
    Group,
    find_groups,
    group_targets,
    nonfinite_leaves,
    scales_groups,
)
from jaxweights.quantize._settings import check_share, is_word
from jaxweights.weights._axes import View

_NAME = "quantize.smooth"
_LEAST = 1e-5  # of the authors' code, for the scale and for the weights' magnitude
Unfolded = Literal["keep", "leave"]


def smooth_scale(
    input_max: Float[Array, "in"], weight_max: Float[Array, "in"], *, alpha: float = 0.5
) -> Float[Array, "in"]:
    r"""The vector that activations are divided and weights multiplied by.

    :math:`s_k = \max|x_k|^\alpha / \max|w_k|^{1-\alpha}`.

    Args:
      input_max: Largest magnitude of every input over tokens, `(*, in)`.
      weight_max: Largest magnitude in every input row of all weights that read it, `(*, in)`.
      alpha: Share of the difficulty that moves into the weights, 0 to 1.

    Returns:
      The scale, float32, at least 1e-5; 1 where an input is always zero or was never seen.

    Example:
      >>> smooth_scale(jnp.array([16.0, 1.0]), jnp.array([1.0, 4.0])).tolist()
      [4.0, 0.5]
    """
    check_share(f"{_NAME}_scale", alpha=alpha)
    x = input_max.astype(jnp.float32)
    w = jnp.maximum(weight_max.astype(jnp.float32), _LEAST)
    scale = jnp.maximum(x**alpha / w ** (1 - alpha), _LEAST)
    return jnp.where((x > 0) & jnp.isfinite(scale), scale, 1)


def smooth(
    *, alpha: float = 0.5, folds: Fold | Sequence[Fold] = (), unfolded: Unfolded = "keep"
) -> Transform:
    r"""Divides outliers out of activations and multiplies them into the weights.

    Every input channel is divided by :math:`s_k = \max|x_k|^\alpha / \max|w_k|^{1-\alpha}` and the
    rows of all weights that read it multiplied by it, so that 8 bits suffice for both. The function
    stays what it was, to rounding; quantize it afterwards. Where a fold names who writes the
    activation, the division goes there and costs nothing when the model runs; else it stays before
    the weight, as `Rescaled`.

    Args:
      alpha: Share of the difficulty that moves into the weights: 0.5 makes the largest magnitudes
        of inputs and weights equal, 1 those of all inputs 1. Llama-2 wants 0.85, Mistral 0.8.
      folds: Who writes and who reads: `llama_folds(config)`, `bert_folds(config)`, or your own.
      unfolded: What becomes of weights in no fold: "keep" puts the vector before them, "leave" does
        not touch them, as the paper treats all but those behind norms.

    Returns:
      A transform; it needs the statistics "min" and "max". Weights that read the same input share a
      scale, one for every layer of a stack.

    Raises:
      ValueError: If a setting is out of range; when it sees a tree, if a fold's leaves are missing,
        do not fit, or somebody else reads the activation.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"norm": jnp.ones(8), "kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> model = lambda params, x: (x * params["norm"]) @ params["kernel"]
      >>> x = jax.random.normal(jax.random.key(1), (16, 8)).at[:, 3].mul(30.0)
      >>> tx = jw.quantize.smooth(alpha=0.5, folds=[jw.quantize.Fold("kernel", "norm")])
      >>> stats = jw.calibrate(model, params, [x], needs=tx.needs(params))
      >>> smoothed = jw.apply(tx, params, stats=stats)
      >>> jw.quantize.check_same_function(model, params, smoothed, [x]) < 1e-5
      True

    Source: Xiao et al. 2023, arXiv:2211.10438, equation 4, and the authors' code.
    Differs: (1) Inputs that are always zero keep their rows; the authors' lower bound would
      multiply their writers by 1e5. (2) Values and output projection, and `up` and `down`, are
      folded too where a fold says so.
    """
    check_share(_NAME, alpha=alpha)
    if not is_word(unfolded, ("keep", "leave")):
        raise ValueError(f"{_NAME}: unfolded={unfolded!r} is unknown. Choose 'keep' or 'leave'.")
    folds = check_folds(_NAME, folds)
    wanted = frozenset({"count", "min", "max"})

    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(params)
        targets = group_targets(flat, context, _NAME, wanted)
        groups = find_groups(_NAME, folds, flat, context, targets, shared=True)
        new, finite = dict(flat), {}
        for group in groups:
            if group.site is None and unfolded == "leave":
                continue
            scale, ok = _scale_of(group, flat, context, float(alpha))
            finite |= zip(group.quantized, ok)
            if group.site is not None:
                new = fold_scale(new, group.site, scale, context.layout)
            else:
                for path in group.quantized:
                    new[path] = keep_scale(new[path], scale, group.views[path])
        fail(_NAME, nonfinite_leaves(flat, finite))
        return unflatten(structure, new)

    return scales_groups(update, _NAME, wanted)


def _scale_of(
    group: Group, flat: Any, context: Context, alpha: float
) -> tuple[jax.Array, list[jax.Array]]:
    stats: Any = context.stats
    read = lambda name: [stats.get(path, name) for path in group.quantized]  # noqa: E731
    leaves = [inner(flat[path]) for path in group.quantized]
    views = tuple(group.views[path] for path in group.quantized)
    return _group_scale(leaves, read("min"), read("max"), views, group.fold, alpha)


@functools.partial(jax.jit, static_argnames=("views", "fold", "alpha"))
def _group_scale(
    leaves: list[jax.Array],
    low: list[jax.Array],
    high: list[jax.Array],
    views: tuple[View, ...],
    fold: Fold | None,
    alpha: float,
) -> tuple[jax.Array, list[jax.Array]]:
    """The scale, and whether each weight is finite."""
    finite = [jnp.isfinite(jnp.sum(leaf * 0)) for leaf in leaves]  # a maximum may lose NaN
    rows = [
        jnp.max(jnp.abs(view.to_matrix(leaf)), axis=-1, initial=0).astype(jnp.float32)
        for leaf, view in zip(leaves, views, strict=True)
    ]
    inputs = [jnp.maximum(jnp.abs(a), jnp.abs(b)) for a, b in zip(low, high, strict=True)]
    weight_max, input_max = (functools.reduce(jnp.maximum, x) for x in (rows, inputs))
    if fold is not None:
        weight_max, input_max = (fold.gather(x, jnp.max) for x in (weight_max, input_max))
    return smooth_scale(input_max, weight_max, alpha=alpha), finite
