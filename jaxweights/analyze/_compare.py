"""How far two trees are apart, leaf by leaf."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxweights.analyze._matrices import (
    Precision,
    check_precision,
    power_of_two,
    singular_values,
)
from jaxweights.analyze._report import Report, Select, selected
from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.core._computed_first import computed_first
from jaxweights.core._feature_groups import FeatureGroups, columns_like_gram
from jaxweights.core._layout import Layout, is_float
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import Flat, Params, Path, fail, flatten
from jaxweights.core._stats import Stats
from jaxweights.weights._axes import View
from jaxweights.weights._weight import materialize

_LISTED = 5  # missing or extra paths that one error shows


class Comparison(NamedTuple):
    """Difference of two leaves, `first` and `second`; every field has the shape of the stack.

    Attributes:
      relative_error: |second - first|_F / |first|_F; infinite where only `first` is zero.
      max_abs: Largest magnitude of an entry of the difference.
      angle: Angle between the two as vectors, in radians, exact also where it is tiny.
      fro: |second - first|_F.
      stable_rank: |D|_F² / σ₁(D)² of the difference D; None for leaves that are no matrix.
      numerical_rank: How many of its singular values are more than the rounding of the stored
        weights can explain, int32; None for leaves that are no matrix.
      output_error: Squared error of the outputs over the squared outputs on the calibration
        inputs, tr(Dᵀ G D) / tr(Wᵀ G W); None without a Gram matrix G.
    """

    relative_error: jax.Array
    max_abs: jax.Array
    angle: jax.Array
    fro: jax.Array
    stable_rank: jax.Array | None
    numerical_rank: jax.Array | None
    output_error: jax.Array | None


def compare(
    first: Params,
    second: Params,
    *,
    layout: LayoutLike = None,
    select: Select = None,
    stats: Stats | None = None,
    ranks: bool = True,
    precision: Precision = "float32",
) -> Report[Comparison]:
    """Compares two trees of the same structure: error, angle and rank of the difference.

    Represented weights are materialised, so that a model compares with its quantized or adapted
    self. Stacked layers and experts are compared one by one where the layout names them; leaves
    that it does not name count as one vector each.

    Args:
      first: The tree that errors are relative to.
      second: The other tree.
      layout: Axes of the leaves, as in `apply`.
      select: Regular expression for the whole path, or predicate; None takes all leaves.
      stats: Statistics of `first` with Gram matrices, for `output_error`.
      ranks: Whether to take the singular values of the differences, which is most of the cost.
      precision: `"float32"`, or `"float64"`, which needs `jax_enable_x64`.

    Returns:
      A mapping from path to `Comparison`, whose `skipped` tells leaves that are not floating, and
      whether they are equal.

    Raises:
      ValueError: If the structures or shapes differ, a leaf is not finite, or statistics belong
        to another model.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> first = {"kernel": jnp.ones((2, 2))}
      >>> second = {"kernel": jnp.array([[1.0, 1.0], [1.0, 3.0]])}
      >>> result = jw.analyze.compare(first, second)["kernel"]
      >>> float(result.relative_error), int(result.numerical_rank)
      (1.0, 1)
    """
    name = "analyze.compare"
    dtype = check_precision(name, precision)
    old, new = flatten(first)[0], flatten(second)[0]
    paths = selected(name, old, select)
    _check_structure(name, old, new, None if select is None else paths)
    found = resolve_layout(old, layout, stats)
    grams = _grams(name, old, paths, found, stats)
    results: dict[Path, Comparison] = {}
    reasons, finite = [], {}
    for path in paths:
        leaf = old[path]
        if not is_float(leaf) or not is_float(new[path]):
            reasons.append((path, _compare_exactly(leaf, new[path])))
            continue
        view = View.of(leaf.shape, found[path]) if path in found else None
        results[path], finite[path] = _compare_leaf(
            leaf, new[path], grams.get(path), view=view, ranks=ranks, dtype=dtype
        )
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(finite)):
        bad = [(path, i) for path, good in finite.items() for i in (0, 1) if not good[i]]
        sides = (("first", old), ("second", new))
        fail(name, [f"{sides[i][0]}: {describe_nonfinite(p, sides[i][1][p])}" for p, i in bad])
    return Report(results, tuple(reasons))


def _check_structure(name: str, old: Flat, new: Flat, only: list[Path] | None) -> None:
    wanted = list(old) if only is None else only
    problems = []
    for side, paths in (
        ("first", [path for path in wanted if path not in new]),
        ("second", [path for path in new if path not in old and only is None]),
    ):
        if paths:
            more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
            problems.append(f"only the {side} tree has {paths[:_LISTED]}{more}.")
    problems += [
        f"{path!r}: is {np.shape(old[path])} in the first tree but {np.shape(new[path])} in the "
        "second."
        for path in wanted
        if path in new and tuple(np.shape(old[path])) != tuple(np.shape(new[path]))
    ]
    if problems:
        problems.append("Compare trees of one structure, or select the leaves that both have.")
    fail(name, problems)


def _grams(
    name: str, flat: Flat, paths: list[Path], layout: Layout, stats: Stats | None
) -> dict[Path, jax.Array]:
    if stats is None:
        return {}
    grams, problems = {}, []
    for path in paths:
        gram = stats.get(path, "gram") if path in layout else None
        if gram is None:
            continue
        shape = tuple(flat[path].shape)
        view = View.of(shape, layout[path])
        stack = tuple(shape[a] for a in view.stack_axes(len(shape)))
        groups = FeatureGroups.of(stats, path, flat[path], view)
        stack = stack if groups is None else (*stack, groups.count)
        expected = (*stack, view.in_dim, view.in_dim)
        if tuple(gram.shape) != expected:
            problems.append(
                f"{path!r}: the statistic 'gram' has shape {tuple(gram.shape)}, but a weight of "
                f"shape {shape} needs {expected}. These statistics belong to another model or "
                "layout; calibrate this one."
            )
        grams[path] = gram
    if not grams and not problems:
        problems.append(
            "the statistics hold no Gram matrix of these leaves. Calibrate with "
            "needs={path: {'gram'}}, or leave stats out."
        )
    fail(name, problems)
    return grams


def _compare_exactly(old: Any, new: Any) -> str:
    dtype = getattr(old, "dtype", type(old).__name__)
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in (old, new)):
        return f"is {dtype}, not floating"
    if hasattr(old, "dtype") and jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        old, new = jax.random.key_data(old), jax.random.key_data(new)
    unequal = int(np.sum(np.asarray(old) != np.asarray(new)))
    return f"is {dtype}, not floating; " + (f"{unequal} entries differ" if unequal else "equal")


@functools.partial(jax.jit, static_argnames=("view", "ranks", "dtype"))
def _compare_leaf(
    first: Any, second: Any, gram: jax.Array | None, *, view: View | None, ranks: bool, dtype: Any
) -> tuple[Comparison, tuple[jax.Array, jax.Array]]:
    dense = (materialize(first), materialize(second))
    eps = max(float(jnp.finfo(x.dtype).eps) for x in dense)
    rows = lambda x: x.reshape(1, -1) if view is None else view.to_matrix(x)  # noqa: E731
    old, new = (rows(x).astype(dtype) for x in dense)
    finite = (jnp.all(jnp.isfinite(old)), jnp.all(jnp.isfinite(new)))
    return compare_matrices(old, new, gram, ranks=ranks and view is not None, eps=eps), finite


def compare_matrices(
    old: jax.Array,
    new: jax.Array,
    gram: jax.Array | None = None,
    *,
    ranks: bool = True,
    eps: float | None = None,
) -> Comparison:
    """Compares stacks of matrices.

    Args:
      old: `(*stack, in, out)`, float32 or float64.
      new: Likewise.
      gram: `(*stack, in, in)`, or `(*stack, groups, in, in)` of feature groups.
      ranks: Whether to take singular values.
      eps: Epsilon of the dtype that the weights were stored in; None is that of `old`.

    Returns:
      The comparison.
    """
    unit = jnp.maximum(power_of_two(old), power_of_two(new))
    # Powers of two: scaling is exact, and so is the difference of nearby numbers.
    old, new = old / unit, new / unit
    difference = new - old
    step = power_of_two(difference)
    scaled = difference / step
    unit, step = unit[..., 0, 0], step[..., 0, 0]
    size, other = _norm(old), _norm(new)
    fro = _norm(scaled) * step
    stable = rank = None
    if ranks and old.size:
        values = singular_values(scaled) * step[..., None]
        stable, rank = _ranks(values, old.shape, size, other, eps or jnp.finfo(old.dtype).eps)
    output = None if gram is None else _output_error(scaled, step, old, gram.astype(old.dtype))
    none = jnp.where(fro > 0, jnp.inf, 0).astype(old.dtype)
    return Comparison(
        relative_error=jnp.where(size > 0, fro / jnp.where(size > 0, size, 1), none),
        max_abs=jnp.max(jnp.abs(difference), axis=(-2, -1), initial=0) * unit,
        angle=_angle(scaled, step, old, size, other),
        fro=fro * unit,
        stable_rank=stable,
        numerical_rank=rank,
        output_error=output,
    )


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1)))


def _angle(
    scaled: jax.Array, step: jax.Array, old: jax.Array, size: jax.Array, other: jax.Array
) -> jax.Array:
    """From the part of the difference that is perpendicular to `old`.

    An arc cosine loses angles below 3e-4; the difference of two nearby vectors is exact.
    """
    safe = jnp.where(size > 0, size, 1)
    along = jnp.sum(scaled * old, axis=(-2, -1)) / safe
    across = scaled - (along / safe)[..., None, None] * old
    angle = jnp.arctan2(_norm(across) * step, size + along * step)
    neither = (size == 0) & (other == 0)
    alone = jnp.where(neither, 0, jnp.pi / 2).astype(old.dtype)
    return jnp.where((size > 0) & (other > 0), angle, alone)


def _ranks(
    values: jax.Array, shape: tuple[int, ...], size: jax.Array, other: jax.Array, eps: Any
) -> tuple[jax.Array, jax.Array]:
    """Stable and numerical rank of the difference.

    Rounding the entries of a matrix of root mean square r adds noise of spectral norm about
    0.3 eps r (sqrt(in) + sqrt(out)); singular values below three times that mean nothing.
    """
    rows, columns = shape[-2:]
    first = values[..., 0]
    safe = jnp.where(first > 0, first, 1)
    stable = jnp.sum((values / safe[..., None]) ** 2, axis=-1)
    rms = jnp.maximum(size, other) / (rows * columns) ** 0.5
    noise = float(eps) * (rows**0.5 + columns**0.5) * rms
    own = max(rows, columns) * float(jnp.finfo(values.dtype).eps) * first
    tolerance = jnp.maximum(noise, own)[..., None]
    return stable, jnp.sum(values > tolerance, axis=-1, dtype=jnp.int32)


def _output_error(scaled: jax.Array, step: jax.Array, old: jax.Array, gram: jax.Array) -> jax.Array:
    unit = power_of_two(gram)
    if gram.ndim > old.ndim:  # one unit for all feature groups, whose outputs are added up
        unit = jnp.max(unit, axis=-3, keepdims=True)
    gram = gram / unit
    error = _quadratic(scaled, gram) * step * step
    whole = _quadratic(old, gram)
    none = jnp.where(error > 0, jnp.inf, 0).astype(old.dtype)
    return jnp.where(whole > 0, error / jnp.where(whole > 0, whole, 1), none)


def _quadratic(matrix: jax.Array, gram: jax.Array) -> jax.Array:
    """tr(Wᵀ G W), not negative."""
    columns = columns_like_gram(computed_first(matrix), gram)
    product = jnp.matmul(gram, columns, precision="highest")
    total = jnp.sum(columns * product, axis=(-2, -1))
    total = jnp.sum(total, axis=-1) if columns.ndim > matrix.ndim else total
    return jnp.maximum(total, 0)
