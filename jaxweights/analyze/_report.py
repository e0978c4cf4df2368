"""Report: results by path, and why the other leaves have none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax

from jaxweights.core._layout import Layout, is_float, is_vector
from jaxweights.core._paths import Flat, Path, check_pattern, matching, nearest

T = TypeVar("T")
Select = str | Callable[[Path], bool] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report(Mapping[Path, T], Generic[T]):
    """A mapping from path to result that also says which leaves were skipped; a pytree.

    Args:
      results: Results by path.
      reasons: Pairs of path and reason for leaves without a result.
    """

    results: dict[Path, T]
    reasons: tuple[tuple[Path, str], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def skipped(self) -> dict[Path, str]:
        """Why the leaves without a result have none."""
        return dict(self.reasons)

    def __getitem__(self, path: Path) -> T:
        """Result of a leaf."""
        if path not in self.results and path in self.skipped:
            raise KeyError(f"{path!r} was skipped: {self.skipped[path]}.")
        return self.results[path]

    def __iter__(self) -> Iterator[Path]:
        """Paths, in tree order."""
        return iter(self.results)

    def __len__(self) -> int:
        """Number of results."""
        return len(self.results)


def selected(name: str, flat: Flat, select: Select) -> list[Path]:
    """The paths that a pattern or predicate names.

    Args:
      name: What errors call the function.
      flat: The tree.
      select: Regular expression for the whole path, predicate, or None for all.

    Returns:
      Paths, in tree order.

    Raises:
      ValueError: If none is named.
    """
    if select is None:
        return list(flat)
    if isinstance(select, str):
        check_pattern(name, select)
        paths = matching(select, flat)
        what = f"select={select!r} matches no leaf. The nearest paths: {nearest(select, flat)}."
    else:
        paths = [path for path in flat if select(path)]
        what = f"select names no leaf. The first paths: {list(flat)[:5]}."
    if not paths:
        raise ValueError(f"{name}: {what}")
    return paths


def why_no_matrix(path: Path, leaf: Any, layout: Layout) -> str | None:
    """Why a leaf has no singular values; None if it has."""
    if not is_float(leaf):
        return f"is {getattr(leaf, 'dtype', type(leaf).__name__)}, not floating"
    if path in layout:
        return None
    shape = tuple(leaf.shape)
    if len(shape) < 2:
        return f"has shape {shape}, which is no matrix"
    if reason := dict(layout.unclear).get(path):
        return reason
    if layout.traced:
        return "the traced model never multiplies it with activations"
    if is_vector(path, leaf):
        return "is a bias or norm by its name"
    return (
        f"has shape {shape}; which axes are inputs and outputs is ambiguous. Pass "
        f"layout=infer_layout(fn, params, *inputs) or layout={{{path!r}: Axes(inputs=..., "
        "outputs=...)}"
    )
