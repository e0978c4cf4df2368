"""GGUF models that are split over several files, as `llama-gguf-split` makes them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxweights.checkpoint._gguf import GGUFReader, open_gguf
from jaxweights.checkpoint._untrusted import contained

_NAME = "open_checkpoint"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def first_part(files: Sequence[Path]) -> Path | None:
    """The one file to open of several: the first of one split model; None if they are not one."""
    found = [_PART.fullmatch(file.name) for file in files]
    if not all(found) or len({(m[1], m[3]) for m in found if m}) != 1:
        return None
    return min(files, key=lambda file: file.name)


def open_gguf_parts(path: Path) -> tuple[GGUFReader, ...]:
    """Opens a GGUF file, with the others where it is one part of a model.

    Args:
      path: The file; any of the parts.

    Returns:
      Readers, whose first one has the metadata of the model.

    Raises:
      FileNotFoundError: If a part is not there.
      ValueError: If the parts are not of one model, or hold fewer tensors than it has.
    """
    given = open_gguf(path)
    count = given.metadata.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return (given,)
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise ValueError(
            f"{_NAME}: '{path}' is one of {count} parts of a model, but its name does not end in "
            f"-00001-of-{count:05}.gguf, by which the others are found. Give all parts the names "
            "that they were made with."
        )
    names = [f"{name[1]}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    missing = [other for other in names if not os.path.lexists(path.parent / other)]
    if missing:
        raise FileNotFoundError(
            f"{_NAME}: '{path}' is one of {count} parts of a model, of which {missing[:5]} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it. Put all parts into one folder."
        )
    parts = tuple(
        given if other == path.name else open_gguf(contained(path.parent, other, _NAME))
        for other in names
    )
    _check(parts, count)
    return parts


def _check(parts: Sequence[GGUFReader], count: int) -> None:
    for i, part in enumerate(parts):
        said = part.metadata.get("split.no"), part.metadata.get("split.count")
        if said != (i, count):
            raise ValueError(
                f"{_NAME}: '{part.path}' says that it is part {said[0]} of {said[1]}, counted from "
                f"0, but its name says {i} of {count}. Fetch the parts again."
            )
    names = [name for part in parts for name in part]
    twice = (
        {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    )
    if twice:
        raise ValueError(
            f"{_NAME}: '{parts[0].path}': {sorted(twice)[:5]} are in several parts. Fetch the "
            "parts again."
        )
    total = parts[0].metadata.get("split.tensors.count", len(names))
    if total != len(names):
        raise ValueError(
            f"{_NAME}: '{parts[0].path}': the model has {total} tensors, but its {count} parts "
            f"hold {len(names)}. Fetch the parts again."
        )
