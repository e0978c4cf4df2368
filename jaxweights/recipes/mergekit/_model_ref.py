"""Models as configurations name them."""

from __future__ import annotations

import dataclasses

from jaxweights.recipes._check import Problems, describe
from jaxweights.recipes._yaml import Located


@dataclasses.dataclass(frozen=True)
class ModelRef:
    """A model as a configuration names it.

    Args:
      path: A folder or file, or the `name` of an earlier document.
      lora: A folder with a LoRA adapter that is applied to it, if any.
    """

    path: str
    lora: str | None = None

    def __str__(self) -> str:
        return self.path if self.lora is None else f"{self.path}+{self.lora}"


def read_model(node: Located, where: str, problems: Problems) -> ModelRef | None:
    """`path`, `path+lora`, or the mapping that mergekit writes for them."""
    value = node.plain()
    if isinstance(value, str) and value:
        path, _, lora = value.partition("+")
        return ModelRef(path, lora or None)
    if isinstance(value, dict) and "model" in value:
        inner = [value["model"], value.get("lora")]
        paths = [part.get("path") if isinstance(part, dict) else part for part in inner]
        if isinstance(paths[0], str) and isinstance(paths[1], str | None):
            return ModelRef(paths[0], paths[1])
    problems.add(node.line, f"{where}: is {describe(node)}. It must be a path, or path+adapter.")
    return None
