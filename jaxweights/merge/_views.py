"""Which leaves a merge treats as matrices, and how."""

from __future__ import annotations

from jaxweights.core._layout import Layout
from jaxweights.core._paths import Flat, Path
from jaxweights.merge._stacks import stack_axes
from jaxweights.weights._axes import View


def matrix_views(name: str, flat: Flat, layout: Layout, *, named: bool) -> dict[Path, View]:
    """Views of the leaves that are matrices; biases, norms and embedding tables have none.

    Args:
      name: What errors call the transform.
      flat: The floating leaves.
      layout: Axes of the matrices.
      named: Whether a rule named these leaves; then embedding tables are matrices too.

    Returns:
      Views by path.

    Raises:
      ValueError: If a leaf of rank 3 or more has axes neither in the layout nor by convention.
    """
    stack_axes(name, flat, layout)
    return {
        path: View.of(leaf.shape, layout[path])
        for path, leaf in flat.items()
        if path in layout and (named or layout[path].kind != "embedding") and leaf.size
    }
