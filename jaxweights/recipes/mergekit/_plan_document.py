"""From a configuration's modules to the jobs of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jaxweights.recipes._yaml import RecipeError
from jaxweights.recipes.mergekit._config import MergeConfig
from jaxweights.recipes.mergekit._method import Compat
from jaxweights.recipes.mergekit._model_ref import ModelRef
from jaxweights.recipes.mergekit._models import Model
from jaxweights.recipes.mergekit._plan import PlannedTensor, Planner, copied, written_dtype
from jaxweights.recipes.mergekit._towers import tensors_by_module
from jaxweights.stream._jobs import Operand


def plan_document(
    config: MergeConfig,
    models: Mapping[ModelRef, Model],
    *,
    compat: Compat = "fixed",
    missing: Literal["error", "take"] = "error",
    seed: int = 0,
) -> list[PlannedTensor]:
    """Plans the tensors of one document, module by module.

    What belongs to no module of the document is taken over from the first model.

    Args:
      config: The document.
      models: The opened models.
      compat: As in `Planner`.
      missing: As in `Planner`.
      seed: As in `Planner`.

    Returns:
      The tensors.

    Raises:
      RecipeError: If models do not fit each other or the method, or a module has no tensors.
    """
    options: Any = {"compat": compat, "missing": missing, "seed": seed}
    modules = [module.name for module in config.modules if module.name is not None]
    if not modules:
        return Planner(config, config.modules[0], models, **options).plan()
    names = dict.fromkeys(name for model in models.values() for name in model.names)
    owners = tensors_by_module(names, modules)
    empty = [m for m in config.modules if m.name not in owners.values()]
    if empty:
        starts = sorted({name.split(".")[0] for name in names})
        raise RecipeError(
            "\n".join(
                f"{config.file}:{module.line}: modules.{module.name}: has no tensors; the names of "
                f"those that there are start with {', '.join(map(repr, starts[:8]))}. Call a "
                "module what the names of its tensors start with."
                for module in empty
            )
        )
    planned = []
    for module in config.modules:
        own = {name for name, owner in owners.items() if owner == module.name}
        some = {ref: model.only(own) for ref, model in models.items()}
        planned += Planner(config, module, some, **options).plan()
    first = models[config.models[0]]
    left = [name for name in first.names if owners[name] is None]
    operands = [Operand(first.tensors, name, first.label) for name in left]
    return planned + [
        PlannedTensor(
            copied(name, operand, written_dtype(config, operand.dtype)),
            "copy",
            first.depth(name),
            {first.label: name},
            {},
        )
        for name, operand in zip(left, operands, strict=True)
    ]
