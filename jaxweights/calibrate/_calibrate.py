"""calibrate: statistics of a model's activations and gradients, in one pass for all needs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxweights.calibrate._mixed_groups import refuse_mixed_groups
from jaxweights.calibrate._probe import Probe, combine_records, neutral_record, observe
from jaxweights.calibrate._reference import Reference
from jaxweights.core import Layout, Needs, Params, Path, Stats, flatten, unflatten
from jaxweights.core._apply import LayoutLike
from jaxweights.core._batches import refuse_one_batch
from jaxweights.core._paths import check_pattern, fail, matching, nearest
from jaxweights.core._stats import (
    GRADIENT_STATISTICS,
    INPUT_STATISTICS,
    MATRIX_STATISTICS,
    STATISTICS,
)
from jaxweights.lift._infer_layout import arrays_of, trace_model
from jaxweights.lift._lift import evaluate_lifted
from jaxweights.lift._walk import Walk
from jaxweights.weights import InputChange, View

Batch = Any
Mask = Callable[[Batch], jax.Array]
Progress = Callable[[str, int, int | None], None]


def calibrate(
    fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Batch],
    *,
    needs: Needs,
    loss: Callable[..., jax.Array] | None = None,
    reference: Params | None = None,
    layout: LayoutLike = None,
    mask: Mask | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Runs a model over data and sums up what each weight is multiplied with.

    The model is not modified: its trace is evaluated with every wanted weight watching its own
    products. Statistics leave scans, loops, branches and `shard_map` as extra results, so stacked
    weights get stacked statistics, nothing is differentiated and no activation outlives its
    product. One compiled step takes one batch; weights that read the same input share an entry.
    Of a convolution with feature groups, depthwise ones included, every group has its statistics.

    Args:
      fn: The model, called as `fn(params, *batch)` for a tuple or list, else `fn(params, batch)`.
      params: Its parameters; may hold represented weights.
      batches: Batches of inputs, streamed once. Batches of another shape compile again.
      needs: Statistics per path, from `tx.needs(params)`. Paths that turn out to be no matrices
        of the model are left out, if any is one; what needs them says so.
      loss: `loss(params, *batch)`, a scalar, for `grad_abs` and `grad_sq`: it is differentiated for
        one example at a time (batches of leading length 1).
      reference: The model's parameters before they were quantized or pruned, for `cross_gram`: its
        activations are what the inputs of `params` are compared with.
      layout: Axes that win over those read off the trace; a mapping from patterns to `Axes`.
      mask: Tells which tokens of a batch count: `mask(batch)` is bool, shaped like the leading axes
        of the activations, such as `(batch, tokens)`.
      progress: Called with ("calibrate", batches done, batches in all or None).

    Returns:
      The statistics, as raw sums in float32 (counts in int32), with the layout that was seen.

    Raises:
      TypeError: If the first argument is no function, or `batches` is a single batch.
      ValueError: If there is no batch, a need or its path is unknown, nothing that is needed is
        ever multiplied, gradients are needed without a loss, or what was summed is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> model = lambda params, x: x @ params["kernel"]
      >>> stats = calibrate(model, params, [jnp.eye(3), jnp.eye(3)], needs={"kernel": {"gram"}})
      >>> float(stats.get("kernel", "gram").trace()), int(stats.get("kernel", "count"))
      (6.0, 6)
    """
    if not callable(fn):
        raise TypeError(
            f"calibrate: the first argument is a {type(fn).__name__}, not a function. Write "
            "calibrate(fn, params, batches, needs=...), with a model fn(params, batch)."
        )
    refuse_one_batch("calibrate", batches)
    _check_needs(needs, loss, reference)
    batches, total_batches = iter(batches), _length(batches)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError("calibrate: there is no batch. Pass at least one.") from None
    flat, structure = flatten(params)
    _check_paths(needs, flat)
    trace = trace_model(fn, params, _arguments(first))
    refuse_mixed_groups(trace, needs)
    axes = _merged_layout(trace.layout, layout, list(flat))
    input_needs, owners = _assign(needs, flat, axes, dict(trace.owners))
    before = None if reference is None else _like(flat, flatten(reference)[0])
    gradient_paths = {
        path: names & frozenset(GRADIENT_STATISTICS)
        for path, names in needs.items()
        if path in axes and names & frozenset(GRADIENT_STATISTICS)
    }

    @jax.jit
    def collect(
        arrays: dict[Path, Any], before_arrays: dict[Path, Any] | None, batch: Batch
    ) -> dict[Path, Any]:
        whole = flat | arrays
        old = None if before is None or before_arrays is None else before | before_arrays
        records = _input_records(fn, whole, old, structure, axes, input_needs, batch, mask)
        for path, record in _gradient_records(
            loss, whole, structure, gradient_paths, batch
        ).items():
            records[path] = records.get(path, {}) | record
        return records

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: dict[Path, Any], new: dict[Path, Any]) -> dict[Path, Any]:
        return {path: combine_records(record, new[path]) for path, record in total.items()}

    operands = arrays_of(flat), None if before is None else arrays_of(before)
    total: dict[Path, Any] | None = None
    for done, batch in enumerate(itertools.chain([first], batches), start=1):
        new = collect(*operands, batch)
        if needs and not new:
            raise ValueError(_nothing_to_watch(needs, trace.layout))
        total = new if total is None else add(total, new)
        if progress is not None:
            jax.block_until_ready(total)
            progress("calibrate", done, total_batches)
    assert total is not None
    fail("calibrate", _nonfinite(total))
    kept = tuple((path, owner) for path, owner in owners.items() if owner in total)
    return Stats(total, kept, axes)


_SUMS = (*MATRIX_STATISTICS, "second_moment", "sum", "abs_sum", *GRADIENT_STATISTICS)
_MOST_SHOWN = 5


@jax.jit
def _finite(total: dict[Path, dict[str, jax.Array]]) -> dict[Path, jax.Array]:
    """Whether the sums of each weight are finite; of Gram matrices the diagonals tell."""
    flags = {}
    for path, record in total.items():
        sums = {name: value for name, value in record.items() if name in _SUMS}
        for name in set(MATRIX_STATISTICS) & set(sums):
            sums[name] = jnp.diagonal(sums[name], axis1=-2, axis2=-1)
        flags[path] = jnp.stack(
            [jnp.asarray(True), *(jnp.isfinite(x).all() for x in sums.values())]
        ).all()
    return flags


def _nonfinite(total: dict[Path, Any]) -> list[str]:
    """A complaint that names the weights whose inputs or gradients were not finite."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(total)):
        return []
    bad = [path for path, ok in _finite(total).items() if not ok]
    if not bad:
        return []
    more = f" and {len(bad) - _MOST_SHOWN} more" if len(bad) > _MOST_SHOWN else ""
    return [
        f"{', '.join(map(repr, bad[:_MOST_SHOWN]))}{more}: what the model fed into these weights "
        "held NaN or infinity, or squares beyond float32. Look for token ids out of range and for "
        "overflow in the batches, run the model in a wider dtype, or leave these weights out of "
        "needs with `partition`."
    ]


def _check_needs(needs: Needs, loss: Any, reference: Any) -> None:
    problems = []
    for path, names in needs.items():
        for name in sorted(set(names) - set(STATISTICS)):
            problems.append(
                f"{path!r}: unknown statistic {name!r}. Choose from {', '.join(STATISTICS)}; "
                f"the nearest is {nearest(name, STATISTICS)[0]!r}."
            )
        if set(names) & set(GRADIENT_STATISTICS) and loss is None:
            problems.append(
                f"{path!r}: {sorted(set(names) & set(GRADIENT_STATISTICS))} are statistics of "
                "gradients. Pass loss=, a function (params, *batch) -> scalar."
            )
        if "cross_gram" in names and reference is None:
            problems.append(
                f"{path!r}: 'cross_gram' compares two models. Go through the layers by "
                "pipeline(block_by_block=True), or pass reference=, the parameters before they "
                "were changed."
            )
    fail("calibrate", problems)


def _check_paths(needs: Needs, flat: Mapping[Path, Any]) -> None:
    fail(
        "calibrate",
        [
            f"{path!r}: needs names this path, but params has no such leaf. The nearest paths: "
            f"{nearest(path, flat)}."
            for path in needs
            if path not in flat
        ],
    )


def _nothing_to_watch(needs: Needs, seen: Layout) -> str:
    paths = list(needs)
    more = f" and {len(paths) - _MOST_SHOWN} more" if len(paths) > _MOST_SHOWN else ""
    used = [path for path, axes in seen.entries if axes.kind != "embedding" and path not in paths]
    return (
        f"calibrate: {', '.join(map(repr, paths[:_MOST_SHOWN]))}{more}: the model multiplies none "
        "of these leaves with activations, so there is nothing to sum up. Leave them out of needs; "
        f"what it multiplies is {used[:_MOST_SHOWN] or 'nothing'}."
    )


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def _arguments(batch: Batch) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _merged_layout(traced: Layout, layout: LayoutLike, paths: list[Path]) -> Layout:
    if layout is None:
        return traced
    if isinstance(layout, Layout):
        stated: Mapping[Path, Any] = layout
    else:
        stated = {}
        for pattern, axes in layout.items():
            check_pattern("calibrate: layout", pattern)
            stated |= dict.fromkeys(matching(pattern, paths), axes)
    return traced.with_stated(stated)


def _assign(
    needs: Needs, flat: Mapping[Path, Any], axes: Layout, owners: Mapping[Path, Path]
) -> tuple[dict[Path, frozenset[str]], dict[Path, Path]]:
    """Gives every shared input to one of the weights that read it."""
    wanted: dict[Path, frozenset[str]] = {}
    shared: dict[Path, Path] = {}
    holder: dict[Path, Path] = {}
    for path, names in needs.items():
        names = frozenset(names) & frozenset(INPUT_STATISTICS)
        if not names or path not in axes or path not in flat:
            continue
        source = owners.get(path, path)
        # The base of a weight that changes its inputs reads what nobody else does.
        owner = path
        if not isinstance(flat[path], InputChange):
            owner = holder.setdefault(source, path)
        if owner != path and _stack(flat[owner], axes[owner]) == _stack(flat[path], axes[path]):
            shared[path] = owner
        else:
            owner = path
        wanted[owner] = wanted.get(owner, frozenset()) | names
    return wanted, shared


def _stack(leaf: Any, axes: Any) -> tuple[int, ...]:
    view = View.of(leaf.shape, axes)
    return (*(leaf.shape[a] for a in view.stack_axes(len(leaf.shape))), view.in_dim)


def _like(flat: dict[Path, Any], before: dict[Path, Any]) -> dict[Path, Any]:
    """The leaves of a reference model, in the order of the model's; refuses those of another."""
    shape = lambda leaf: tuple(getattr(leaf, "shape", ()))  # noqa: E731
    fail(
        "calibrate: reference",
        [
            f"{path!r}: is {shape(before[path]) if path in before else 'missing'}, but params has "
            f"{shape(flat[path]) if path in flat else 'no such leaf'}. Pass parameters of the same "
            "model."
            for path in {**flat, **before}
            if path not in flat or path not in before or shape(flat[path]) != shape(before[path])
        ],
    )
    return {path: before[path] for path in flat}


def probed(
    flat: Mapping[Path, Any], axes: Layout, wanted: Mapping[Path, frozenset[str]]
) -> dict[Path, Any]:
    """The leaves, with probes in place of those whose statistics are wanted."""
    return {
        path: Probe(leaf, None, View.of(leaf.shape, axes[path]), wanted[path])
        if path in wanted
        else leaf
        for path, leaf in flat.items()
    }


def observing(keep: jax.Array | None, reference: Reference | None) -> Walk:
    """A walk that records the statistics of probes."""
    paired = None if reference is None else reference.next
    return Walk(
        observer=lambda *product: observe(*product, mask=keep, reference=paired),
        combine=combine_records,
        identity=neutral_record,
    )


def compared(wanted: Mapping[Path, frozenset[str]]) -> dict[Path, frozenset[str]]:
    """What is wanted of weights whose inputs are compared with those of a reference model."""
    return {path: names for path, names in wanted.items() if "cross_gram" in names}


def _input_records(
    fn: Callable[..., Any],
    flat: dict[Path, Any],
    before: dict[Path, Any] | None,
    structure: Any,
    axes: Layout,
    wanted: dict[Path, frozenset[str]],
    batch: Batch,
    mask: Mask | None,
) -> dict[Path, Any]:
    if not wanted:
        return {}
    keep = None if mask is None else jnp.asarray(mask(batch), bool)
    reference, inputs = None, _arguments(batch)
    if before is not None and compared(wanted):
        reference = Reference()
        leaves = probed(before, axes, compared(wanted))
        evaluate_lifted(fn, reference.walk, (unflatten(structure, leaves), *inputs), {})
    walk = observing(keep, reference)
    evaluate_lifted(fn, walk, (unflatten(structure, probed(flat, axes, wanted)), *inputs), {})
    refuse_incomplete(walk, wanted)
    return dict(walk.records)


def refuse_incomplete(walk: Walk, wanted: Iterable[Path]) -> None:
    """Refuses weights of which some uses were observed and others could not be."""
    fail(
        "calibrate",
        [
            f"{path!r}: the model also uses it in {walk.lost[path]!r}, where what it is multiplied "
            "with cannot be followed, so that its statistics would be incomplete. Leave this "
            "weight out of needs, with `partition`, or use it in matrix products only."
            for path in wanted
            if path in walk.lost and path in walk.records
        ],
    )


def _gradient_records(
    loss: Callable[..., jax.Array] | None,
    flat: dict[Path, Any],
    structure: Any,
    wanted: dict[Path, frozenset[str]],
    batch: Batch,
) -> dict[Path, Any]:
    """Sums of |g| and g² over the examples of a batch, one example's gradient at a time."""
    if not wanted or loss is None:
        return {}

    def example_loss(trained: dict[Path, Any], example: tuple[Any, ...]) -> jax.Array:
        return loss(unflatten(structure, {p: trained.get(p, flat[p]) for p in flat}), *example)

    def step(total: dict[Path, Any], example: Any) -> tuple[dict[Path, Any], None]:
        example = jax.tree.map(lambda x: x[None], example)
        grads = jax.grad(example_loss)({path: flat[path] for path in wanted}, example)
        new = {}
        for path, record in total.items():
            g = grads[path].astype(jnp.float32)
            parts = {"grad_abs": jnp.abs(g), "grad_sq": jnp.square(g)}
            new[path] = {name: value + parts[name] for name, value in record.items()}
        return new, None

    zeros = {
        path: {name: jnp.zeros(flat[path].shape, jnp.float32) for name in names}
        for path, names in wanted.items()
    }
    examples = _arguments(batch)
    total, _ = jax.lax.scan(step, zeros, examples)
    count = jnp.asarray(jax.tree.leaves(examples)[0].shape[0], jnp.int32)
    return {path: record | {"examples": count} for path, record in total.items()}
