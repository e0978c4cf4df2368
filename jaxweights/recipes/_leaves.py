"""What a run did to each leaf: error, size, zeros, and why some were left alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._layout import Layout, is_default_target, is_float, is_vector
from jaxweights.core._paths import Path, flatten, matching
from jaxweights.core._plan import describe_leaf, leaf_bytes
from jaxweights.recipes._recipe import Recipe
from jaxweights.weights._axes import View
from jaxweights.weights._weight import materialize

_SPECTRA = 9  # panels of the report's figure


@dataclasses.dataclass(frozen=True)
class LeafResult:
    """What became of one leaf.

    Attributes:
      path: Its path in the tree.
      shape: Shape of the dense leaf.
      parameters: Its entries.
      bytes_before: Bytes of its arrays before.
      bytes_after: Bytes of its arrays after.
      representation: What it is after, such as `Masked(Quantized(bits=4))`; `dense` for an array.
      changed: Whether a step changed it.
      why: Why no step did; empty if one did.
      zeros: Share of its entries that are zero after.
      errors: Relative Frobenius error of each matrix of its stack, `|after - before| / |before|`.
    """

    path: Path
    shape: tuple[int, ...]
    parameters: int
    bytes_before: int
    bytes_after: int
    representation: str
    changed: bool
    why: str
    zeros: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Root mean square of the errors over the stack."""
        return float(np.sqrt(np.mean(np.square(self.errors)))) if self.errors else 0.0


def compare_leaves(
    before: Any, after: Any, layout: Layout, recipe: Recipe
) -> tuple[LeafResult, ...]:
    """Compares two trees leaf by leaf, holding one dense leaf of each at a time.

    Args:
      before: The tree before the run.
      after: The tree after it, with represented weights.
      layout: Axes of the leaves.
      recipe: What was run, for the reasons.

    Returns:
      One result a leaf, in tree order.
    """
    old, new = flatten(before)[0], flatten(after)[0]
    results = []
    for path, leaf in old.items():
        changed = new[path] is not leaf
        axes = layout.get(path)
        errors, zeros = (), 0.0
        if changed:
            view = None if axes is None else View.of(leaf.shape, axes)
            found, zero = difference(leaf, new[path], view)
            errors, zeros = tuple(np.asarray(found, float).ravel().tolist()), float(zero)
        results.append(
            LeafResult(
                path=path,
                shape=tuple(leaf.shape),
                parameters=int(np.prod(leaf.shape, dtype=np.int64)),
                bytes_before=leaf_bytes(leaf),
                bytes_after=leaf_bytes(new[path]),
                representation=describe_leaf(new[path]),
                changed=changed,
                why="" if changed else why_left(path, leaf, layout, recipe),
                zeros=zeros,
                errors=errors,
            )
        )
    return tuple(results)


@functools.partial(jax.jit, static_argnames=("view",))
def difference(before: Any, after: Any, view: View | None) -> tuple[jax.Array, jax.Array]:
    """Relative error of each matrix of the stack, and the share of zeros."""
    old, new = materialize(before), materialize(after)
    zeros = jnp.mean(new == 0)
    old, new = old.astype(jnp.float32), new.astype(jnp.float32)
    if view is None:
        old, new = old.reshape(1, -1), new.reshape(1, -1)
    else:
        old, new = view.to_matrix(old), view.to_matrix(new)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1)))  # noqa: E731
    whole = norm(old)
    return jnp.where(whole > 0, norm(new - old) / jnp.where(whole > 0, whole, 1.0), 0.0), zeros


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, tied ones once."""
    unique = {id(leaf): leaf_bytes(leaf) for leaf in flatten(tree)[0].values()}
    return sum(unique.values())


def why_left(path: Path, leaf: Any, layout: Layout, recipe: Recipe) -> str:
    """Why no step changed a leaf."""
    if not is_float(leaf):
        return f"holds {leaf.dtype}, not real numbers"
    exempt = [p for step in recipe.steps for p in step.exempt if matching(p, [path])]
    if exempt:
        return f"excepted by the recipe: {exempt[0]}"
    if all(step.match for step in recipe.steps):
        return "no step's `match` names it"
    axes = layout.get(path)
    if is_vector(path, leaf) or (axes is None and layout.traced):
        return "a vector (bias or norm) or otherwise never multiplied as a matrix"
    if axes is not None and axes.kind == "embedding":
        return "an embedding: left alone unless a `match` names it"
    if not is_default_target(path):
        return "an embedding, head, router or norm: left alone unless a `match` names it"
    return "the methods had nothing to change in it"


def error_grid(leaves: tuple[LeafResult, ...]) -> dict[str, tuple[float, ...]]:
    """Errors by layer, by kind of matrix, of the leaves that were changed."""
    return {short_name(leaf.path): leaf.errors for leaf in leaves if leaf.changed and leaf.errors}


def short_name(path: Path) -> str:
    """The part of a path that tells matrices of one layer apart."""
    parts = [part for part in path.split("/") if part not in ("kernel", "value", "layers")]
    return "/".join(parts[-2:]) or path


def spectra(
    before: Any, after: Any, layout: Layout, leaves: tuple[LeafResult, ...]
) -> dict[str, tuple[list[float], list[float]]]:
    """Singular values before and after, of the middle matrix of each changed stack.

    Args:
      before: The tree before.
      after: The tree after.
      layout: Axes of the leaves.
      leaves: What became of each leaf.

    Returns:
      Values before and after, descending, by a name for the figure; nine at most, those with the
      largest error.
    """
    old, new = flatten(before)[0], flatten(after)[0]
    candidates = [leaf for leaf in leaves if leaf.changed and leaf.path in layout]
    found = {}
    for leaf in worst_leaves(candidates):
        view = View.of(leaf.shape, layout[leaf.path])
        found[spectra_name(leaf, view)] = tuple(
            singular_values(tree[leaf.path], view) for tree in (old, new)
        )
    return found


def worst_leaves(candidates: list[LeafResult]) -> list[LeafResult]:
    """Those with the largest errors, in the order of the tree."""
    chosen = sorted(candidates, key=lambda leaf: -leaf.error)[:_SPECTRA]
    return [leaf for leaf in candidates if leaf in chosen]


def spectra_name(leaf: LeafResult, view: View) -> str:
    """What a figure calls the middle matrix of a leaf."""
    is_stacked = bool(view.stack_axes(len(leaf.shape)))
    return short_name(leaf.path) + (f", layer {leaf.shape[0] // 2}" if is_stacked else "")


def singular_values(leaf: Any, view: View) -> list[float]:
    """Singular values of the middle matrix of a stack, descending, good to 1e-8 of the largest.

    The eigenvalues of the smaller Gram matrix cost a small part of an SVD, and a figure shows no
    more.
    """
    matrix = view.to_matrix(materialize(leaf))
    while matrix.ndim > 2:
        matrix = matrix[matrix.shape[0] // 2]
    matrix = np.asarray(matrix, np.float32)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide.astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(wide @ wide.T)[::-1]
    return np.sqrt(np.maximum(eigenvalues, 0.0)).tolist()


def provenance_errors(leaves: tuple[LeafResult, ...]) -> Mapping[str, Mapping[str, float]]:
    """Errors as provenance keeps them."""
    return {leaf.path: {"relative_error": leaf.error} for leaf in leaves if leaf.changed}
