"""Singular values of every matrix of a model, and the norms and ranks that follow from them."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from jaxweights.analyze._matrices import (
    Method,
    Precision,
    check_precision,
    matrix_view,
    power_of_two,
    singular_values,
)
from jaxweights.analyze._report import Report, Select, selected, why_no_matrix
from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import Params, Path, fail, flatten
from jaxweights.weights._axes import View
from jaxweights.weights._weight import materialize


class Spectrum(NamedTuple):
    """Spectrum of each matrix of a leaf; every field has the stack axes in front.

    Attributes:
      singular_values: `(*stack, min(in, out))`, descending.
      fro: Frobenius norm.
      spectral: Largest singular value σ₁.
      nuclear: Sum of the singular values.
      stable_rank: Σσ²/σ₁².
      effective_rank: exp of the entropy of σ/Σσ (or of σ²/Σσ²).
      participation_ratio: (Σσ²)²/Σσ⁴.
      numerical_rank: How many exceed the tolerance, int32.
      energy_rank: How many hold the asked share of Σσ², int32.
      entropy: Entropy of σ²/Σσ² over the log of the numerical rank, in [0, 1].
      valid: Whether the matrix is not zero. All ranks of a zero matrix are 0.
    """

    singular_values: jax.Array
    fro: jax.Array
    spectral: jax.Array
    nuclear: jax.Array
    stable_rank: jax.Array
    effective_rank: jax.Array
    participation_ratio: jax.Array
    numerical_rank: jax.Array
    energy_rank: jax.Array
    entropy: jax.Array
    valid: jax.Array


def spectrum(
    params: Params,
    *,
    layout: LayoutLike = None,
    select: Select = None,
    heads: Literal["split", "flatten"] = "split",
    conv: Literal["flatten", "per_position"] = "flatten",
    entropy_of: Literal["values", "squares"] = "values",
    energy: float = 0.99,
    rtol: float | None = None,
    method: Method = "svd",
    precision: Precision = "float32",
) -> Report[Spectrum]:
    """Takes the singular values of every matrix.

    Stacked layers and experts are matrices by themselves. Represented weights are materialised;
    narrow dtypes are widened first. One program serves all leaves of one shape. Norms and ranks
    that are real numbers are differentiable, also where singular values coincide.

    Args:
      params: Tree of arrays and represented weights.
      layout: Axes of the leaves, as in `apply`.
      select: Regular expression for the whole path, or predicate; None takes all matrices,
        embeddings and heads included.
      heads: Whether kernels with several output axes `(d, heads, head_dim)` or input axes `(heads,
        head_dim, d)` are one matrix per head, or one for all.
      conv: Whether kernels `(h, w, in, out)` are one matrix `(h*w*in, out)` or one per position.
      entropy_of: What `effective_rank` takes the entropy of: σ/Σσ or σ²/Σσ².
      energy: Share of Σσ² that `energy_rank` counts up to, in (0, 1].
      rtol: Tolerance of `numerical_rank` relative to σ₁; None gives the larger side times
        the epsilon of the precision (its root with `method="gram"`).
      method: `"svd"`, or `"gram"`: several times faster, exact only for values above 3e-4 σ₁.
      precision: `"float32"`, or `"float64"`, which needs `jax_enable_x64`.

    Returns:
      A mapping from path to `Spectrum`, whose `skipped` says why the other leaves have none.

    Raises:
      ValueError: If a setting is out of range, nothing is selected, or a leaf is not finite.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> report = jw.analyze.spectrum({"kernel": jnp.eye(4), "bias": jnp.ones(4)})
      >>> float(report["kernel"].stable_rank)
      4.0
      >>> report.skipped
      {'bias': 'has shape (4,), which is no matrix'}

    Source: Roy and Vetterli 2007 (effective rank); Martin and Mahoney 2018, arXiv:1810.01075
    (normalised entropy).
    """
    name = "analyze.spectrum"
    dtype = check_precision(name, precision)
    _check_choice(name, "heads", heads, ("split", "flatten"))
    _check_choice(name, "conv", conv, ("flatten", "per_position"))
    _check_choice(name, "entropy_of", entropy_of, ("values", "squares"))
    _check_choice(name, "method", method, ("svd", "gram"))
    if not 0 < energy <= 1:
        raise ValueError(f"{name}: energy={energy} must lie in (0, 1].")
    flat = flatten(params)[0]
    found = resolve_layout(flat, layout)
    results: dict[Path, Spectrum] = {}
    reasons, finite = [], {}
    for path in selected(name, flat, select):
        leaf = flat[path]
        if (reason := why_no_matrix(path, leaf, found)) is not None:
            reasons.append((path, reason))
            continue
        view = matrix_view(tuple(leaf.shape), found[path], heads, conv)
        if not leaf.size:
            reasons.append((path, f"has shape {tuple(leaf.shape)}, which is empty"))
            continue
        results[path], finite[path] = _spectrum_of_leaf(
            leaf,
            view=view,
            method=method,
            dtype=dtype,
            entropy_of=entropy_of,
            energy=energy,
            rtol=rtol,
        )
    if not any(isinstance(x, jax.core.Tracer) for x in finite.values()):
        bad = [path for path, good in finite.items() if not good]
        fail(name, [describe_nonfinite(path, flat[path]) for path in bad])
    return Report(results, tuple(reasons))


def _check_choice(name: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = " nor ".join(map(repr, choices))
        raise ValueError(f"{name}: {argument}={value!r} is neither {listed}.")


@functools.partial(
    jax.jit, static_argnames=("view", "method", "dtype", "entropy_of", "energy", "rtol")
)
def _spectrum_of_leaf(
    leaf: Any,
    *,
    view: View,
    method: Method,
    dtype: Any,
    entropy_of: str,
    energy: float,
    rtol: float | None,
) -> tuple[Spectrum, jax.Array]:
    matrix = view.to_matrix(materialize(leaf)).astype(dtype)
    unit = power_of_two(matrix)
    values = singular_values(matrix / unit, method) * unit[..., 0]
    if rtol is None:
        rtol = default_rtol(matrix.shape, dtype, method)
    return (
        spectrum_of_values(values, rtol=rtol, energy=energy, entropy_of=entropy_of),
        jnp.all(jnp.isfinite(values)),
    )


def default_rtol(shape: tuple[int, ...], dtype: Any, method: Method) -> float:
    """Relative size below which a singular value may be rounding."""
    rtol = max(shape[-2:]) * float(jnp.finfo(dtype).eps)
    return rtol if method == "svd" else rtol**0.5


def spectrum_of_values(
    values: jax.Array,
    *,
    rtol: float | jax.Array,
    energy: float = 0.99,
    entropy_of: str = "values",
) -> Spectrum:
    """Norms and ranks from singular values.

    Args:
      values: `(*stack, n)`, descending, not negative.
      rtol: As in `spectrum`.
      energy: As in `spectrum`.
      entropy_of: As in `spectrum`.

    Returns:
      The spectrum.
    """
    first = values[..., :1]
    valid = first[..., 0] > 0
    # Relative to the largest: nothing overflows, and a zero matrix divides by one.
    unit = values / jnp.where(first > 0, first, 1)
    squares = unit * unit
    total, spectral = jnp.sum(squares, axis=-1), values[..., 0]
    rank = jnp.sum(unit > rtol, axis=-1, dtype=jnp.int32) * valid.astype(jnp.int32)
    reached = jnp.cumsum(squares, axis=-1)
    missing = jnp.sum(reached < energy * reached[..., -1:], axis=-1, dtype=jnp.int32)
    effective = jnp.exp(_entropy(unit if entropy_of == "values" else squares))
    spread = jnp.log(jnp.maximum(rank, 2).astype(values.dtype))
    safe = jnp.where(valid, total, 1)
    fourth = jnp.where(valid, jnp.sum(squares * squares, axis=-1), 1)
    return Spectrum(
        singular_values=values,
        fro=spectral * jnp.sqrt(safe),
        spectral=spectral,
        nuclear=jnp.sum(values, axis=-1),
        stable_rank=total,
        effective_rank=jnp.where(valid, effective, 0),
        participation_ratio=total * total / fourth,
        numerical_rank=rank,
        energy_rank=jnp.where(valid, missing + 1, 0),
        entropy=jnp.where(rank > 1, _entropy(squares) / spread, 0),
        valid=valid,
    )


def _entropy(weights: jax.Array) -> jax.Array:
    """Entropy of weights normalised to sum one; zeros add nothing."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    p = weights / jnp.where(total > 0, total, 1)
    safe = jnp.where(p > 0, p, 1)
    return -jnp.sum(p * jnp.log(safe), axis=-1)
