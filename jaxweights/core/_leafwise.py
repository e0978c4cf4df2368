"""leafwise: lifts the maths of one matrix over a tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxweights.core._context import Context
from jaxweights.core._feature_groups import FeatureGroups
from jaxweights.core._host import where_not_finite
from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, path_key, unflatten
from jaxweights.core._stats import GRADIENT_STATISTICS, Needs, Statistic
from jaxweights.core._targets import (
    Check,
    Grouped,
    inner_weight,
    may_be_target,
    stack_sizes,
    targets_of,
    with_inner_weight,
)
from jaxweights.core._transform import Transform, stateless
from jaxweights.weights._axes import View
from jaxweights.weights._weight import Weight, materialize

MatrixFn = Callable[..., Any]
Wrap = Callable[[Any, Any, View], Any]
Verify = Callable[[Path, Any], str | None]
Sound = Callable[[Any], jax.Array]
Shared = Callable[[Context, Flat], dict[str, jax.Array]]
PerLeaf = Callable[[Context, Flat], dict[Path, dict[str, jax.Array]]]


def leafwise(
    fn: MatrixFn,
    *,
    name: str,
    needs: Collection[Statistic] = (),
    prepare: MatrixFn | None = None,
    wrap: Wrap | None = None,
    accepts: tuple[type[Weight], ...] = (),
    refusal: str = "Apply it to the dense weight, before it is represented.",
    randomized: bool = False,
    masked: bool = False,
    shared: Shared | None = None,
    per_leaf: PerLeaf | None = None,
    mapping: Literal["vmap", "map"] = "vmap",
    check: Check | None = None,
    verify: Verify | None = None,
    sound: Sound | None = None,
    checks_finite: bool = True,
    moves_inputs: bool = False,
    grouped: Grouped = "refuse",
) -> Transform:
    """Makes a transform of a tree from a function of one `(in, out)` matrix.

    The function never sees stacks, heads or names: each leaf is rearranged into
    `(*stack, in, out)` as the layout says, the function is mapped over the stack, and one
    compiled program serves all leaves of one shape.

    Args:
      fn: `fn(weight, **inputs)` with `weight` `(in, out)` in the leaf's dtype. Inputs, by
        keyword: each needed statistic of this matrix; `key` if `randomized`; `mask`
        `(in, out)` bool if `masked` and the weight has one. Returns a pytree of arrays, or
        the new matrix when `wrap` is None.
      name: What errors call the transform.
      needs: Statistics that `fn` takes.
      prepare: `prepare(**statistics)` gives what `fn` takes as `prepared` besides, such as a
        factorization; done once for all weights that share their statistics.
      wrap: `wrap(leaf, result, view)` builds the new leaf from the result, whose arrays have got
        the stack axes in front. None puts the new matrix in place of the old one.
      accepts: Representations that may be transformed; `fn` sees their dense value. The base of a
        weight that changes its inputs is transformed, and the change stays before it.
      refusal: What to do instead, for other representations.
      randomized: Whether `fn` draws random numbers.
      masked: Whether `fn` takes the mask of a weight that has one.
      shared: `shared(context, params)` gives arrays that `fn` takes besides, the same for every
        matrix; they may be traced, such as what a schedule says of `context.step`, or depend on all
        leaves, which are given by path.
      per_leaf: `per_leaf(context, params)` gives arrays that `fn` takes besides, by path, which
        have the stack axes of the leaf in front.
      mapping: `"vmap"` for all matrices at once, `"map"` for one after another, in the memory
        of one.
      check: `check(path, leaf, view)` says what is wrong with a leaf, from its shape.
      verify: `verify(path, result)` says what went wrong with a result; concrete runs only.
      sound: `sound(result)` tells in the compiled program whether a result is as it should be;
        `verify` is then asked only about those that are not, and the leaf itself is not looked at.
        Where NaN or infinity leaves a trace in a small part of the result, such as the scales of
        its groups, this saves another pass over memory.
      checks_finite: Whether a leaf with NaN or infinity is refused (concrete runs only). Off for
        functions whose own `verify` does it.
      moves_inputs: As in `Transform`.
      grouped: What becomes of the kernel of a convolution with feature groups, whose statistics are
        of each group. `"refuse"`; `"pool"`, for functions of extremes: they get those of all
        groups; `"split"`: the groups are matrices of a stack, and what `wrap` makes of them, dense
        or a `Scaled` whose fields have rows and columns, is put side by side again.

    Returns:
      The transform. By default it acts on the matrices of the layout, not on embeddings, heads,
      routers and norms; those are for `partition` to name.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxweights.core import apply, leafwise
      >>> halve = leafwise(lambda weight: weight / 2, name="halve")
      >>> apply(halve, {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})["bias"]
      Array([1., 1., 1.], dtype=float32)
    """
    wanted = frozenset(needs)
    # Statistics of gradients are each weight's own.
    shares = prepare is not None and not wanted & frozenset(GRADIENT_STATISTICS)

    @functools.partial(jax.jit, static_argnames=("views",))
    def run(
        leaves: tuple[Any, ...],
        own: tuple[dict[str, Any], ...],
        statistics: dict[str, Any],
        common: dict[str, Any],
        views: tuple[View, ...],
    ) -> tuple[Any, tuple[jax.Array, ...]]:
        """Results of leaves that share their statistics, and whether all is well with each."""
        dense = [materialize(leaf) for leaf in leaves]
        matrices, inputs = [], []
        for one, view, given in zip(dense, views, own, strict=True):
            if "mask" in given:
                given = given | {"mask": view.to_matrix(given["mask"])}
            matrices.append(view.to_matrix(one))
            inputs.append(given)

        def each(operands: tuple[Any, ...]) -> tuple[Any, ...]:
            weights, inputs, statistics = operands
            ready = common if prepare is None else common | {"prepared": prepare(**statistics)}
            return tuple(
                fn(weight, **statistics, **given, **ready)
                for weight, given in zip(weights, inputs, strict=True)
            )

        stack = matrices[0].shape[:-2]
        results = map_over_stack(each, (matrices, inputs, statistics), stack, mapping)
        if sound is not None:
            return results, tuple(map(sound, results))
        # Not through a maximum: XLA's vectorised one drops NaN on CPU (seen with jax 0.10.2).
        finite = [
            jnp.isfinite(jnp.sum(one * 0)) if checks_finite and one.size else jnp.asarray(True)
            for one in dense
        ]
        return results, tuple(finite)

    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(params)
        targets = targets_of(flat, context, name, accepts, refusal, check, wanted, grouped)
        key: Any = context.require("key", name) if randomized and targets else None
        common = shared(context, flat) if shared is not None and targets else {}
        others = per_leaf(context, flat) if per_leaf is not None and targets else {}
        new, well = dict(flat), {}
        outcome: dict[Path, Any] = {}  # results that `verify` may be asked about
        problems: dict[Path, str] = {}
        done = 0
        for paths in _groups(targets, context, shares=shares):
            leaves = tuple(inner_weight(flat[path]) for path in paths)
            views = tuple(targets[path] for path in paths)
            # Who shares an input shares its feature groups.
            groups = [
                FeatureGroups.of(context.stats, path, leaf, view) if wanted else None
                for path, leaf, view in zip(paths, leaves, views, strict=True)
            ]
            if grouped == "split":
                split = [
                    (leaf, view) if kernel is None else (kernel.split(leaf), kernel.view)
                    for kernel, leaf, view in zip(groups, leaves, views, strict=True)
                ]
                leaves, views = zip(*split, strict=True)
            own: list[dict[str, Any]] = []
            for path, leaf, view in zip(paths, leaves, views, strict=True):
                given = dict(others.get(path, {}))
                if randomized:
                    given["key"] = _stack_keys(path_key(key, path), leaf, view)
                if masked and (mask := getattr(leaf, "mask", None)) is not None:
                    given["mask"] = mask
                own.append(given)
            statistics = _statistics(context, paths[0], wanted, views[0], groups[0], grouped)
            results, flags = run(leaves, tuple(own), statistics, common, views)
            concrete = not _is_abstract(results)
            if concrete:  # one leaf at a time, in the memory that one takes
                jax.block_until_ready(flags)
            for path, leaf, view, kernel, result, flag in zip(
                paths, leaves, views, groups, results, flags, strict=True
            ):
                well[path] = flag
                changed = (_put_value if wrap is None else wrap)(leaf, result, view)
                if kernel is not None and grouped == "split":
                    changed = kernel.join(changed)
                new[path] = with_inner_weight(flat[path], changed)
                if sound is not None:
                    outcome[path] = result
                elif verify is not None and concrete and (problem := verify(path, result)):
                    problems[path] = problem
                done += 1
                if context.progress is not None:
                    context.progress(path, done, len(targets))
        for path in _not_well(well):
            # A leaf that is not finite explains whatever else went wrong with it.
            problem = (
                describe_nonfinite(path, flat[path])
                if sound is None or verify is None
                else verify(path, outcome[path])
            )
            problems |= {path: problem} if problem else {}
        fail(name, problems.values())
        return unflatten(structure, new)

    def declare(params: Params, *, named: bool = False) -> Needs:
        if not wanted:
            return {}
        flat = flatten(params)[0]
        return {path: wanted for path, leaf in flat.items() if may_be_target(path, leaf, named)}

    return stateless(
        update,
        name=name,
        needs=declare,
        reads_statistics=bool(wanted),
        moves_inputs=moves_inputs,
        scope="leaf" if randomized else "matrix",  # keys are drawn for a stack at once
    )


def _statistics(
    context: Context,
    path: Path,
    wanted: frozenset[Statistic],
    view: View,
    groups: FeatureGroups | None,
    grouped: Grouped,
) -> dict[str, Any]:
    """What a function takes of a weight, with the stack axes of its view in front."""
    if not wanted or context.stats is None:
        return {}
    inputs: dict[str, Any] = {name: context.stats.get(path, name) for name in sorted(wanted)}
    gradients = wanted & frozenset(GRADIENT_STATISTICS)
    if groups is not None:
        for name in wanted - gradients:
            own = inputs[name]
            inputs[name] = groups.statistic(own) if grouped == "split" else groups.pooled(name, own)
    for name in gradients:
        own = inputs[name]
        own = groups.split(own) if groups is not None and grouped == "split" else own
        inputs[name] = view.to_matrix(own)
    return inputs


def _stack_keys(key: jax.Array, leaf: Any, view: View) -> jax.Array:
    sizes = stack_sizes(leaf, view)
    return jax.random.split(key, sizes) if sizes else key


def _groups(targets: dict[Path, View], context: Context, *, shares: bool) -> list[tuple[Path, ...]]:
    """Paths that are transformed together: those whose statistics are the same arrays."""
    if not shares or context.stats is None:
        return [(path,) for path in targets]
    groups: dict[Path, list[Path]] = {}
    for path in targets:
        groups.setdefault(context.stats.owner(path), []).append(path)
    return [tuple(paths) for paths in groups.values()]


def _put_value(leaf: Any, result: jax.Array, view: View) -> Any:
    del leaf
    return view.from_matrix(result)


def _is_abstract(tree: Any) -> bool:
    return any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _not_well(well: dict[Path, jax.Array]) -> list[Path]:
    """The leaves whose flag is down; all flags are fetched from the device at once."""
    if _is_abstract(well):
        return []
    flags = jax.device_get(list(well.values()))
    return [path for path, flag in zip(well, flags, strict=True) if not flag]


def describe_nonfinite(path: Path, leaf: Any) -> str:
    """Says how many values of a leaf are not finite, and where the first one is."""
    bad = where_not_finite(materialize(leaf))
    return (
        f"{path!r}: {len(bad)} of {leaf.size} values are not finite, the first at "
        f"{bad[0].tolist()}. Repair the checkpoint, or leave this weight out with `partition`."
    )
