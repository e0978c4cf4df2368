"""prune: the transform that any score and any comparison group make together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core._context import Context
from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, unflatten
from jaxweights.core._select import smallest_of_leaves
from jaxweights.core._stats import Statistic
from jaxweights.core._transform import Transform, stateless
from jaxweights.sparsify._counts import count_zeros, count_zeros_traced
from jaxweights.sparsify._groups import Group, keep_mask, protect_largest, rank_removed_lowest
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._scaled import Scaled

Form = Literal["masked", "dense"]
Schedule = Callable[[jax.Array], Any]
Sparsity = float | jax.Array | Schedule

# `score(weight, **statistics)` gives scores `(in, out)` and what `verify` looks at afterwards.
Score = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
VerifyScores = Callable[[Path, dict[str, Any]], str | None]


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A leaf on its way through a global selection."""

    leaf: Any
    scores: jax.Array  # (*stack, in, out)
    view: View


def prune(
    score: Score,
    *,
    name: str,
    group: Group,
    sparsity: Sparsity | None,
    form: Form,
    needs: Collection[Statistic] = (),
    min_keep: float = 0.0,
    verify: VerifyScores | None = None,
) -> Transform:
    """Makes a transform that removes the lowest scores of every group.

    Args:
      score: `score(weight, **statistics)` of one `(in, out)` matrix: scores of its shape, of which
        only magnitudes count, and arrays for `verify`.
      name: What errors call the transform.
      group: Which weights are ranked together.
      sparsity: Fraction of zeros in [0, 1); a number, an array or a function of `context.step`.
        None for runs.
      form: "masked" wraps each leaf and its mask in `Masked`; "dense" writes zeros into the leaf.
      needs: Statistics that `score` takes.
      min_keep: Fraction of every matrix that stays whatever the global ranking says.
      verify: `verify(path, arrays)` says what is wrong with the second result of `score`.

    Returns:
      The transform.

    Raises:
      ValueError: If `sparsity` is out of range or does not suit the group, or `form` is unknown.
    """
    if form not in get_args(Form):
        raise ValueError(f"{name}: form={form!r} must be 'masked' or 'dense'.")
    static = _check_sparsity(name, sparsity, group)
    if static == 0.0 or (group.of is not None and group.keep == group.of):
        return stateless(lambda params, context: params, name=name, scope="entry")
    common: dict[str, Any] = {
        "name": name,
        "needs": needs,
        "accepts": (Masked, Scaled) if form == "masked" else (Masked,),
        "refusal": _REFUSALS[form],
        "masked": True,
        "check": lambda path, leaf, view: _unfit(path, leaf, view, group, static),
        "verify": None if verify is None else lambda path, result: verify(path, result[1]),
    }
    if group.name == "global":
        return _globally(score, common, name, sparsity, static, form, min_keep)

    def choose(
        weight: jax.Array,
        *,
        mask: jax.Array | None = None,
        sparsity: float | jax.Array | None = static,
        **statistics: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores, report = score(weight, **statistics)
        if mask is None:
            keep = keep_mask(scores, group, sparsity=sparsity)
        else:
            scores = rank_removed_lowest(scores, mask)
            keep = mask & keep_mask(scores, group, sparsity=sparsity)
        if form == "dense":
            return jnp.where(keep, weight, jnp.zeros((), weight.dtype)), report
        return keep, report

    def wrap(leaf: Any, result: Any, view: View) -> Any:
        changed = view.from_matrix(result[0])
        return changed if form == "dense" else _mask(leaf, changed)

    scheduled = group.of is None and static is None
    shared = (
        (lambda context, _: {"sparsity": _read(name, sparsity, context)}) if scheduled else None
    )
    # What is ranked within an output is ranked within its feature group.
    grouped = "split" if group.name in ("output", "n_of_m") else "refuse"
    return leafwise(choose, wrap=wrap, shared=shared, grouped=grouped, **common)


_REFUSALS = {
    "masked": "Prune before adding adapters, or materialize it first.",
    "dense": "Zeros cannot be written into it: pass form='masked', or materialize it first.",
}


def _globally(
    score: Score,
    common: dict[str, Any],
    name: str,
    sparsity: Any,
    static: float | None,
    form: Form,
    min_keep: float,
) -> Transform:
    """Ranks all leaves together: scores leaf by leaf, then one selection over all of them."""
    if not 0.0 <= min_keep < 1.0:
        raise ValueError(
            f"{name}: min_keep={min_keep} must lie in [0, 1): it is the fraction of every matrix "
            "that stays whatever the global ranking says."
        )

    def protected(size: int) -> int:
        return math.ceil(min_keep * size - 1e-6)

    def rate(
        weight: jax.Array, *, mask: jax.Array | None = None, **statistics: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores, report = score(weight, **statistics)
        scores = protect_largest(scores, protected(weight.size))
        return (scores if mask is None else rank_removed_lowest(scores, mask)), report

    inner = leafwise(rate, wrap=lambda leaf, result, view: _Scored(leaf, result[0], view), **common)

    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(inner.update(params, (), context)[0])
        scored = {path: leaf for path, leaf in flat.items() if isinstance(leaf, _Scored)}
        total = sum(leaf.scores.size for leaf in scored.values())
        if not total:
            return params
        if static is None:
            if total >= 2**32:
                raise ValueError(
                    f"{name}: {total} weights are ranked together, but a sparsity that is an array "
                    "or a schedule counts fewer than 2^32. Pass a number."
                )
            zeros: Any = count_zeros_traced(_read(name, sparsity, context), total)
        else:
            zeros = count_zeros(static, total)
            fail(name, _infeasible(scored, static, zeros, total, protected, min_keep))
        removed = smallest_of_leaves(_one_dtype([x.scores for x in scored.values()]), zeros)
        new: Flat = dict(flat)
        for (path, entry), lowest in zip(scored.items(), removed, strict=True):
            new[path] = _apply_mask(entry, ~lowest, form)
        return unflatten(structure, new)

    return dataclasses.replace(
        inner, update=lambda params, state, c: (update(params, c), state), scope="tree"
    )


def _infeasible(
    scored: dict[Path, _Scored],
    sparsity: float,
    zeros: int,
    total: int,
    protected: Callable[[int], int],
    min_keep: float,
) -> list[str]:
    kept = 0
    for entry in scored.values():
        size = entry.view.in_dim * entry.view.out_dim
        kept += protected(size) * (entry.scores.size // size) if size else 0
    if zeros <= total - kept and zeros < total:
        return []
    return [
        f"sparsity={sparsity} asks for {zeros} zeros among the {total} weights of {len(scored)} "
        f"leaves, such as {next(iter(scored))!r}, but min_keep={min_keep} keeps {kept}. Ask for at "
        f"most {(total - max(kept, 1)) / total:.6g}, or lower min_keep."
    ]


def _apply_mask(entry: _Scored, keep: jax.Array, form: Form) -> Any:
    mask = entry.view.from_matrix(keep)
    leaf = _mask(entry.leaf, mask & entry.leaf.mask if isinstance(entry.leaf, Masked) else mask)
    return leaf if form == "masked" else leaf.materialize()


def _mask(leaf: Any, mask: jax.Array) -> Masked:
    return Masked(leaf.base if isinstance(leaf, Masked) else leaf, mask)


def _one_dtype(scores: list[jax.Array]) -> list[jax.Array]:
    # float32 holds every bfloat16 and float16, and so their order.
    dtypes = {x.dtype for x in scores}
    return scores if len(dtypes) == 1 else [x.astype(jnp.float32) for x in scores]


def _check_sparsity(name: str, sparsity: Any, group: Group) -> float | None:
    """The sparsity where it is a number, None where it is an array or a schedule, or not needed."""
    if group.of is not None:
        if sparsity is not None:
            raise ValueError(
                f"{name}: sparsity={sparsity} and keep={group.keep}, of={group.of} both say how "
                "many weights stay. Give one of them."
            )
        return None
    if sparsity is None:
        raise ValueError(f"{name}: give sparsity, the fraction of zeros, or keep and of.")
    if callable(sparsity) or isinstance(sparsity, jax.Array | np.ndarray):
        return None
    if isinstance(sparsity, bool) or not isinstance(sparsity, float | int | np.floating):
        raise TypeError(
            f"{name}: sparsity={sparsity!r} must be a number, a scalar array or a function of the "
            "step."
        )
    _refuse_outside(name, float(sparsity))
    return float(sparsity)


def _refuse_outside(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name}: sparsity={value} must lie in [0, 1): sparsity is the fraction of zeros."
        )


def _read(name: str, sparsity: Any, context: Context) -> jax.Array:
    """The sparsity of this update, float32 scalar."""
    value = sparsity(context.require("step", name)) if callable(sparsity) else sparsity
    value = jnp.asarray(value, jnp.float32)
    if value.shape:
        raise ValueError(
            f"{name}: sparsity has shape {value.shape}. It must be one number for all leaves; give "
            "leaves their own with `partition`."
        )
    if not isinstance(value, Tracer):
        _refuse_outside(name, float(value))
    return value


def _unfit(path: Path, leaf: Any, view: View, group: Group, sparsity: float | None) -> str | None:
    problem = group.unfit(view.in_dim, view.out_dim, sparsity)
    problem = problem or _sparser_already(leaf, view, group, sparsity)
    return None if problem is None else f"{path!r}: {problem}"


def _sparser_already(leaf: Any, view: View, group: Group, sparsity: float | None) -> str | None:
    if sparsity is None or group.name == "global" or not isinstance(leaf, Masked):
        return None
    if not isinstance(leaf.mask, jax.Array | np.ndarray) or isinstance(leaf.mask, Tracer):
        return None
    size = math.prod(leaf.shape)
    there = size - int(np.count_nonzero(leaf.mask))
    matrices = size // max(view.in_dim * view.out_dim, 1)
    asked = matrices * _zeros_of_matrix(group, view.in_dim, view.out_dim, sparsity)
    if there <= asked:
        return None
    return (
        f"{there} of its {size} weights are zero already, more than the {asked} that "
        f"sparsity={sparsity} asks for. Zeros stay; ask for at least {there / size:.6g}, or "
        "materialize the leaf first."
    )


def _zeros_of_matrix(group: Group, in_dim: int, out_dim: int, sparsity: float) -> int:
    if group.name == "output":
        return out_dim * count_zeros(sparsity, in_dim)
    if group.name == "input_block":
        block = min(group.block or in_dim, in_dim)
        blocks, rest = divmod(in_dim, block)
        whole = blocks * count_zeros(sparsity, block * out_dim)
        return whole + count_zeros(sparsity, rest * out_dim)
    return count_zeros(sparsity, in_dim * out_dim)
