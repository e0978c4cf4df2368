"""Which tensors belong to which module of a model that has several."""

from __future__ import annotations

from collections.abc import Collection, Iterable

# How checkpoints name what configurations call a module. What stands in front of it, such as
# `model.`, may be missing or be there.
_PREFIXES = {
    "vision_tower": ("vision_tower.", "vision_model.", "visual."),
    "vision_model": ("vision_model.", "vision_tower.", "visual."),
    "multi_modal_projector": (
        "multi_modal_projector.",
        "visual.merger.",
        "visual.deepstack_merger_list.",
    ),
    "encoder": ("encoder.",),
    "decoder": ("decoder.",),
    "shared": ("shared.",),
}
# Modules of which one has what no other has: the language model, and the head of T5.
_REST = ("text_decoder", "default", "shared")


def tensors_by_module(names: Iterable[str], modules: Collection[str]) -> dict[str, str | None]:
    """The module of each tensor; None for those of a module that is not among these.

    Args:
      names: Names of tensors.
      modules: Names of modules: those above, or what the names of their tensors start with.

    Returns:
      Modules by tensor.
    """
    prefixes = {(prefix, m) for m in modules for prefix in _PREFIXES.get(m, (f"{m.strip('.')}.",))}
    others = {(p, None) for m in _PREFIXES.keys() - set(modules) for p in _PREFIXES[m]}
    known = {prefix for prefix, _ in prefixes}
    every = sorted(prefixes | {(p, m) for p, m in others if p not in known}, key=_longest_first)
    rest = next((module for module in _REST if module in modules), None)
    found: dict[str, str | None] = {}
    for name in names:
        stem = name.removeprefix("model.")
        fits = (m for p, m in every if name.startswith(p) or stem.startswith(p))
        found[name] = next(fits, rest)
    return found


def _longest_first(entry: tuple[str, str | None]) -> tuple[int, str, str]:
    return -len(entry[0]), entry[0], entry[1] or ""
