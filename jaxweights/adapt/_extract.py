"""extract_lora: the difference of two models as low-rank factors over the first."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.adapt._adapters import RankLoss, RankReport, check_factor_dtype, check_rank
from jaxweights.adapt._factors import relative_tail, truncated_dense
from jaxweights.adapt._lora import _placed_like_base
from jaxweights.adapt._merge import _widest
from jaxweights.core import Context, Flat, Layout, Params, Path, flatten, unflatten
from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.core._lapack import singular_values
from jaxweights.core._layout import is_default_target, is_float
from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.core._paths import check_pattern, fail, matching, nearest
from jaxweights.merge._models import require_models
from jaxweights.merge._same import same
from jaxweights.merge._stacks import stack_axes
from jaxweights.weights import LowRank, View, Weight, is_weight, materialize

Rest = Literal["tuned", "base", "error"]
_RESTS: tuple[Rest, ...] = ("tuned", "base", "error")
_NAME = "adapt.extract_lora"


class Extraction(NamedTuple):
    """What became factors, and what could not."""

    factors: RankReport
    """Rank and error of every matrix that was looked at."""
    others: dict[Path, float]
    """Leaves that differ but get no factors (biases, norms, embeddings), with the norm of their
    change relative to that of the base's leaf; infinite where the base's is zero."""


def extract_lora(
    base: Params,
    tuned: Params,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str | None = None,
    others: Rest = "tuned",
    dtype: DTypeLike = jnp.float32,
    layout: LayoutLike = None,
) -> tuple[Params, Extraction]:
    r"""Writes a fine-tuned model as its base and low-rank factors.

    The difference of each matrix is cut after its largest singular values,
    :math:`\theta_1 - \theta_0 \approx U_r \Sigma_r V_r^\top` with `down` :math:`U_r\Sigma_r^{1/2}`
    and `up` :math:`\Sigma_r^{1/2} V_r^\top`: no product of that rank comes closer, and the error
    is :math:`\sqrt{\sum_{i>r}\sigma_i^2}`. A base that is quantized or masked may be passed with
    its dense original as `tuned`: the factors then hold the best of what was lost.

    Args:
      base: The model that factors are put over; its leaves are kept as they are.
      tuned: The model to come close to; dense or represented.
      rank: Highest rank, cut at what a matrix can have.
      energy: Share of the sum of squared singular values to keep, in (0, 1]: each leaf gets the
        lowest rank that keeps it (a stack, the highest that one of its matrices needs), but
        at most `rank`. Needs concrete values.
      targets: Pattern of the leaves that get factors; None takes the matrices of the layout except
        embeddings, heads and routers.
      others: What differs and gets no factors: `"tuned"` takes the tuned leaf, so that nothing is
        lost; `"base"` keeps the base's; `"error"` refuses. Either way it is reported.
      dtype: Dtype of the factors; all arithmetic is in float32 or wider.
      layout: As in `apply`.

    Returns:
      The base with `LowRank` leaves where matrices differ, and what was extracted.

    Raises:
      ValueError: If a setting is out of range, the models do not match, or are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> base = {"kernel": jnp.zeros((3, 3)), "bias": jnp.ones(3)}
      >>> tuned = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.0])), "bias": jnp.full(3, 1.5)}
      >>> adapted, report = extract_lora(base, tuned, rank=1)
      >>> adapted["kernel"].rank, float(report.factors["kernel"].error), report.others
      (1, 0.6..., {'bias': 0.5})

    Source: the theorem of Eckart and Young; mergekit's `extract-lora` does the same.
    Differs: (1) the rank follows a share of the energy instead of an absolute threshold.
    """
    _check_settings(rank, energy, others)
    check_factor_dtype(_NAME, dtype)
    flat, structure = flatten(base)
    other = flatten(tuned)[0]
    _require_alike(flat, other)
    resolved = resolve_layout(flat, layout)
    chosen = _targets(flat, resolved, targets)
    new, report, rest, finite = dict(flat), {}, {}, {}
    for path, leaf in flat.items():
        if path not in chosen:
            if not _equal(leaf, other[path]):
                rest[path] = _relative_change(leaf, other[path])
                new[path] = other[path] if others == "tuned" else leaf
            continue
        if _equal(leaf, other[path]):
            report[path] = RankLoss(0, jnp.zeros((), jnp.float32))
            continue
        view = View.of(leaf.shape, resolved[path])
        delta = _delta(leaf, other[path], view=view)
        width = _rank(path, delta, rank, energy)
        down, up, error, finite[path] = _cut(delta, rank=width, dtype=jnp.dtype(dtype).name)
        if width:
            new[path] = _placed_like_base(LowRank.over(leaf, down, up, view=view))
        report[path] = RankLoss(width, error)
    _refuse_nonfinite(finite, flat)
    if others == "error":
        fail(_NAME, [_unwanted(path, change) for path, change in rest.items()])
    return unflatten(structure, new), Extraction(report, rest)


def _check_settings(rank: int | None, energy: float | None, others: Rest) -> None:
    check_rank(_NAME, rank)
    if rank is None and energy is None:
        raise ValueError(
            f"{_NAME}: neither rank nor energy is given. Pass rank=16 for factors of that width, "
            "or energy=0.95 to keep that share of each change."
        )
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"{_NAME}: energy={energy} must lie in (0, 1].")
    if others not in _RESTS:
        raise ValueError(f"{_NAME}: others={others!r} is not one of 'tuned', 'base', 'error'.")


def _require_alike(flat: Flat, other: Flat) -> None:
    shapes = [
        {p: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_weight(x) else x for p, x in tree.items()}
        for tree in (flat, other)
    ]
    require_models(_NAME, shapes[0], Context(models=(shapes[1],)), ("tuned",), delta=False)
    if extra := [path for path in other if path not in flat]:
        raise ValueError(
            f"{_NAME}: tuned has {extra[:5]}, which base lacks. Remove them from it, or add them "
            "to the base."
        )


def _targets(flat: Flat, layout: Layout, targets: str | None) -> set[Path]:
    """The leaves that get factors."""
    floats = {path: leaf for path, leaf in flat.items() if is_float(leaf)}
    stack_axes(_NAME, floats, layout)  # refuses leaves of unknown axes
    matrices = {path for path in floats if path in layout and 0 not in floats[path].shape}
    if targets is None:
        chosen = {p for p in matrices if is_default_target(p) and layout[p].kind != "embedding"}
    else:
        check_pattern(_NAME, targets)
        found = matching(targets, flat)
        if not found:
            raise ValueError(
                f"{_NAME}: targets={targets!r} matches no leaf. The nearest paths: "
                f"{nearest(targets, flat)}."
            )
        fail(
            _NAME,
            [
                f"{path!r}: has shape {tuple(np.shape(flat[path]))} and is no matrix of the "
                "layout, so it can have no factors. Leave it out of targets, or state its axes "
                "with layout."
                for path in found
                if path not in matrices
            ],
        )
        chosen = set(found)
    fail(
        _NAME,
        [
            f"{path!r}: has low-rank factors already. Merge them first, with adapt.merge_adapters."
            for path in sorted(chosen)
            if isinstance(flat[path], LowRank)
        ],
    )
    return chosen


def _equal(first: Any, second: Any) -> bool:
    """Whether two leaves are known to hold the same values."""
    if first is second:
        return True
    leaves = jax.tree.leaves((first, second))
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in leaves):
        return False
    return same(first, second)


def _relative_change(base: Any, tuned: Any) -> float:
    if not is_float(base) or any(isinstance(x, Tracer) for x in jax.tree.leaves((base, tuned))):
        return math.nan
    before, after = (np.asarray(materialize(x)).astype(np.float64) for x in (base, tuned))
    change, size = np.linalg.norm(after - before), np.linalg.norm(before)
    return float(change / size) if size else (math.inf if change else 0.0)


@functools.partial(jax.jit, static_argnames="view")
def _delta(base: Any, tuned: Any, *, view: View) -> jax.Array:
    """The difference as `(*stack, in, out)` matrices."""
    return view.to_matrix(_wide(tuned).astype(_wide(base).dtype) - _wide(base))


def _wide(leaf: Any) -> jax.Array:
    if isinstance(leaf, Weight):
        return _widest(leaf)
    return jnp.asarray(leaf).astype(np.promote_types(leaf.dtype, np.float32))


def _rank(path: Path, delta: jax.Array, rank: int | None, energy: float | None) -> int:
    most = min(delta.shape[-2:])
    cap = most if rank is None else min(rank, most)
    if energy is None:
        return cap
    if isinstance(delta, Tracer):
        raise ValueError(
            f"{_NAME}: {path!r}: energy={energy} chooses a rank by values, which are not there "
            "under jit. Pass rank alone, or extract outside of jit."
        )
    squares = np.square(np.asarray(_singular_values(delta), np.float64)).reshape(-1, most)
    # What the rounding of the decomposition leaves of zeros.
    noise = max(delta.shape[-2:]) * float(jnp.finfo(delta.dtype).eps)
    squares = np.where(squares > noise**2 * squares[:, :1], squares, 0)
    # tails[:, r]: what is lost at rank r.
    tails = np.append(np.cumsum(squares[:, ::-1], axis=1)[:, ::-1], np.zeros((len(squares), 1)), 1)
    enough = tails <= (1 - energy) * tails[:, :1]
    return min(cap, int(enough.argmax(axis=1).max()))


@jax.jit
def _singular_values(delta: jax.Array) -> jax.Array:
    return map_over_stack(singular_values, delta, delta.shape[:-2])


@functools.partial(jax.jit, static_argnames=("rank", "dtype"))
def _cut(
    delta: jax.Array, *, rank: int, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    down, up, values = truncated_dense(delta, rank)
    error = relative_tail(values, rank).astype(jnp.float32)
    return down.astype(dtype), up.astype(dtype), error, jnp.all(jnp.isfinite(values))


def _refuse_nonfinite(finite: dict[Path, jax.Array], flat: Flat) -> None:
    if any(isinstance(x, Tracer) for x in finite.values()):
        return
    problems = []
    for path in [path for path, good in finite.items() if not good]:
        whose = "base" if not np.isfinite(np.asarray(_wide(flat[path]))).all() else "tuned"
        problems.append(
            f"{path!r}: has values in {whose} that are not finite. Repair the checkpoint, or leave "
            "this weight out with targets."
        )
    fail(_NAME, problems)


def _unwanted(path: Path, change: float) -> str:
    size = "" if math.isnan(change) else f" by {change:.3g} of its norm"
    return (
        f"{path!r}: differs{size} and gets no factors. Pass others='tuned' to take it whole, "
        "others='base' to leave the change out, or name it in targets if it is a matrix."
    )
