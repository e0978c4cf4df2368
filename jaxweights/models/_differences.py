"""What keeps a checkpoint or a tree from being a certain model, one line a fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxweights.core._paths import nearest
from jaxweights.models._names import NameMap, tree_shapes

Shape = tuple[int, ...]


def checkpoint_differences(
    shape_of: Callable[[str], Shape],
    stored: Mapping[str, str],
    names: NameMap,
) -> Iterator[str]:
    """What is missing, unexpected or misshapen in a checkpoint.

    Args:
      shape_of: Shape of a tensor by the name in the file.
      stored: Names in the file, by the names of the rules.
      names: The map of the model.

    Yields:
      One line for each tensor; one line alone for a layer of which no tensor is there.
    """
    expected = names.expected()
    tied = names.tied_head[0] if names.tied_head else None
    missing = [name for name in expected if name not in stored]
    unexpected = [
        name
        for name in stored
        if name not in expected and name != tied and not names.is_carried(name)
    ]
    absent_layers, missing = _whole_layers(missing, list(expected), names)
    extra_layers, unexpected = _whole_layers(unexpected, list(stored), names)
    for layer, count in absent_layers:
        yield f"layer {layer} is missing: none of its {count} tensors is there."
    written = {name: names.written_name(name) for name in expected}
    for name in missing:
        hint = _hint(written[name], [stored[other] for other in unexpected] or stored.values())
        yield f"{written[name]!r} is missing, shape {expected[name][0].checkpoint_shape}.{hint}"
    for layer, count in extra_layers:
        yield (
            f"layer {layer} is unexpected ({count} tensors): the config has "
            f"{names.num_layers} layers."
        )
    for name in unexpected:
        hint = _hint(stored[name], [written[other] for other in missing] or written.values())
        yield f"{stored[name]!r} is unexpected.{hint}"
    for name, (rule, _) in expected.items():
        if name in stored:
            shape = tuple(shape_of(stored[name]))
            if shape != rule.checkpoint_shape:
                yield f"{stored[name]!r} has shape {shape}, expected {rule.checkpoint_shape}."


def tree_differences(flat: Mapping[str, Any], names: NameMap) -> Iterator[str]:
    """What is missing, unexpected or misshapen in a tree, given as leaves by path."""
    shapes = tree_shapes(names)
    for path, shape in shapes.items():
        if path not in flat:
            candidates = [p for p in flat if p not in shapes] or flat
            yield f"{path!r} is missing, shape {shape}.{_hint(path, candidates)}"
        elif tuple(flat[path].shape) != shape:
            yield f"{path!r} has shape {tuple(flat[path].shape)}, expected {shape}."
    for path in flat:
        if path not in shapes:
            candidates = [p for p in shapes if p not in flat] or shapes
            yield f"{path!r} is unexpected.{_hint(path, candidates)}"


def _whole_layers(
    chosen: list[str], everything: list[str], names: NameMap
) -> tuple[list[tuple[int, int]], list[str]]:
    """Sums up layers of which every tensor is among the chosen; returns them and the rest."""

    def by_layer(tensor_names):
        layers: dict[int, list[str]] = {}
        for name in tensor_names:
            if match := re.search(names.layer_pattern, name):
                layers.setdefault(int(match[1]), []).append(name)
        return layers

    total = by_layer(everything)
    whole = {
        layer: members
        for layer, members in by_layer(chosen).items()
        if len(members) == len(total[layer])
    }
    summed = {name for members in whole.values() for name in members}
    counts = [(layer, len(members)) for layer, members in sorted(whole.items())]
    return counts, [name for name in chosen if name not in summed]


def _hint(name: str, candidates: Iterable[str]) -> str:
    close = nearest(name, candidates, count=2)
    return f" Nearest names: {', '.join(map(repr, close))}." if close else ""
