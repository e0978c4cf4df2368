"""singular_vector_alignment: what a permutation does to the singular vectors of two models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.align._permute import Moves, check_permutations, moves_of, permute_leaf
from jaxweights.align._spec import Permutations, PermutationSpec
from jaxweights.align._weight_matching import check_pair
from jaxweights.analyze._matrices import power_of_two
from jaxweights.analyze._report import Report, Select, selected, why_no_matrix
from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.core._lapack import svd
from jaxweights.core._layout import Layout, is_float
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import Flat, Params, Path, fail, flatten
from jaxweights.merge._models import compute_dtype
from jaxweights.weights._axes import Axes, View


class LayerAlignment(NamedTuple):
    """Two matrices beside one another; every field has the stack axes in front.

    Attributes:
      singular_values_a: Of the first model, `(*stack, min(in, out))`, descending.
      singular_values_b: Of the second, which permutations leave as they are.
      spectra_distance: |σᵃ − σᵇ| / |σᵃ|, `(*stack,)`.
      ranks: Singular vectors that are compared, min(|Iᵃ|, |Iᵇ|), int32 `(*stack, gammas)`.
      before: R of the models as they are, `(*stack, gammas)`.
      after: R of the permuted model.
      distance_before: |A − B|_F, `(*stack,)`.
      distance_after: |A − π(B)|_F.
    """

    singular_values_a: jax.Array
    singular_values_b: jax.Array
    spectra_distance: jax.Array
    ranks: jax.Array
    before: jax.Array
    after: jax.Array
    distance_before: jax.Array
    distance_after: jax.Array


class SingularVectorAlignment(NamedTuple):
    """What `singular_vector_alignment` found.

    Attributes:
      layers: `LayerAlignment` by path; `layers.skipped` says why other leaves have none.
      gammas: Shares of the largest singular value from which on vectors count.
      before: R over all matrices for each gamma, `(gammas,)`, float64.
      after: R of the permuted model.
      distance_ratio: |A − π(B)| / |A − B| over all matrices; 1 where both are 0.
    """

    layers: Report[LayerAlignment]
    gammas: tuple[float, ...]
    before: np.ndarray
    after: np.ndarray
    distance_ratio: float


def singular_vector_alignment(
    spec: PermutationSpec,
    params_a: Params,
    params_b: Params,
    permutations: Permutations,
    *,
    gammas: Sequence[float] = (0.0, 0.3),
    layout: LayoutLike = None,
    select: Select = None,
    tie: float = 1e-5,
) -> SingularVectorAlignment:
    r"""Measures how far permutations turn the singular vectors of one model onto another's.

    For every matrix :math:`R_\gamma = \sum_{i \in I_a, j \in I_b} (u_i^a \cdot P u_j^b)
    (v_i^a \cdot Q v_j^b) / \min(|I_a|, |I_b|)` with the vectors whose singular values are at least
    γ times the largest: 1 where these subspaces of the two matrices are the same and map alike,
    about 0 for independent models. Vectors of one singular value are taken together or not at all,
    since only their span means something; those of zero are left out.

    Args:
      spec: Names the axes.
      params_a: The model that stays.
      params_b: The other model, as it is.
      permutations: What a matching found for `params_b`.
      gammas: Thresholds in [0, 1].
      layout: Axes of the leaves, as in `apply`; None takes the two axes of a leaf that are no
        stack in the spec.
      select: Regular expression for the whole path, or predicate; None takes all matrices.
      tie: Singular values closer than this share of the largest count as one.

    Returns:
      Per matrix and over all: R before and after, distances, and the spectra.

    Raises:
      ValueError: If a setting is out of range, the models do not fit the spec, no leaf is a matrix,
        or one is not finite.

    Example:
      >>> a = {"up": jax.random.normal(jax.random.key(0), (4, 8)), "down": jnp.ones((8, 2))}
      >>> axes = {"up": (None, "hidden"), "down": ("hidden", None)}
      >>> spec = jw.align.PermutationSpec.of(a, axes)
      >>> b = jw.align.apply_permutation(spec, a, {"hidden": jnp.arange(8)[::-1]})
      >>> matched = jw.align.weight_matching(spec, a, b, key=jax.random.key(1))
      >>> found = jw.align.singular_vector_alignment(spec, a, b, matched.permutations)
      >>> found.after.round(3).tolist(), found.distance_ratio
      ([1.0, 1.0], 0.0)

    Source: Ito et al. 2024, Analysis of linear mode connectivity via permutation-based weight
    matching, arXiv:2402.04051, section 4.
    Differs: (1) R is divided by the number of vectors of the smaller set, so that it is 1 for a
    perfect match. (2) Singular values that coincide are not told apart.
    """
    name = "align.singular_vector_alignment"
    gammas = tuple(float(gamma) for gamma in gammas)
    if not gammas or not all(0 <= gamma <= 1 for gamma in gammas):
        raise ValueError(f"{name}: gammas={list(gammas)} must be one or more numbers in [0, 1].")
    if not 0 <= tie < 1:
        raise ValueError(f"{name}: tie={tie} must lie in [0, 1).")
    check_pair(name, spec, params_a, params_b)
    found = check_permutations(name, spec, permutations)
    ours, theirs = flatten(params_a)[0], flatten(params_b)[0]
    axes = resolve_layout(ours, _layout_of(spec, ours) if layout is None else layout)
    results: dict[Path, LayerAlignment] = {}
    reasons = []
    for path in selected(name, ours, select):
        leaf = ours[path]
        if (reason := why_no_matrix(path, leaf, axes)) is not None or path not in spec.axes:
            reasons.append((path, reason or "is not in the spec"))
            continue
        factors = [factor for axis in spec.factors(path, leaf.shape) for factor in axis]
        moves, order = moves_of(spec, factors, found)
        results[path] = _align_leaf(
            leaf,
            theirs[path],
            [found[key] for key in order],
            view=View.of(leaf.shape, axes[path]),
            moves=moves,
            gammas=gammas,
            tie=tie,
        )
    if not results:
        raise ValueError(
            f"{name}: no leaf is a matrix: {dict(reasons[:3])}. Pass layout=infer_layout(fn, "
            "params, *inputs)."
        )
    fail(name, _nonfinite(results, ours, theirs))
    return _total(Report(results, tuple(reasons)), gammas)


def _layout_of(spec: PermutationSpec, flat: Flat) -> Layout | None:
    """Matrices of the two axes that are no stack, where no leaf has more."""
    axes = {}
    for path, entry in spec.axes.items():
        ndim = len(entry)
        rest = [i - ndim for i, axis in enumerate(entry) if axis not in spec.stacks]
        if path in flat and is_float(flat[path]) and len(rest) == 2:
            axes[path] = Axes(inputs=(rest[0],), outputs=(rest[1],))
        elif len(rest) > 2:  # a convolution, or heads of their own axis: names may tell
            return None
    return Layout.of(axes, traced=True)


@functools.partial(jax.jit, static_argnames=("view", "moves", "gammas", "tie"))
def _align_leaf(
    ours: jax.Array,
    theirs: jax.Array,
    indices: list[jax.Array],
    *,
    view: View,
    moves: Moves,
    gammas: tuple[float, ...],
    tie: float,
) -> LayerAlignment:
    dtype = compute_dtype(ours)
    a, b = (view.to_matrix(x).astype(dtype) for x in (ours, theirs))
    moved = view.to_matrix(permute_leaf(theirs, indices, moves)).astype(dtype)
    (left_a, sigma_a, right_a), (left_b, sigma_b, right_b) = _svd(a), _svd(b)
    ranks, before, after = [], [], []
    for gamma in gammas:
        kept_a, kept_b = _kept(sigma_a, gamma, tie, a.shape), _kept(sigma_b, gamma, tie, b.shape)
        rank = jnp.minimum(jnp.sum(kept_a, -1), jnp.sum(kept_b, -1))
        # Σ_ij (uᵢᵃ·P uⱼᵇ)(vᵢᵃ·Q vⱼᵇ) = ⟨Uᵃ Vᵃᵀ, P Uᵇ Vᵇᵀ Qᵀ⟩, so the permutation acts on a leaf.
        turn_a, turn_b = _turn(left_a, kept_a, right_a), _turn(left_b, kept_b, right_b)
        turned = view.to_matrix(permute_leaf(view.from_matrix(turn_b), indices, moves))
        share = jnp.maximum(rank, 1).astype(dtype)
        ranks.append(rank.astype(jnp.int32))
        before.append(jnp.sum(turn_a * turn_b, axis=(-2, -1)) / share)
        after.append(jnp.sum(turn_a * turned, axis=(-2, -1)) / share)
    size = jnp.linalg.norm(sigma_a, axis=-1)
    apart = jnp.linalg.norm(sigma_a - sigma_b, axis=-1)
    return LayerAlignment(
        singular_values_a=sigma_a,
        singular_values_b=sigma_b,
        spectra_distance=jnp.where(apart > 0, apart / size, 0),
        ranks=jnp.stack(ranks, axis=-1),
        before=jnp.stack(before, axis=-1),
        after=jnp.stack(after, axis=-1),
        distance_before=jnp.linalg.norm(a - b, axis=(-2, -1)),
        distance_after=jnp.linalg.norm(a - moved, axis=(-2, -1)),
    )


def _svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    unit = power_of_two(matrix)
    left, values, right = svd(matrix / unit)
    return left, values * unit[..., 0], right


def _kept(values: jax.Array, gamma: float, tie: float, shape: tuple[int, ...]) -> jax.Array:
    """Singular values from γσ₁ on, and all that coincide with the last of them."""
    first = values[..., :1]
    floor = max(shape[-2:]) * float(jnp.finfo(values.dtype).eps) * first
    alive = values > floor
    ahead = jnp.concatenate([first, values[..., :-1]], axis=-1)
    close = ahead - values <= tie * first
    reached = (values >= gamma * first) | close
    return (jnp.cumsum(~reached, axis=-1) == 0) & alive


def _turn(left: jax.Array, kept: jax.Array, right: jax.Array) -> jax.Array:
    chosen = left * kept[..., None, :].astype(left.dtype)
    return jnp.matmul(chosen, right, precision="highest")


def _nonfinite(results: dict[Path, LayerAlignment], ours: Flat, theirs: Flat) -> list[str]:
    bad = [
        path for path, x in results.items() if not np.isfinite(np.asarray(x.distance_before)).all()
    ]
    return [
        f"{label}: {describe_nonfinite(path, flat[path])}"
        for path in bad
        for label, flat in (("params_a", ours), ("params_b", theirs))
        if not bool(jnp.isfinite(flat[path]).all())
    ]


def _total(layers: Report[LayerAlignment], gammas: tuple[float, ...]) -> SingularVectorAlignment:
    def over_all(values: Sequence[Any], power: int = 1) -> Any:
        arrays = [np.asarray(x, np.float64) ** power for x in values]
        return sum(x.reshape(-1, x.shape[-1]).sum(axis=0) for x in arrays)

    every = list(layers.values())
    ranks = np.maximum(over_all([x.ranks for x in every]), 1)
    before = over_all([np.asarray(x.before, np.float64) * np.asarray(x.ranks) for x in every])
    after = over_all([np.asarray(x.after, np.float64) * np.asarray(x.ranks) for x in every])
    old = float(over_all([np.ravel(x.distance_before)[:, None] for x in every], 2)[0])
    new = float(over_all([np.ravel(x.distance_after)[:, None] for x in every], 2)[0])
    ratio = (new / old) ** 0.5 if old > 0 else 1.0
    return SingularVectorAlignment(layers, gammas, before / ranks, after / ranks, ratio)


def singular_vector_products(
    weight_a: jax.Array, weight_b: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Products :math:`(u_i^a \cdot u_j^b)(v_i^a \cdot v_j^b)` of all pairs of singular vectors.

    Weighted with :math:`\sigma_i^a \sigma_j^b` they sum to the inner product of the matrices,
    which weight matching maximises; so it aligns the vectors of large singular values first.

    Args:
      weight_a: `(in, out)`.
      weight_b: `(in, out)`, permuted already.

    Returns:
      The singular values of both, `(r,)`, and the products, `(r, r)`, with r = min(in, out).

    Example:
      >>> a = jax.random.normal(jax.random.key(0), (6, 4))
      >>> singular_vector_products(a, a)[2].round(3).trace().item()
      4.0

    Source: Ito et al. 2024, arXiv:2402.04051, equation 8.
    """
    (left_a, sigma_a, right_a), (left_b, sigma_b, right_b) = (
        _svd(x.astype(compute_dtype(x))) for x in (weight_a, weight_b)
    )
    inner = functools.partial(jnp.matmul, precision="highest")
    return sigma_a, sigma_b, inner(left_a.T, left_b) * inner(right_a, right_b.T)
