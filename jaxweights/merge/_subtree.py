"""merge_subtree: models that share a part are merged there, and keep what is their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax

from jaxweights.core._apply import LayoutLike, apply
from jaxweights.core._context import Progress
from jaxweights.core._layout import Layout
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
from jaxweights.core._stats import Stats
from jaxweights.core._transform import Transform
from jaxweights.merge._models import check_choice, check_names, per_model
from jaxweights.merge._nested import build, placed_leaves
from jaxweights.merge._same import same

Missing = Literal["take_present", "error"]
_NAME = "merge.merge_subtree"
_UNCLEAR = object()  # a leaf that several trees have, and the owner has not


def merge_subtree(
    tx: Transform,
    base: Params,
    models: Sequence[Params],
    *,
    pattern: str,
    owner: int | None = None,
    missing: Missing = "take_present",
    names: Sequence[str] | None = None,
    key: jax.Array | None = None,
    stats: Stats | None = None,
    layout: LayoutLike = None,
    progress: Progress | None = None,
) -> Params:
    """Merges the leaves that a pattern names; every other leaf is bit for bit that of its owner.

    The trees need not have the same leaves: a safety-tuned language model, say, is merged into the
    language tower of a vision-language model, whose image tower and projector stay as they are.

    Args:
      tx: The merge, such as `merge.interpolate(alpha=0.5)` or a `partition` of several.
      base: What the merge starts from.
      models: What it merges in.
      pattern: Regular expression for the whole path of the leaves that are merged.
      owner: Whose leaf is kept outside of the pattern where several trees have it: None for
        the base, or a place in `models`. A leaf that the owner lacks comes from the one tree that
        has it, or from the first where all that have it agree.
      missing: Leaves under the pattern that not all trees have: `"take_present"` treats them as
        those outside of it; `"error"` refuses.
      names: What errors call the models.
      key: Randomness, as in `apply`.
      stats: As in `apply`.
      layout: As in `apply`.
      progress: As in `apply`.

    Returns:
      A tree with the leaves of all trees together.

    Raises:
      ValueError: If nothing is merged, it is not clear whose a leaf is, or the merge refuses.

    Example:
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> safe = {"llm": {"kernel": jnp.zeros((1, 2))}}
      >>> task = {"llm": {"kernel": jnp.ones((1, 2))}, "vision": {"kernel": jnp.full((1, 2), 7.0)}}
      >>> half = jw.merge.interpolate(alpha=0.5)
      >>> merged = jw.merge.merge_subtree(half, safe, [task], pattern="llm/.*")
      >>> merged["llm"]["kernel"], merged["vision"]["kernel"] is task["vision"]["kernel"]
      (Array([[0.5, 0.5]], dtype=float32), True)

    Source: the use in arXiv:2410.07571 (safety of vision-language models by merging).
    """
    check_pattern(_NAME, pattern)
    check_choice(_NAME, "missing", missing, ("take_present", "error"))
    check_names(_NAME, names)
    if not models:
        raise ValueError(f"{_NAME}: models is empty. Pass at least one tree.")
    if names is not None:
        per_model(_NAME, "names", names, len(models))
    if owner is not None and not 0 <= owner < len(models):
        raise ValueError(
            f"{_NAME}: owner={owner} is no place in models, of which there are {len(models)}. "
            "None is the base."
        )
    labels = ["the base", *(f"models[{i}]" for i in range(len(models)))]
    if names is not None:
        labels[1:] = [f"{label} ({n!r})" for label, n in zip(labels[1:], names, strict=True)]
    trees = [base, *models]
    flats = [flatten(tree)[0] for tree in trees]
    union = list(dict.fromkeys(path for flat in flats for path in flat))
    chosen = _chosen(pattern, union, flats, missing, labels)
    found = _owned([p for p in union if p not in chosen], flats, 0 if owner is None else owner + 1)
    fail(_NAME, [_unclear(path, flats, labels) for path, leaf in found.items() if leaf is _UNCLEAR])
    start, *others = [{path: flat[path] for path in chosen} for flat in flats]
    if isinstance(layout, Layout):  # of the whole model, of which this is a part
        layout = dataclasses.replace(layout, seen=())
    merged = apply(
        partition((pattern, tx)),
        start,
        models=others,
        key=key,
        stats=stats,
        layout=layout,
        progress=progress,
    )
    return _assembled(trees, flats, found | merged)


def _chosen(
    pattern: str, union: list[Path], flats: list[Flat], missing: Missing, labels: list[str]
) -> set[Path]:
    """The leaves that are merged."""
    matched = matching(pattern, union)
    if not matched:
        raise ValueError(
            f"{_NAME}: pattern={pattern!r} matches no leaf. The nearest paths: "
            f"{nearest(pattern, union)}."
        )
    shared = {path for path in matched if all(path in flat for flat in flats)}
    absent = [path for path in matched if path not in shared]
    if missing == "error":
        fail(
            _NAME,
            [
                f"{path!r}: is missing in {', '.join(_lacking(path, flats, labels))}. Give it that "
                "leaf, or pass missing='take_present' to take it from the tree that has it."
                for path in absent
            ],
        )
    if not shared:
        raise ValueError(
            f"{_NAME}: pattern={pattern!r} matches {absent[:5]}, none of which all trees have, so "
            "that nothing is merged. Rename the leaves of the models like those of the base."
        )
    return shared


def _lacking(path: Path, flats: list[Flat], labels: list[str]) -> list[str]:
    return [label for label, flat in zip(labels, flats, strict=True) if path not in flat]


def _owned(paths: list[Path], flats: list[Flat], owner: int) -> Flat:
    """Every leaf from the tree that it is kept from."""
    found: Flat = {}
    for path in paths:
        if path in flats[owner]:
            found[path] = flats[owner][path]
            continue
        first, *rest = [flat[path] for flat in flats if path in flat]
        found[path] = first if all(same(first, other) for other in rest) else _UNCLEAR
    return found


def _unclear(path: Path, flats: list[Flat], labels: list[str]) -> str:
    having = [label for label, flat in zip(labels, flats, strict=True) if path in flat]
    return (
        f"{path!r}: differs between {', '.join(having)}, and the owner lacks it. Pass owner, the "
        "place in models of the tree to keep such leaves from."
    )


def _assembled(trees: list[Params], flats: list[Flat], leaves: Flat) -> Params:
    """The leaves in the structure of the tree that has all of them, or in one made of all."""
    for tree, flat in zip(trees, flats, strict=True):
        if len(flat) == len(leaves):
            return unflatten(flatten(tree)[1], {path: leaves[path] for path in flat})
    placed: dict[Path, Any] = {}
    for tree in trees:
        for leaf in placed_leaves(_NAME, tree):
            placed.setdefault(leaf.path, leaf._replace(leaf=leaves[leaf.path]))
    return build(list(placed.values()))
