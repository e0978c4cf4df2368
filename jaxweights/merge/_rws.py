"""Robust Weight Signatures: what robust training changes in shallow layers, to add and remove."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core._apply import LayoutLike, apply, resolve_layout
from jaxweights.core._context import Context
from jaxweights.core._layout import Layout, is_float
from jaxweights.core._partition import partition
from jaxweights.core._paths import (
    Flat,
    Params,
    Path,
    check_pattern,
    fail,
    flatten,
    matching,
    nearest,
    unflatten,
)
from jaxweights.merge._models import check_weights, compute_dtype, label, per_model, require_models
from jaxweights.merge._stacks import stack_axes
from jaxweights.weights._axes import Axes
from jaxweights.weights._weight import materialize

_EXTRACT, _ADD = "merge.extract_signature", "merge.add_signatures"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Signature:
    """A robust update of some leaves, dense or quantized; a pytree.

    Args:
      values: By path: float32 in the leaf's shape, or a `Quantized` `(*stack, entries, 1)`. Of
        a stacked leaf it may be the leading layers only.
      shapes: Pairs of path and shape of the update.
      stacks: Pairs of path and number of leading axes that are stacked layers.
    """

    values: dict[Path, Any]
    shapes: tuple[tuple[Path, tuple[int, ...]], ...] = dataclasses.field(metadata={"static": True})
    stacks: tuple[tuple[Path, int], ...] = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self.values))

    def dense(self) -> dict[Path, jax.Array]:
        """The updates as arrays in the shapes of their leaves."""
        return {p: materialize(self.values[p]).reshape(shape) for p, shape in self.shapes}


def extract_signature(
    pretrained: Params,
    clean: Params,
    robust: Params,
    *,
    layers: Sequence[str],
    keep: int | None = None,
    depth: int | None = None,
    layout: LayoutLike = None,
) -> Signature:
    r"""Takes the part of a robust update that clean fine-tuning does not make.

    With the clean update :math:`d = \theta_c - \theta_p` and the robust one
    :math:`v = \theta_r - \theta_p` of each leaf, the signature is the component of v orthogonal to
    d, :math:`v - \frac{\langle v, d\rangle}{\langle d, d\rangle} d`. Stacked layers are taken one
    by one.

    Args:
      pretrained: The model that both were tuned from.
      clean: The model tuned on clean data.
      robust: The model tuned on the same data under one kind of corruption.
      layers: Patterns of the layers' leaves, shallow first; a tree does not know its order.
      keep: How many of `layers` are kept, from the first; None keeps all of them.
      depth: How many leading layers of stacked leaves are kept; None keeps all.
      layout: As in `apply`, to tell stacked axes.

    Returns:
      The signature. A leaf that clean fine-tuning did not change has v itself, with a warning.

    Raises:
      ValueError: If a pattern matches nothing, or the models do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> p, c = {"conv1": jnp.zeros(2)}, {"conv1": jnp.array([1.0, 0.0])}
      >>> r = {"conv1": jnp.array([3.0, 5.0])}
      >>> extract_signature(p, c, r, layers=["conv1"]).values["conv1"]
      Array([0., 5.], dtype=float32)

    Source: Cai et al. 2023, Robust weight signatures, arXiv:2302.12480, equation 2.
    """
    if keep is not None and not 0 < keep <= len(layers):
        raise ValueError(f"{_EXTRACT}: keep={keep} must lie in [1, {len(layers)}], as many layers.")
    if depth is not None and depth < 1:
        raise ValueError(f"{_EXTRACT}: depth={depth} must be at least 1.")
    flat = {path: leaf for path, leaf in flatten(pretrained)[0].items() if is_float(leaf)}
    chosen = {path: flat[path] for path in _chosen(list(flat), layers, keep)}
    trees = tuple(flatten(tree)[0] for tree in (clean, robust))
    context = Context(models=trees)
    trees = require_models(_EXTRACT, chosen, context, ("clean", "robust"), delta=False)
    stacks = stack_axes(_EXTRACT, chosen, resolve_layout(pretrained, layout))
    values, unmoved = {}, []
    for path in chosen:
        leading = sum(i == axis for i, axis in enumerate(stacks[path]))
        leaves = [jnp.asarray(tree[path]) for tree in (chosen, *trees)]
        before, after, changed = [x[:depth] for x in leaves] if leading else leaves
        values[path], moved = _orthogonal_part(before, after, changed, leading)
        if not isinstance(moved, Tracer) and not np.all(moved):
            unmoved.append(path)
        stacks[path] = tuple(range(leading))
    if unmoved:
        warnings.warn(
            f"{_EXTRACT}: clean fine-tuning did not change {unmoved[:5]}, so that the signature "
            "there is the whole robust update.",
            stacklevel=2,
        )
    return Signature(
        values,
        tuple((path, value.shape) for path, value in values.items()),
        tuple((path, len(stacks[path])) for path in values),
    )


def quantize_signature(signature: Signature, *, bits: int, grid: Any = "affine") -> Signature:
    """Stores a signature in integers, one scale per leaf and stacked layer.

    Args:
      signature: A dense signature.
      bits: Bits per entry, 2 to 8.
      grid: As in `quantize.round_to_nearest`; `"affine"` spans the range from the smallest to the
        largest entry, and 0.

    Returns:
      The signature, whose entries are off by half a step at most.

    Raises:
      ValueError: If it is quantized already, or a setting is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> p, c = {"conv1": jnp.zeros(2)}, {"conv1": jnp.array([1.0, 0.0])}
      >>> found = extract_signature(p, c, {"conv1": jnp.array([3.0, 5.0])}, layers=["conv1"])
      >>> quantize_signature(found, bits=4).dense()["conv1"]
      Array([0., 5.], dtype=float32)
    """
    from jaxweights.quantize import round_to_nearest

    leading = dict(signature.stacks)
    columns = {
        path: value.reshape(*value.shape[: leading[path]], -1, 1)
        if isinstance(value, jax.Array | np.ndarray)
        else value
        for path, value in signature.values.items()
    }
    tx = partition((".*", round_to_nearest(bits=bits, group_size="tensor", grid=grid)))
    layout = Layout.of(dict.fromkeys(columns, Axes()), traced=True)
    return dataclasses.replace(signature, values=apply(tx, columns, layout=layout))


def add_signatures(
    params: Params, signatures: Sequence[Signature], *, weights: Any = None
) -> Params:
    """Adds signatures to a model, which may be another one of the same architecture.

    Keep `signature_leaves(params, signatures)` to take them away again: floating-point numbers do
    not return by subtraction.

    Args:
      params: The model.
      signatures: One per kind of corruption.
      weights: One number per signature; None gives each its share of 1.

    Returns:
      The model, in its own dtypes; leaves without a signature are the same objects.

    Raises:
      ValueError: If a leaf of a signature is not in the model, or has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> p, c = {"conv1": jnp.zeros(2)}, {"conv1": jnp.array([1.0, 0.0])}
      >>> found = extract_signature(p, c, {"conv1": jnp.array([3.0, 5.0])}, layers=["conv1"])
      >>> add_signatures(c, [found])["conv1"]
      Array([1., 5.], dtype=float32)
    """
    flat, structure = flatten(params)
    _require_fit(flat, signatures)
    weights = check_weights(_ADD, weights, normalize=False)
    if weights is None:
        weights = np.full(len(signatures), 1 / max(len(signatures), 1))
    weights = per_model(_ADD, "weights", weights, len(signatures))
    updates: dict[Path, jax.Array] = {}
    for weight, signature in zip(weights, signatures, strict=True):
        for path, value in signature.dense().items():
            update = jnp.asarray(weight, jnp.float32) * value.astype(jnp.float32)
            updates[path] = _sum(updates[path], update) if path in updates else update
    new = dict(flat)
    for path, update in updates.items():
        leaf = jnp.asarray(flat[path])
        dtype = compute_dtype(leaf)
        moved = _leading(leaf, update.shape).astype(dtype) + update.astype(dtype)
        new[path] = _put(leaf, moved.astype(leaf.dtype))
    return unflatten(structure, new)


def signature_leaves(params: Params, signatures: Sequence[Signature]) -> dict[Path, jax.Array]:
    """The leaves, or their leading layers, that adding signatures would change.

    Args:
      params: The model before anything is added.
      signatures: The signatures that will be.

    Returns:
      Values by path: a small tree to keep, or to save beside the model, for `restore_leaves`.

    Raises:
      ValueError: If a leaf of a signature is not in the model, or has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> found = Signature({"conv1": jnp.ones(2)}, (("conv1", (2,)),), (("conv1", 0),))
      >>> signature_leaves({"conv1": jnp.zeros(2), "conv2": jnp.zeros(2)}, [found])
      {'conv1': Array([0., 0.], dtype=float32)}
    """
    flat, _ = flatten(params)
    _require_fit(flat, signatures)
    shapes: dict[Path, tuple[int, ...]] = {}
    for signature in signatures:
        for path, shape in signature.shapes:
            shapes[path] = max(shape, shapes.get(path, shape))  # they differ in depth only
    return {path: _leading(jnp.asarray(flat[path]), shape) for path, shape in shapes.items()}


def restore_leaves(params: Params, leaves: dict[Path, jax.Array]) -> Params:
    """Puts kept leaves back, bit for bit.

    Args:
      params: The model with signatures in it.
      leaves: From `signature_leaves` of the model before.

    Returns:
      The model; leaves that were not kept are the same objects.

    Raises:
      ValueError: If a leaf does not fit the model.

    Example:
      >>> import jax.numpy as jnp
      >>> restore_leaves({"conv1": jnp.ones(2)}, {"conv1": jnp.zeros(2)})
      {'conv1': Array([0., 0.], dtype=float32)}
    """
    flat, structure = flatten(params)
    problems = [
        f"{path!r}: is {getattr(flat.get(path), 'dtype', 'missing')} of shape "
        f"{np.shape(flat.get(path, ()))} in the model, but {leaf.dtype} of shape {leaf.shape} was "
        "kept. Restore the model that the leaves were kept of."
        for path, leaf in leaves.items()
        if path not in flat
        or flat[path].dtype != leaf.dtype
        or not _fits(leaf.shape, np.shape(flat[path]))
    ]
    fail("merge.restore_leaves", problems)
    restored = {path: _put(jnp.asarray(flat[path]), leaf) for path, leaf in leaves.items()}
    return unflatten(structure, flat | restored)


def _chosen(paths: list[Path], layers: Sequence[str], keep: int | None) -> list[Path]:
    if isinstance(layers, str) or not len(layers):
        raise ValueError(
            f"{_EXTRACT}: layers={layers!r} must be a list of patterns, shallow layers first."
        )
    found: list[Path] = []
    problems = []
    for pattern in layers:
        check_pattern(_EXTRACT, pattern)
        matched = matching(pattern, paths)
        if not matched:
            problems.append(
                f"pattern {pattern!r} matches no floating leaf. The nearest paths: "
                f"{nearest(pattern, paths)}."
            )
    fail(_EXTRACT, problems)
    for pattern in layers[:keep]:
        found += [path for path in matching(pattern, paths) if path not in found]
    return found


def _orthogonal_part(
    pretrained: Any, clean: Any, robust: Any, leading: int
) -> tuple[jax.Array, jax.Array]:
    """The robust update without its component along the clean one, and where there is one."""
    start = pretrained.astype(jnp.float32)
    axes = tuple(range(leading, start.ndim))
    along, update = clean.astype(jnp.float32) - start, robust.astype(jnp.float32) - start
    largest = jnp.max(jnp.abs(along), axis=axes, keepdims=True, initial=0)
    # Squares of small deltas would underflow; a power of two scales without rounding, so that the
    # signature of the clean model itself is exactly zero.
    unit = along / jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1])
    size = jnp.sum(unit * unit, axis=axes, keepdims=True)
    for _ in range(2):  # the second pass takes away what the rounding of the first left
        share = jnp.sum(update * unit, axis=axes, keepdims=True) / jnp.where(size > 0, size, 1)
        update = update - share * unit
    return update, largest > 0


def _require_fit(flat: Flat, signatures: Sequence[Signature]) -> None:
    problems = []
    if not len(signatures):
        raise ValueError(f"{_ADD}: signatures is empty. Pass at least one.")
    for i, signature in enumerate(signatures):
        whose = label(None, i).replace("models", "signatures")
        for path, shape in signature.shapes:
            if path not in flat:
                near = nearest(path, flat)
                problems.append(f"{path!r}: of {whose} is not in the model. Nearest: {near}.")
            elif not is_float(flat[path]) or not _fits(shape, np.shape(flat[path])):
                problems.append(
                    f"{path!r}: is {shape} in {whose} but {np.shape(flat[path])} in the model. The "
                    "architectures must be the same."
                )
    fail(_ADD, problems)


def _fits(shape: tuple[int, ...], leaf: tuple[int, ...]) -> bool:
    """Whether a part is the whole of a leaf, or its leading layers."""
    if shape == leaf:
        return True
    return len(shape) == len(leaf) > 1 and shape[1:] == leaf[1:] and shape[0] < leaf[0]


def _leading(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return leaf if leaf.shape == shape else leaf[: shape[0]]


def _put(leaf: jax.Array, part: jax.Array) -> jax.Array:
    return part if leaf.shape == part.shape else leaf.at[: part.shape[0]].set(part)


def _sum(first: jax.Array, second: jax.Array) -> jax.Array:
    """Sum of two updates, of which one may be of fewer layers."""
    if math.prod(first.shape) < math.prod(second.shape):
        first, second = second, first
    return _put(first, _leading(first, second.shape) + second)
