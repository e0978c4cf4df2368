"""allocate: which method, bits and group each leaf gets under a budget of bytes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxweights.core._apply import LayoutLike, resolve_layout
from jaxweights.core._context import Context, Progress
from jaxweights.core._layout import is_default_target, is_float
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, nearest
from jaxweights.core._plan import leaf_bytes
from jaxweights.core._stats import Needs, Stats, union_needs
from jaxweights.core._transform import Transform
from jaxweights.quantize._allocation import Allocation, FrontPoint, LeafChoice
from jaxweights.quantize._knapsack import Option, convex_front, solve
from jaxweights.quantize._leaf_error import READS, Measure, error_of, missing_statistics
from jaxweights.quantize._packed_bytes import packed_bytes
from jaxweights.quantize._settings import check_positive, is_word
from jaxweights.weights._weight import is_weight

Size = Literal["stored", "packed"]
_NAME = "quantize.allocate"


def allocation_needs(
    params: Params, candidates: Mapping[str, Transform], *, measure: Measure = "relative"
) -> Needs:
    """The statistics that `allocate` reads: pass them to `calibrate`.

    Args:
      params: As in `allocate`.
      candidates: As in `allocate`.
      measure: As in `allocate`.

    Returns:
      Statistics by path.

    Example:
      >>> import jaxweights as jw
      >>> rounded = {"int4": jw.quantize.round_to_nearest(bits=4)}
      >>> sorted(allocation_needs({"kernel": jnp.ones((4, 4))}, rounded)["kernel"])
      ['count', 'gram']
    """
    _check_measure(measure)
    own = {
        path: READS[measure]
        for path, leaf in flatten(params)[0].items()
        if is_float(leaf) and len(leaf.shape) > 1 and is_default_target(path)
    }
    parts = [tx.needs(params) for tx in candidates.values()]
    return union_needs([*parts, own] if READS[measure] else parts)


def allocate(
    params: Params,
    candidates: Mapping[str, Transform],
    *,
    budget: float | None = None,
    bits_per_weight: float | None = None,
    measure: Measure = "relative",
    size: Size = "stored",
    importance: Mapping[str, float] | None = None,
    stats: Stats | None = None,
    layout: LayoutLike = None,
    key: jax.Array | None = None,
    progress: Progress | None = None,
) -> Allocation:
    r"""Chooses for every leaf one of several transforms, so that all fit into a budget.

    Every candidate is tried on every leaf; then the choice with the least sum of errors whose
    bytes fit is found exactly, as an integer program. Leaves of a stack get one choice.

    Args:
      params: Tree of arrays.
      candidates: Transforms by name, such as `{"int4 g64": gptq(bits=4, group_size=64), "float":
        identity()}`. One that does not fit a leaf (a group size that does not divide it) is not
        offered to that leaf. One that leaves it as it is counts with its bytes as they are.
      budget: Bytes that all leaves together may take which some candidate changes.
      bits_per_weight: The same per entry of these leaves; give one of the two.
      measure: What is summed over leaves, D being the change of the weight. "relative",
        :math:`\operatorname{tr}(D^\top H D) / \operatorname{tr}(W^\top H W)`: the share of its
        output that each layer loses. "output", the numerator per token, which favours layers with
        large outputs. "fisher", :math:`\sum g^2 D^2` with the squared gradients of a loss: an
        estimate of its increase. "weight", :math:`\|D\|^2 / \|W\|^2`, without data.
      size: "stored" counts the bytes of the arrays, "packed" those of `packed_bytes`.
      importance: Factors by pattern for the error of the leaves that it matches; 1 for others.
      stats: Statistics from `calibrate` with `needs=allocation_needs(...)`.
      layout: As in `apply`.
      key: Randomness, for candidates that draw.
      progress: Called with (path, leaves done, leaves in all).

    Returns:
      The allocation. `allocation.transform` carries it out; `allocation_figure` draws it.

    Raises:
      TypeError: If a candidate is no transform.
      ValueError: If a setting is out of range, a statistic is missing, no candidate changes or fits
        a leaf, a candidate fits none, or the budget is below what the smallest candidates take.

    Example:
      >>> import jaxweights as jw
      >>> keys = jax.random.split(jax.random.key(0))
      >>> params = {"up": jax.random.normal(keys[0], (64, 64)), "down": jnp.ones((64, 64))}
      >>> rounded = {f"int{b}": jw.quantize.round_to_nearest(bits=b) for b in (2, 4, 8)}
      >>> found = jw.quantize.allocate(params, rounded, bits_per_weight=5.5, measure="weight")
      >>> found.choices, found.bytes <= found.budget
      ({'down': 'int2', 'up': 'int8'}, True)
    """
    _check(candidates, budget, bits_per_weight, measure, size)
    flat, _ = flatten(params)
    context = Context(stats=stats, key=key, layout=resolve_layout(flat, layout, stats))
    factors = _factors(importance, flat)
    trials = _offers(candidates, flat, context)
    fail(_NAME, missing_statistics(trials, measure, context))
    sizes = packed_bytes if size == "packed" else leaf_bytes
    leaves: dict[Path, dict[str, Option]] = {}
    for done, (path, (offered, _)) in enumerate(trials.items(), start=1):
        energy = error_of(flat[path], path, measure, context)
        leaves[path] = {}
        for name in offered:
            new = _try(candidates[name], flat, context, path)
            changed = new is not flat[path]
            error = factors.get(path, 1.0) * float(energy(new)) if changed else 0.0
            leaves[path][name] = Option(sizes(new), error)
        if progress is not None:
            progress(path, done, len(trials))
    _refuse_nonfinite(leaves)
    weights = sum(flat[path].size for path in leaves)
    allowed = int(bits_per_weight * weights // 8) if budget is None else int(budget)  # type: ignore
    return _choose(leaves, trials, allowed, candidates)


def _choose(
    leaves: dict[Path, dict[str, Option]],
    trials: dict[Path, tuple[list[str], dict[str, str]]],
    budget: int,
    candidates: Mapping[str, Transform],
) -> Allocation:
    items = [list(options.values()) for options in leaves.values()]
    least = sum(min(option.size for option in item) for item in items)
    if budget < least:
        total = sum(len(item) for item in items)
        raise ValueError(
            f"{_NAME}: the budget of {budget} bytes is below {least}, which the smallest of "
            f"{total} options take together. Allow more, or add smaller candidates."
        )
    best, bound = solve(items, budget)
    names = [list(options) for options in leaves.values()]
    named = lambda pick: {  # noqa: E731
        path: own[i] for path, own, i in zip(leaves, names, pick.options, strict=True)
    }
    point = lambda pick: FrontPoint(pick.size, pick.error, named(pick))  # noqa: E731
    uniform = {}
    for name in candidates:
        if all(name in options for options in leaves.values()):
            chosen = [options[name] for options in leaves.values()]
            uniform[name] = (sum(o.size for o in chosen), sum(o.error for o in chosen))
    return Allocation(
        leaves=tuple(
            LeafChoice(
                path,
                name,
                *leaves[path][name],
                options={other: (o.size, o.error) for other, o in leaves[path].items()},
                unfit=trials[path][1],
            )
            for path, name in named(best).items()
        ),
        budget=budget,
        bytes=best.size,
        error=best.error,
        bound=bound,
        front=tuple(map(point, convex_front(items))),
        uniform=uniform,
        candidates=dict(candidates),
    )


def _check(candidates: Any, budget: Any, bits_per_weight: Any, measure: str, size: str) -> None:
    if not isinstance(candidates, Mapping):
        raise TypeError(f"{_NAME}: candidates={candidates!r} must map names to transforms.")
    if not candidates:
        raise ValueError(f"{_NAME}: candidates is empty. Name at least one transform.")
    for name, tx in candidates.items():
        if not isinstance(tx, Transform):
            raise TypeError(f"{_NAME}: candidate {name!r} is {tx!r}, no transform.")
        if tx.moves_inputs:
            raise ValueError(
                f"{_NAME}: candidate {name!r} moves or rescales inputs, so that its errors cannot "
                "be measured by these statistics. Apply it before, and calibrate again."
            )
    if (budget is None) == (bits_per_weight is None):
        raise ValueError(
            f"{_NAME}: budget={budget} and bits_per_weight={bits_per_weight}: give one of the two."
        )
    if budget is not None:
        check_positive(_NAME, budget=budget)
    else:
        check_positive(_NAME, bits_per_weight=bits_per_weight)
    _check_measure(measure)
    if not is_word(size, get_args(Size)):
        raise ValueError(f"{_NAME}: size={size!r} is unknown. Choose 'stored' or 'packed'.")


def _check_measure(measure: str) -> None:
    if not is_word(measure, get_args(Measure)):
        raise ValueError(
            f"{_NAME}: measure={measure!r} is unknown. Choose one of {', '.join(READS)}."
        )


def _factors(importance: Mapping[str, float] | None, flat: Flat) -> dict[Path, float]:
    factors: dict[Path, float] = {}
    problems = []
    for pattern, factor in (importance or {}).items():
        matched = [path for path in flat if re.fullmatch(pattern, path)]
        factors |= dict.fromkeys(matched, factor)
        if not matched:
            problems.append(
                f"importance: pattern {pattern!r} matches no leaf. The nearest paths: "
                f"{nearest(pattern, flat)}."
            )
        if not factor >= 0:
            problems.append(f"importance: {pattern!r} has the factor {factor}; it must not be < 0.")
    fail(_NAME, problems)
    return factors


def _offers(
    candidates: Mapping[str, Transform], flat: Flat, context: Context
) -> dict[Path, tuple[list[str], dict[str, str]]]:
    """For every leaf that a candidate changes: those that fit it, and why others do not."""
    found: dict[Path, tuple[list[str], dict[str, str]]] = {}
    problems = []
    for path, leaf in flat.items():
        if is_weight(leaf) or not hasattr(leaf, "dtype"):
            continue
        fit, unfit, touched = [], {}, False
        for name, tx in candidates.items():
            try:
                touched |= _changes(tx, flat, context, path)
                fit.append(name)
            except ValueError as error:
                unfit[name] = str(error).split("\n")[0]
        if fit and touched:
            found[path] = fit, unfit
        elif unfit:
            problems.append(f"{path!r}: no candidate fits. {next(iter(unfit.values()))}")
    for name in candidates:
        reasons = [unfit[name] for _, unfit in found.values() if name in unfit]
        if reasons and len(reasons) == len(found):
            problems.append(f"candidate {name!r} fits no leaf. {reasons[0]}")
    fail(_NAME, problems)
    if not found:
        raise ValueError(
            f"{_NAME}: no candidate changes any leaf. Pass a tree with matrices, or candidates "
            "that name these leaves with `partition`."
        )
    return found


def _changes(tx: Transform, flat: Flat, context: Context, path: Path) -> bool:
    changed: list[bool] = []

    def run(leaf: Any) -> Any:
        new = _try(tx, {**flat, path: leaf}, context, path)
        changed.append(new is not leaf)
        return new

    jax.eval_shape(run, flat[path])
    return changed[-1]


def _try(tx: Transform, flat: Flat, context: Context, path: Path) -> Any:
    one = dataclasses.replace(context, only=frozenset({path}))
    return tx.update(flat, tx.init(flat), one)[0][path]


def _refuse_nonfinite(leaves: dict[Path, dict[str, Option]]) -> None:
    fail(
        _NAME,
        [
            f"{path!r}: candidate {name!r} gives the error {option.error}. Repair the weight or "
            "its statistics, or take the candidate away."
            for path, options in leaves.items()
            for name, option in options.items()
            if not np.isfinite(option.error)
        ],
    )
