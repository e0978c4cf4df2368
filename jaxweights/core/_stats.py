"""Calibration statistics: what the model's data said about each weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core._layout import Layout
from jaxweights.core._paths import Path, fail, nearest
from jaxweights.weights._show import show_array

Statistic = str

INPUT_STATISTICS: tuple[Statistic, ...] = (
    "count",
    "sum",
    "abs_sum",
    "second_moment",
    "gram",
    "cross_gram",
    "min",
    "max",
)
MATRIX_STATISTICS: tuple[Statistic, ...] = ("gram", "cross_gram")  # of pairs of inputs
GRADIENT_STATISTICS: tuple[Statistic, ...] = ("grad_abs", "grad_sq")
STATISTICS = INPUT_STATISTICS + GRADIENT_STATISTICS

Needs = dict[Path, frozenset[Statistic]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Stats:
    """Statistics per weight, as raw sums, so that two halves of the data add up to the whole.

    Per weight, with `stack` the sizes of its stack axes and `in` its flattened input axes:

    - `count` `(*stack,)`: tokens seen; `examples` `()`: examples whose gradients were taken.
    - `sum`, `abs_sum`, `second_moment`, `min`, `max` `(*stack, in)`: of the inputs, of their sizes
      and their squares; sums, not means.
    - `gram` `(*stack, in, in)`: sum of the outer products of the inputs.
    - `cross_gram` `(*stack, in, in)`: of the inputs with those of the same token in a reference
      model, which are the columns.
    - `grad_abs`, `grad_sq`, shaped like the weight: sums over examples of |g| and g².

    The kernel of a convolution with G feature groups counts as a stack of G matrices
    `(in, out / G)`, each with inputs of its own: of it, `stack` is `(*stack, G)`.

    Weights that read the same input share one entry. Of a weight that changes its inputs
    (`Rescaled`, `Rotated`), the inputs are those of its innermost base.

    Args:
      values: Arrays by path of the entry's owner, then by name of the statistic.
      owners: Pairs (path, owner) for weights whose input statistics another path holds.
      layout: Layout that calibration saw in the model's trace.
    """

    values: dict[Path, dict[Statistic, jax.Array]]
    owners: tuple[tuple[Path, Path], ...] = dataclasses.field(default=(), metadata={"static": True})
    layout: Layout = dataclasses.field(default_factory=Layout, metadata={"static": True})

    def __repr__(self) -> str:
        """A line per weight: arrays as dtype and shape."""
        lines = [
            f"{path}  {', '.join(f'{name}={_show(value)}' for name, value in entry.items())}"
            for path, entry in self.values.items()
        ]
        lines += [f"{path}  as {owner}" for path, owner in self.owners if path not in self.values]
        return "\n".join([f"Stats of {len(lines)} weights", *lines])

    @property
    def paths(self) -> list[Path]:
        """Every weight that has statistics."""
        return [*self.values, *(path for path, _ in self.owners if path not in self.values)]

    def owner(self, path: Path) -> Path:
        """The path that holds a weight's input statistics, maybe those of several weights."""
        return dict(self.owners).get(path, path)

    def get(self, path: Path, name: Statistic) -> jax.Array | None:
        """One statistic of one weight, or None."""
        own = name in GRADIENT_STATISTICS or name == "examples"
        owner = path if own else self.owner(path)
        entry = self.values.get(owner, {})
        if name == "second_moment" and name not in entry and "gram" in entry:
            return jnp.diagonal(entry["gram"], axis1=-2, axis2=-1)
        return entry.get(name)

    def feature_groups(self, path: Path, stack: tuple[int, ...]) -> int:
        """Feature groups of the convolution that a kernel belongs to; 1 for other weights.

        Args:
          path: The weight.
          stack: Lengths of its own stack axes.
        """
        axes = self.layout.get(path)
        if axes is None or axes.kind != "conv":
            return 1
        for name in INPUT_STATISTICS:
            value = self.get(path, name)
            if value is not None:
                own = 0 if name == "count" else 2 if name in MATRIX_STATISTICS else 1
                grouped = len(value.shape) == len(stack) + 1 + own
                return int(value.shape[len(stack)]) if grouped else 1
        return 1

    def why_grouped(self, path: Path, stack: tuple[int, ...]) -> str | None:
        """What to say where outputs should share one input and feature groups have their own."""
        groups = self.feature_groups(path, stack)
        if groups == 1:
            return None
        return (
            f"{path!r}: the model convolves with it in {groups} feature groups, each with inputs "
            "of its own, but this method, as it is set, takes one input for all outputs. Choose "
            "quantize.gptq to integers, which goes by groups, or quantize.int8_static, which reads "
            "ranges only, or what reads no data, such as quantize.round_to_nearest; or leave this "
            "weight out with `partition`."
        )

    def of_tied(self, representative: Mapping[Path, Path]) -> Stats:
        """The statistics of weights of which some are one array: sums over all its uses.

        Args:
          representative: For every path the one that stands for its array.

        Returns:
          Statistics in which those of a path that stands for others are of all of them.

        Raises:
          ValueError: If two of an array's uses contract other axes of it.
        """
        groups: dict[Path, list[Path]] = {}
        for path in self.paths:
            if path in representative:
                groups.setdefault(representative[path], []).append(path)
        groups = {first: paths for first, paths in groups.items() if paths != [first]}
        if not groups:
            return self
        fail("apply", [line for paths in groups.values() for line in self._contracted_apart(paths)])
        # Who only reads the same input as one of an array's uses keeps what it has.
        apart = {p for p, owner in self.owners if owner in groups or p in groups}
        values = {**self.values, **{path: self._all_of(path) for path in apart}}
        for first, paths in groups.items():
            values[first] = functools.reduce(_together, map(self._all_of, paths))
        kept = tuple((path, owner) for path, owner in self.owners if path not in apart)
        return dataclasses.replace(self, values=values, owners=kept)

    def _contracted_apart(self, paths: list[Path]) -> list[str]:
        """A complaint if the uses of one array contract other axes of it."""
        seen = {path: self.layout[path].inputs for path in paths if path in self.layout}
        if len(set(seen.values())) < 2:
            counts = {path: self.get(path, "count") for path in paths}
            shapes = {path: x.shape for path, x in counts.items() if x is not None}
            if len(set(shapes.values())) < 2:
                return []
            return [
                f"{paths[0]!r}: is one array with {paths[1:]}, but the model convolves with it in "
                f"other feature groups: counts have the shapes {shapes}. No statistics serve both. "
                "Give the tree a copy of its own at one path, such as jnp.copy(leaf), and "
                "calibrate that."
            ]
        uses = ", ".join(f"{inputs} at {path!r}" for path, inputs in seen.items())
        return [
            f"{paths[0]!r}: is one array with {paths[1:]}, but the model contracts other axes of "
            f"it: {uses}. No statistics serve both. Give the tree a copy of its own at one path, "
            "such as jnp.copy(leaf), and calibrate that."
        ]

    def _all_of(self, path: Path) -> dict[Statistic, jax.Array]:
        """Every statistic of one weight."""
        names = [*self.values.get(self.owner(path), {}), *self.values.get(path, {})]
        found = {name: self.get(path, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def why_missing(self, path: Path, name: Statistic) -> str:
        """The sentence that an error needs when `get` gave None."""
        if path in self.paths:
            has = sorted(set(self.values.get(dict(self.owners).get(path, path), {})))
            return (
                f"{path!r}: the statistic {name!r} is missing; collected were {has}. "
                "Calibrate with needs=tx.needs(params)."
            )
        return (
            f"{path!r}: the statistic {name!r} is missing; no statistics of this weight were "
            f"collected. The nearest paths that have some: {nearest(path, self.paths)}. Calibrate "
            "this model with needs=tx.needs(params), or leave the weight out with `partition`."
        )

    def why_other_axes(self, path: Path, inputs: tuple[int, ...]) -> str | None:
        """What to say where a layout has other input axes than statistics are of; None if not."""
        seen = self.layout.get(path)
        if seen is None or seen.inputs == tuple(inputs):
            return None
        return (
            f"{path!r}: its statistics are those of the input axes {seen.inputs}, but the layout "
            f"says that its inputs are {tuple(inputs)}. Leave layout out, which the statistics "
            "bring along, or pass it to `calibrate` as well."
        )

    def __add__(self, other: Stats) -> Stats:
        """Statistics of both sets of data together."""
        return merge_stats(self, other)


def _show(value: Any) -> str:
    if not hasattr(value, "dtype"):
        return repr(value)
    return show_array(value) if value.shape else str(value)


def combine(name: Statistic, first: jax.Array, second: jax.Array) -> jax.Array:
    """Joins one statistic of two sets of data."""
    if name == "min":
        return jnp.minimum(first, second)
    if name == "max":
        return jnp.maximum(first, second)
    return first + second


def _together(
    first: dict[Statistic, jax.Array], second: dict[Statistic, jax.Array]
) -> dict[Statistic, jax.Array]:
    """Statistics of two uses of one array on the same examples."""
    return {
        name: value if name == "examples" else combine(name, value, second[name])
        for name, value in first.items()
        if name in second
    }


def merge_stats(first: Stats, second: Stats) -> Stats:
    """Adds statistics of two disjoint sets of data, leaf by leaf.

    Args:
      first: Statistics of one part.
      second: Statistics of the other, of the same model and needs.

    Returns:
      Statistics of the whole.

    Raises:
      ValueError: If they are statistics of different models or of different needs.

    Example:
      >>> import jaxweights as jw
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> needs = {"kernel": frozenset({"second_moment"})}
      >>> part = lambda x: jw.calibrate(lambda p, x: x @ p["kernel"], params, [x], needs=needs)
      >>> whole = merge_stats(part(jnp.ones((4, 2))), part(2 * jnp.ones((3, 2))))
      >>> whole.get("kernel", "second_moment")
      Array([16., 16.], dtype=float32)
    """
    keys = lambda stats: {(p, n) for p, entry in stats.values.items() for n in entry}  # noqa: E731
    if keys(first) != keys(second) or first.owners != second.owners:
        odd = sorted(f"{p}: {n}" for p, n in keys(first) ^ keys(second))
        raise ValueError(
            f"core.merge_stats: {odd[:5]}: collected on one side only, or shared differently. "
            "Merge statistics of the same model, collected for the same needs."
        )
    fail(
        "core.merge_stats",
        [
            f"{path!r}: the statistic {name!r} has shape {value.shape} on one side and "
            f"{second.values[path][name].shape} on the other. Merge statistics of the same model."
            for path, entry in first.values.items()
            for name, value in entry.items()
            if value.shape != second.values[path][name].shape
        ],
    )
    values = {
        path: {
            name: combine(name, value, second.values[path][name]) for name, value in entry.items()
        }
        for path, entry in first.values.items()
    }
    return dataclasses.replace(first, values=values)


def union_needs(parts: Iterable[Mapping[Path, frozenset[Statistic]]]) -> Needs:
    """Statistics that any of the parts needs, per path."""
    total: dict[Path, frozenset[Any]] = {}
    for needs in parts:
        for path, names in needs.items():
            total[path] = total.get(path, frozenset()) | names
    return total
