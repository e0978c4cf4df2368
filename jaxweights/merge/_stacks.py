"""Which axes of each leaf are stacked, so that no ranking or norm mixes layers or experts."""

from __future__ import annotations

from jaxweights.core._layout import Layout, is_vector
from jaxweights.core._paths import Flat, Path, fail
from jaxweights.weights._axes import View


def stack_axes(name: str, flat: Flat, layout: Layout) -> dict[Path, tuple[int, ...]]:
    """Stack axes of every leaf: those of the layout, or of the matrix beside it.

    Biases and norms have no axes in a layout. One is stacked like the matrices nearest to it in the
    tree (those that share most of its path), as far as their lengths agree.

    Args:
      name: What errors call the transform.
      flat: The floating leaves.
      layout: Axes of the matrices.

    Returns:
      Non-negative axes by path.

    Raises:
      ValueError: If a leaf of rank 3 or more has axes neither in the layout nor by convention.
    """
    matrices = {
        path: View.of(leaf.shape, layout[path]).stack_axes(len(leaf.shape))
        for path, leaf in flat.items()
        if path in layout
    }
    prefixes = _leading_stacks(flat, matrices)
    unclear = dict(layout.unclear)
    found, problems = {}, []
    for path, leaf in flat.items():
        if path in matrices:
            found[path] = matrices[path]
        elif len(leaf.shape) < 3 or (
            path not in unclear and (layout.traced or is_vector(path, leaf))
        ):
            found[path] = _like_neighbours(path, tuple(leaf.shape), prefixes)
        else:
            note = f" ({unclear[path]})" if path in unclear else ""
            problems.append(
                f"{path!r}: has shape {tuple(leaf.shape)}; which of its axes are stacked layers, "
                f"experts or heads is ambiguous{note}. Pass layout=infer_layout(fn, params, "
                f"*inputs), or state it, for example layout={{{path!r}: Axes(inputs=(-2,), "
                "outputs=(-1,))} where the other axes are stacked."
            )
    fail(name, problems)
    return found


def _leading_stacks(
    flat: Flat, matrices: dict[Path, tuple[int, ...]]
) -> dict[Path, tuple[int, ...]]:
    """For every prefix of a path, the leading stack lengths that all matrices under it share."""
    shared: dict[Path, tuple[int, ...]] = {}
    for path, axes in matrices.items():
        leading = sum(i == axis for i, axis in enumerate(axes))
        lengths = tuple(flat[path].shape[:leading])
        prefix = path
        while "/" in prefix:
            prefix = prefix.rpartition("/")[0]
            shared[prefix] = _common(shared.get(prefix, lengths), lengths)
    return shared


def _like_neighbours(
    path: Path, shape: tuple[int, ...], prefixes: dict[Path, tuple[int, ...]]
) -> tuple[int, ...]:
    prefix = path
    while "/" in prefix:
        prefix = prefix.rpartition("/")[0]
        if prefix in prefixes:
            # One axis at least is the vector itself.
            return tuple(range(len(_common(prefixes[prefix], shape[:-1]))))
    return ()


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """The longest common beginning."""
    n = 0
    while n < min(len(first), len(second)) and first[n] == second[n]:
        n += 1
    return first[:n]
