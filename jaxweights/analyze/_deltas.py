"""How the deltas of several fine-tuned models relate, leaf by leaf, before they are merged."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxweights.analyze._matrices import power_of_two
from jaxweights.analyze._report import Report
from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.core._layout import is_float
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import Flat, Params, Path, fail, flatten
from jaxweights.core._select import largest
from jaxweights.merge._models import check_names, label, per_model
from jaxweights.weights._axes import View
from jaxweights.weights._weight import materialize

_NAME = "analyze.deltas"
_LISTED = 5  # missing paths that one error shows
_RUN = 256  # entries that are added up at once


class Deltas(NamedTuple):
    """Deltas of a leaf, `model - base`, one a model; every field has the stack axes in front.

    Attributes:
      relative_norm: `(*stack, models)`, |delta| / |base|; infinite where only the base is zero.
      cosine: `(*stack, models, models)`, cosines between deltas; 0 where one of them is zero.
      sign_conflict: `(*stack,)`, share of all entries that some model raises and another lowers.
      kept_energy: `(*stack, models)`, share of a delta's sum of squares that its largest entries
        hold, 1 for a delta of zeros; None without a density.
    """

    relative_norm: jax.Array
    cosine: jax.Array
    sign_conflict: jax.Array
    kept_energy: jax.Array | None


def deltas(
    base: Params,
    models: Sequence[Params],
    *,
    layout: LayoutLike = None,
    density: float | Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Report[Deltas]:
    """Compares what fine-tuning did to each leaf in several models.

    Deltas of nearly right angles add up without loss; sign conflicts are what TIES elects over; the
    energy that is kept tells what trimming to a density loses. Represented weights are
    materialised. Stacked layers and experts are taken one by one where the layout names them;
    leaves that it does not name count as one vector each. Arithmetic is in float32 (float64 for
    float64 leaves), with sums in short runs, so that long ones lose nothing.

    Args:
      base: The tree that the models were tuned from.
      models: Trees like the base, at least one; they may have leaves that it lacks.
      layout: Axes of the leaves, as in `apply`.
      density: Share of the entries of largest magnitude whose energy is told, in (0, 1], one for
        all models or one each. At least one entry is counted.
      names: What errors call the models.

    Returns:
      A mapping from path to `Deltas`, whose `skipped` says why the other leaves have none.

    Raises:
      ValueError: If a setting is out of range, a model lacks a leaf or has another shape, or a leaf
        is not finite.

    Example:
      >>> base = {"kernel": jnp.zeros((2, 2))}
      >>> first = {"kernel": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
      >>> second = {"kernel": jnp.array([[4.0, -3.0], [0.0, 0.0]])}
      >>> found = jw.analyze.deltas(base, [first, second], density=0.25)["kernel"]
      >>> float(found.cosine[0, 1]), float(found.sign_conflict)
      (0.0, 0.25)
      >>> [round(float(share), 4) for share in found.kept_energy]
      [0.64, 0.64]

    Source: Ilharco et al. 2023, arXiv:2212.04089, figure 5 (cosines); Yadav et al. 2023,
    arXiv:2306.01708, section 3 (sign conflicts and redundant entries).
    """
    shares = _check_settings(models, density, names)
    flat, others = flatten(base)[0], [flatten(model)[0] for model in models]
    _check_models(flat, others, names)
    found = resolve_layout(flat, layout)
    results: dict[Path, Deltas] = {}
    reasons, finite = [], {}
    for path, leaf in flat.items():
        if not is_float(leaf):
            reasons.append(
                (path, f"is {getattr(leaf, 'dtype', type(leaf).__name__)}, not floating")
            )
            continue
        shape = tuple(leaf.shape)
        if not math.prod(shape):
            reasons.append((path, f"has shape {shape}, which is empty"))
            continue
        view = View.of(shape, found[path]) if path in found else None
        counts = None if shares is None else _counts(shares, shape, view)
        results[path], finite[path] = _deltas_of_leaf(
            leaf, tuple(other[path] for other in others), counts, view=view
        )
    if not any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in finite.values()):
        trees = (("the base", flat), *((label(names, i), m) for i, m in enumerate(others)))
        bad = [(path, np.asarray(good)) for path, good in finite.items()]
        fail(
            _NAME,
            [
                f"{side}: {describe_nonfinite(path, tree[path])}"
                for path, good in bad
                for i, (side, tree) in enumerate(trees)
                if not good[i]
            ],
        )
    return Report(results, tuple(reasons))


def _check_settings(
    models: Sequence[Params], density: float | Sequence[float] | None, names: Sequence[str] | None
) -> tuple[float, ...] | None:
    if not isinstance(models, Sequence) or isinstance(models, str):
        raise TypeError(
            f"{_NAME}: models is a {type(models).__name__}, not a list of trees. Pass [model]."
        )
    if not models:
        raise ValueError(f"{_NAME}: models is empty. Pass at least one tree like the base.")
    check_names(_NAME, names)
    if names is not None:
        per_model(_NAME, "names", names, len(models))
    if density is None:
        return None
    shares = tuple(per_model(_NAME, "density", density, len(models)))
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"{_NAME}: density={density} must lie in (0, 1].")
    return shares


def _check_models(flat: Flat, others: Sequence[Flat], names: Sequence[str] | None) -> None:
    problems = []
    for i, other in enumerate(others):
        who = label(names, i)
        missing = [path for path in flat if path not in other]
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            problems.append(f"{who} lacks {missing[:_LISTED]}{more}. Pass trees like the base.")
        for path, leaf in flat.items():
            if path not in other:
                continue
            ours, theirs = np.shape(leaf), np.shape(other[path])
            if ours != theirs:
                problems.append(
                    f"{path!r}: is {theirs} in {who} but {ours} in the base. Models must share "
                    "their base's shapes; drop or resize this leaf before."
                )
            elif is_float(leaf) and not is_float(other[path]):
                kind = getattr(other[path], "dtype", type(other[path]).__name__)
                problems.append(
                    f"{path!r}: is {kind} in {who} but {leaf.dtype} in the base. Convert one of "
                    "them before."
                )
    fail(_NAME, problems)


def _counts(shares: tuple[float, ...], shape: tuple[int, ...], view: View | None) -> jax.Array:
    """How many entries of a matrix each share is."""
    entries = math.prod(shape) if view is None else view.in_dim * view.out_dim
    return jnp.asarray([min(max(round(s * entries), 1), entries) for s in shares], jnp.uint32)


@functools.partial(jax.jit, static_argnames=("view",))
def _deltas_of_leaf(
    base: Any, models: tuple[Any, ...], counts: jax.Array | None, *, view: View | None
) -> tuple[Deltas, jax.Array]:
    dense = [materialize(leaf) for leaf in (base, *models)]
    wide = jnp.float64 if dense[0].dtype == jnp.float64 else jnp.float32
    origin, *others = (_rows(x, view).astype(wide) for x in dense)
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in (origin, *others)])
    unit = functools.reduce(jnp.maximum, [_unit(x) for x in (origin, *others)])
    origin = origin / unit
    return _compare_rows(origin, jnp.stack([x / unit - origin for x in others], -2), counts), finite


def _rows(x: jax.Array, view: View | None) -> jax.Array:
    """`(*stack, n)`."""
    if view is None:
        return x.reshape(-1)
    matrix = view.to_matrix(x)
    return matrix.reshape(*matrix.shape[:-2], -1)


def _unit(x: jax.Array) -> jax.Array:
    """A power of two near the largest magnitude along the last axis, which stays with length 1."""
    return power_of_two(x[..., None, :])[..., 0]


def _compare_rows(origin: jax.Array, rows: jax.Array, counts: jax.Array | None) -> Deltas:
    """Compares the deltas `(*stack, models, n)` to an origin `(*stack, n)`."""
    step = _unit(rows)
    scaled = rows / step  # exact, and squares of tiny deltas do not vanish
    gram = _gram(scaled)
    n = rows.shape[-2]
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    size = jnp.sqrt(squares)
    changed = squares > 0
    safe = jnp.where(changed, size, 1)
    # Divided one after the other: a product of two norms rounds once more.
    cosine = jnp.clip(gram / safe[..., :, None] / safe[..., None, :], -1, 1)
    both = changed[..., :, None] & changed[..., None, :]
    cosine = jnp.where(both, jnp.where(jnp.eye(n, dtype=bool), 1, cosine), 0)
    unit = _unit(origin)
    whole = jnp.sqrt(_sum(jnp.square(origin / unit)))[..., None]
    norm = size * (step[..., 0] / unit)
    none = jnp.where(changed, jnp.inf, 0).astype(norm.dtype)
    raised, lowered = (jnp.any(side, axis=-2) for side in (rows > 0, rows < 0))
    conflicts = jnp.sum(raised & lowered, axis=-1, dtype=jnp.uint32).astype(norm.dtype)
    return Deltas(
        relative_norm=jnp.where(whole > 0, norm / jnp.where(whole > 0, whole, 1), none),
        cosine=cosine,
        sign_conflict=conflicts / rows.shape[-1],
        kept_energy=None if counts is None else _kept_energy(scaled, squares, counts),
    )


def _gram(rows: jax.Array) -> jax.Array:
    """Products of all pairs of `(*stack, models, n)`."""
    parts = _in_runs(rows)
    return _sum(jnp.einsum("...irk,...jrk->...ijr", parts, parts, precision="highest"))


def _kept_energy(scaled: jax.Array, squares: jax.Array, counts: jax.Array) -> jax.Array:
    flat = scaled.reshape(-1, scaled.shape[-1])
    wanted = jnp.broadcast_to(counts, squares.shape).reshape(-1)
    kept = _sum(jnp.where(largest(flat, wanted, axis=1), flat * flat, 0)).reshape(squares.shape)
    share = kept / jnp.where(squares > 0, squares, 1)
    return jnp.where(squares > 0, jnp.minimum(share, 1), 1)


def _in_runs(x: jax.Array) -> jax.Array:
    """Cuts the last axis into `(runs, entries)`, padded with zeros."""
    n = x.shape[-1]
    run = min(_RUN, n)
    missing = -n % run
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
    return padded.reshape(*x.shape[:-1], -1, run)


def _sum(x: jax.Array) -> jax.Array:
    """Sum along the last axis, by runs, whose sums are added by runs, and so on."""
    while x.shape[-1] > 1:
        x = jnp.sum(_in_runs(x), axis=-1)
    return x[..., 0]
