"""How alike every unit of one model is to every unit of another: one large product a leaf."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.align._permute import on_host
from jaxweights.align._spec import Factor, PermutationSpec
from jaxweights.core._layout import is_float
from jaxweights.core._paths import Path
from jaxweights.merge._models import compute_dtype

# Matrices of a stack that together take more than this are computed one by one, so that memory
# holds a few of them, and their assignments are solved while the next is computed.
_AT_ONCE = 2**22  # entries


class Term(NamedTuple):
    """What one leaf adds; the same for all leaves that look alike.

    Attributes:
      shape: Shape in which every named part of an axis is an axis of its own.
      ours: Label of each of these axes in the first model.
      theirs: Label in the second.
    """

    shape: tuple[int, ...]
    ours: str
    theirs: str


class Similarity:
    """Sum over leaves of ⟨unit i of A, unit j of B⟩, for every pair of units of a permutation.

    Args:
      spec: Names the axes.
      units: The permutation; or two, the second of which differs along the first: then a unit is
        an entry of both, and the matrices are `(n₁, n₁, n₂, n₂)`.
      flat: A tree, for its shapes and dtypes.
      paths: The leaves that count; None takes all that the permutation moves.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        units: Sequence[str],
        flat: Mapping[Path, Any],
        paths: Sequence[Path] | None = None,
    ) -> None:
        over = spec.over.get(units[0], ())
        sizes = [spec.sizes[name] for name in units for _ in range(2)]
        self.shape = (*spec.shape_of(units[0])[:-1], *sizes)
        everything = spec.leaves_of(units[0]) if paths is None else paths
        self.paths = [path for path in everything if path in flat and is_float(flat[path])]
        self.terms = tuple(
            _term([f for axis in spec.factors(path, flat[path].shape) for f in axis], units, over)
            for path in self.paths
        )
        self.out = "ABCDEFGH"[: len(over)] + "WXYZ"[: len(sizes)]

    @property
    def stacked(self) -> bool:
        """Whether the permutation differs along something."""
        return self.out[0] == "A"

    @property
    def large(self) -> bool:
        """Whether the matrices are better computed one by one."""
        return self.stacked and math.prod(self.shape) > _AT_ONCE

    def at(self, ours: Mapping[Path, Any], theirs: Mapping[Path, Any], index: int | None) -> Any:
        """Matrices `(*stack, n, n)`; with an index those of one entry of the first stack."""
        a, b = [ours[path] for path in self.paths], [theirs[path] for path in self.paths]
        if not a:
            return np.zeros(self.shape if index is None else self.shape[1:], np.float32)
        if index is None:
            return _similarity(a, b, None, terms=self.terms, out=self.out)
        return _similarity(a, b, np.int32(index), terms=self.terms, out=self.out[1:])

    def blocks(
        self, ours: Mapping[Path, Any], theirs: Mapping[Path, Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Places in the stack and the matrices there: all at once, or one by one."""
        for i in range(self.shape[0]) if self.large else (None,):
            yield (... if i is None else i), self.at(ours, theirs, i)


def _term(factors: Sequence[Factor], units: Sequence[str], over: Sequence[str]) -> Term:
    ours, theirs = "", ""
    for i, factor in enumerate(factors):
        if factor.name in units:
            place = 2 * units.index(factor.name)
            ours, theirs = ours + "WXYZ"[place], theirs + "WXYZ"[place + 1]
        else:
            same = "ABCDEFGH"[over.index(factor.name)] if factor.name in over else chr(97 + i)
            ours, theirs = ours + same, theirs + same
    return Term(tuple(factor.size for factor in factors), ours, theirs)


@functools.partial(jax.jit, static_argnames=("terms", "out"))
def _similarity(
    ours: list[jax.Array],
    theirs: list[jax.Array],
    index: jax.Array | None,
    *,
    terms: tuple[Term, ...],
    out: str,
) -> jax.Array:
    """Sum of the products; `index` picks one entry of the first stack, labelled A."""
    total = None
    for a, b, term in zip(ours, theirs, terms, strict=True):
        dtype = compute_dtype(a)
        a, b, term = _at(a, b, index, term)
        product = jnp.einsum(
            f"{term.ours},{term.theirs}->{out}",
            a.astype(dtype),
            b.astype(dtype),
            precision="highest",
            preferred_element_type=dtype,
        )
        total = product if total is None else total + product.astype(total.dtype)
    assert total is not None
    return total


def _at(
    a: jax.Array, b: jax.Array, index: jax.Array | None, term: Term
) -> tuple[jax.Array, jax.Array, Term]:
    a, b = a.reshape(term.shape), b.reshape(term.shape)
    if index is None:
        return a, b, term
    axis = term.ours.index("A")
    a = jax.lax.dynamic_index_in_dim(a, index, axis, keepdims=False)
    b = jax.lax.dynamic_index_in_dim(b, index, axis, keepdims=False)
    return a, b, Term(a.shape, term.ours.replace("A", ""), term.theirs.replace("A", ""))


def inner_products(
    spec: PermutationSpec,
    over: Sequence[str],
    ours: Mapping[Path, Any],
    theirs: Mapping[Path, Any],
) -> np.ndarray:
    """Sum over the floating leaves of `theirs` of ⟨A, B⟩ at every place of a stack."""
    paths = [path for path, leaf in theirs.items() if is_float(leaf)]
    if not paths:
        return np.zeros([spec.length(name) for name in over])
    terms = tuple(
        _term([f for axis in spec.factors(path, ours[path].shape) for f in axis], (), over)
        for path in paths
    )
    a, b = [ours[path] for path in paths], [theirs[path] for path in paths]
    total = _similarity(a, b, None, terms=terms, out="ABCDEFGH"[: len(over)])
    return np.asarray(total, np.float64)


def inner_product(ours: Mapping[Path, Any], theirs: Mapping[Path, Any]) -> float:
    """Sum over the floating leaves of ⟨A, B⟩."""
    paths = [path for path, leaf in ours.items() if is_float(leaf)]
    return float(sum(np.asarray(_dot(ours[p], theirs[p]), np.float64) for p in paths))


def _dot(a: Any, b: Any) -> Any:
    dtype = compute_dtype(a)
    if on_host(a, b) and on_host(b):
        wide = [np.asarray(x).astype(dtype, copy=False).reshape(-1) for x in (a, b)]
        with np.errstate(all="ignore"):  # whoever asks looks whether it is finite
            return np.dot(*wide)
    return _dot_on_device(a, b)


@jax.jit
def _dot_on_device(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = compute_dtype(a)
    return jnp.vdot(a.astype(dtype), b.astype(dtype), precision="highest")
