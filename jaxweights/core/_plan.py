"""plan: what a transform will do to which leaf, from shapes alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._apply import LayoutLike, resolve_layout, transform_tree
from jaxweights.core._layout import Layout
from jaxweights.core._paths import Flat, Params, Path, flatten, unflatten
from jaxweights.core._stats import GRADIENT_STATISTICS, MATRIX_STATISTICS, Needs, Stats
from jaxweights.core._transform import Transform
from jaxweights.core._untouched import why_untouched
from jaxweights.weights._axes import View
from jaxweights.weights._weight import is_weight

_DENSE = "dense"
_SETTINGS = (
    "bits",
    "group_size",
    "rank",
    "alpha",
    "order",
)  # of a representation, where it has them


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What will become of one leaf.

    Args:
      path: Its path.
      shape: Shape of the dense leaf before.
      shape_after: And after.
      dtype: Dtype of the dense leaf before.
      dtype_after: And after.
      before: Representation before: `dense`, or the class with its settings.
      after: Representation after.
      bytes_before: Bytes of its arrays; 0 where another path holds them.
      bytes_after: And after.
      changed: Whether the transform computes anything for it.
      why: Why not, where that is known; or which path it is tied to.
    """

    path: Path
    shape: tuple[int, ...]
    shape_after: tuple[int, ...]
    dtype: str
    dtype_after: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    changed: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will become of a tree. Prints as a table.

    Args:
      name: Name of the transform.
      leaves: One entry per leaf, in tree order.
      needs: Statistics that it reads, by path.
    """

    name: str
    leaves: tuple[LeafPlan, ...]
    needs: Needs

    @property
    def bytes_before(self) -> int:
        """Bytes of the tree before."""
        return sum(leaf.bytes_before for leaf in self.leaves)

    @property
    def bytes_after(self) -> int:
        """Bytes of the tree after."""
        return sum(leaf.bytes_after for leaf in self.leaves)

    @property
    def changed(self) -> tuple[LeafPlan, ...]:
        """Leaves that change."""
        return tuple(leaf for leaf in self.leaves if leaf.changed)

    def to_json(self, *, indent: int | None = None) -> str:
        """The plan as JSON.

        Args:
          indent: As in `json.dumps`.

        Returns:
          An object with `name`, `leaves`, `needs` and the totals.
        """
        content = {
            "name": self.name,
            "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves],
            "needs": {path: sorted(names) for path, names in self.needs.items()},
            "leaves_changed": len(self.changed),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }
        return json.dumps(content, indent=indent)

    def __str__(self) -> str:
        """An aligned table with a total."""
        head = ("path", "shape", "dtype", "becomes", "before", "after", "note")
        rows = [_row(leaf) for leaf in self.leaves]
        share = f"{100 * self.bytes_after / self.bytes_before:.1f} %" if self.bytes_before else ""
        total = (
            f"{len(self.changed)} of {len(self.leaves)} leaves change",
            *("",) * 3,
            _size(self.bytes_before),
            _size(self.bytes_after),
            share,
        )
        table = [head, *rows, total]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [self.name]
        for i, row in enumerate(table):
            if i in (1, len(table) - 1):
                lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
            cells = [
                cell.rjust(width) if column in (4, 5) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def plan(
    tx: Transform,
    params: Params,
    *,
    layout: LayoutLike = None,
    stats: Stats | None = None,
    models: Sequence[Params] | None = None,
) -> Plan:
    """Says what `apply` would do to which leaf, without reading any data.

    Runs the transform on shapes. A leaf that `apply` would refuse for its shape is refused here
    with the same words; what only values can tell (a NaN, a matrix that cannot be factored) is not
    seen.

    Args:
      tx: The transform.
      params: Tree of arrays, abstract arrays (`jax.ShapeDtypeStruct`) or represented weights.
      layout: As in `apply`.
      stats: As in `apply`; None stands for statistics of the right shapes.
      models: As in `apply`; they may be abstract.

    Returns:
      The plan.

    Raises:
      TypeError: If the first argument is no transform.
      ValueError: If `apply` would raise for these shapes.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"dense": {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}}
      >>> p = plan(jw.quantize.round_to_nearest(bits=8), params)
      >>> p.bytes_before, p.leaves[0].changed
      (8192, True)
    """
    if not isinstance(tx, Transform):
        raise TypeError(
            f"plan: the first argument is a {type(tx).__name__}, not a transform. Write "
            "plan(tx, params), with a transform such as quantize.round_to_nearest(bits=4)."
        )
    return plan_and_leaves(tx, params, layout=layout, stats=stats, models=models)[0]


def plan_and_leaves(
    tx: Transform,
    params: Params,
    *,
    layout: LayoutLike = None,
    stats: Stats | None = None,
    models: Sequence[Params] | None = None,
) -> tuple[Plan, Flat]:
    """`plan`, and what the leaves become, as shapes, by path."""
    flat, structure = flatten(params)
    found = resolve_layout(flat, layout, stats)
    needs = tx.needs(params)
    if stats is None and needs:
        stats = _abstract_stats(needs, flat, found)
    owners = _owners(flat)
    others = None if models is None else [flatten(model) for model in models]
    untouched: set[Path] = set()

    def run(arrays: Flat, others_arrays: list[Flat] | None, stats: Any, key: jax.Array) -> Flat:
        traced = flat | arrays
        tree = unflatten(structure, {path: traced[owners[path]] for path in flat})
        trees = None
        if others is not None and others_arrays is not None:
            parts = zip(others, others_arrays, strict=True)
            trees = [unflatten(structure, whole | own) for (whole, structure), own in parts]
        new = transform_tree(tx, tree, stats=stats, models=trees, key=key, step=0, layout=found)
        leaves = flatten(new)[0]
        # A leaf that comes back as the very same object was not touched.
        untouched.update(path for path in flat if leaves[path] is traced[owners[path]])
        # What is no array, such as a module's functions, cannot be a result of a trace.
        return {p: x for p, x in leaves.items() if hasattr(x, "dtype") or x is not flat[p]}

    new = flat | jax.eval_shape(
        run,
        {path: leaf for path, leaf in _arrays(flat).items() if owners[path] == path},
        None if others is None else [_arrays(model) for model, _ in others],
        stats,
        jax.random.key(0),
    )
    leaves = tuple(
        _leaf_plan(path, leaf, new[path], path in untouched, owners[path], found)
        for path, leaf in flat.items()
    )
    return Plan(tx.name, leaves, needs), new


def _arrays(flat: Flat) -> Flat:
    """The leaves that tracing may turn into tracers; plain numbers stay what they are."""
    return {path: leaf for path, leaf in flat.items() if hasattr(leaf, "dtype")}


def _owners(flat: Flat) -> dict[Path, Path]:
    """The first path of every array object, as `apply` ties them."""
    first: dict[int, Path] = {}
    return {
        path: path if is_weight(leaf) or not np.shape(leaf) else first.setdefault(id(leaf), path)
        for path, leaf in flat.items()
    }


def _abstract_stats(needs: Needs, flat: Flat, layout: Layout) -> Stats:
    """Statistics of the shapes that calibration would give."""
    values: dict[Path, dict[str, Any]] = {}
    for path, names in needs.items():
        if path not in layout:
            continue
        shape = tuple(flat[path].shape)
        view = View.of(shape, layout[path])
        stack = tuple(shape[a] for a in view.stack_axes(len(shape)))
        entry = {}
        for name in sorted(names):
            lengths = {"count": 0, **dict.fromkeys(MATRIX_STATISTICS, 2)}
            tail = (view.in_dim,) * lengths.get(name, 1)
            full = shape if name in GRADIENT_STATISTICS else (*stack, *tail)
            dtype = jnp.int32 if name == "count" else jnp.float32
            entry[name] = jax.ShapeDtypeStruct(full, dtype)
        values[path] = entry
    return Stats(values, layout=layout)


def _leaf_plan(
    path: Path, leaf: Any, new: Any, untouched: bool, owner: Path, layout: Layout
) -> LeafPlan:
    tied = owner != path
    why = why_untouched(path, leaf, layout) if untouched else ""
    return LeafPlan(
        path=path,
        shape=tuple(np.shape(leaf)),
        shape_after=tuple(np.shape(new)),
        dtype=_dtype(leaf),
        dtype_after=_dtype(new),
        before=describe_leaf(leaf),
        after=describe_leaf(new),
        bytes_before=0 if tied else leaf_bytes(leaf),
        bytes_after=0 if tied else leaf_bytes(new),
        changed=not untouched,
        why=f"tied to {owner}" if tied else why,
    )


def describe_leaf(leaf: Any) -> str:
    """A leaf's representation in a few words, such as `Masked(Quantized(bits=4, group_size=64))`.

    A representation that has a method `describe()` speaks for itself.

    Args:
      leaf: Array or represented weight.

    Returns:
      `dense` for an array.
    """
    if not is_weight(leaf):
        return _DENSE
    own = getattr(leaf, "describe", None)
    if callable(own):
        return str(own())
    base = getattr(leaf, "base", None)
    notes = [describe_leaf(base)] if is_weight(base) else []
    for name in _SETTINGS:
        value = getattr(leaf, name, None)
        if isinstance(value, int | float):
            notes.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
    return f"{type(leaf).__name__}({', '.join(notes)})" if notes else type(leaf).__name__


def leaf_bytes(leaf: Any) -> int:
    """Bytes of the arrays of a leaf; dtypes narrower than a byte are counted as packed.

    Args:
      leaf: Array, abstract array or represented weight.

    Returns:
      The number of bytes.
    """
    return sum(_array_bytes(x) for x in jax.tree.leaves(leaf))


def _array_bytes(x: Any) -> int:
    if not hasattr(x, "dtype"):  # numbers take what they would as arrays, functions nothing
        return jnp.asarray(x).nbytes if isinstance(x, int | float | complex) else 0
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, x)
    bits = 8 * jnp.dtype(x.dtype).itemsize
    if jnp.issubdtype(x.dtype, jnp.integer):
        bits = jnp.iinfo(x.dtype).bits
    elif jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.finfo(x.dtype).bits
    return -(-math.prod(x.shape) * bits // 8)


def _dtype(leaf: Any) -> str:
    return str(getattr(leaf, "dtype", type(leaf).__name__))


def _row(leaf: LeafPlan) -> tuple[str, ...]:
    becomes = "=" if not leaf.changed else leaf.after
    if leaf.changed and (leaf.before, leaf.after) == (_DENSE, _DENSE):
        becomes = "dense, new values"
    if leaf.shape_after != leaf.shape:
        becomes += f" {_shape(leaf.shape_after)}"
    dtype = leaf.dtype
    if leaf.dtype_after != leaf.dtype:
        dtype += f" -> {leaf.dtype_after}"
    sizes = (_size(leaf.bytes_before), _size(leaf.bytes_after))
    return (leaf.path, _shape(leaf.shape), dtype, becomes, *sizes, leaf.why)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


def _size(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
