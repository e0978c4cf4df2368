"""Why a transform left leaves alone, and trees that it left alone altogether."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from jaxweights.core._layout import Layout, is_default_target, is_float, is_vector
from jaxweights.core._paths import Params, Path, flatten

_TAKEN_BY_NO_RULE = "no rule takes it"
# A transform of the caller's own may do nothing.
_METHODS = re.compile(r"\b(?:quantize|sparsify|adapt)\.")


def why_untouched(path: Path, leaf: object, layout: Layout) -> str:
    """Why a method leaves a leaf alone that no rule names, as plans say it."""
    if not is_float(leaf):
        return f"{getattr(leaf, 'dtype', type(leaf).__name__)}, not floating"
    if len(leaf.shape) < 2:  # type: ignore[attr-defined]
        return "a vector"
    axes = layout.get(path)
    if axes is None and layout.traced:
        return "no matrix of the traced model"
    if axes is None and is_vector(path, leaf):
        return "a bias or norm"
    if axes is not None and axes.kind == "embedding":
        return "an embedding; name it in `partition` to transform it"
    if not is_default_target(path):
        return "an embedding, head, router or norm; name it in `partition` to transform it"
    return _TAKEN_BY_NO_RULE


def untouched_tree(
    name: str, params: Params, new: Params, layout: Callable[[], Layout]
) -> Iterator[str]:
    """A complaint where a method gave back every leaf of a tree as it was; nothing otherwise.

    Args:
      name: Name of the transform.
      params: The tree before.
      new: And after; a leaf that is the very same object was not touched.
      layout: Gives the axes of the leaves, where a complaint has to say why.
    """
    if not _METHODS.search(name) or "identity" in name:
        return
    flat, after = flatten(params)[0], flatten(new)[0]
    if not flat or any(after[path] is not leaf for path, leaf in flat.items()):
        return
    matrices = [path for path, leaf in flat.items() if is_float(leaf) and len(leaf.shape) > 1]
    found = layout()
    reasons = {path: why_untouched(path, flat[path], found) for path in matrices}
    if _TAKEN_BY_NO_RULE in reasons.values():
        return  # it was seen, and its settings, such as sparsity=0, leave it as it is
    shown = [f"{path!r} ({reason})" for path, reason in list(reasons.items())[:5]]
    what = f"it leaves {', '.join(shown)}" if shown else f"of {len(flat)} none is a floating matrix"
    yield (
        f"{name} finds no leaf to change: {what}. Name leaves with partition((pattern, "
        "transform)), or do not apply it; `plan` tells what a transform would do."
    )
