"""Which deltas a merge report looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxweights.recipes.mergekit._config import MergeConfig
from jaxweights.recipes.mergekit._methods import METHODS
from jaxweights.recipes.mergekit._model_ref import ModelRef
from jaxweights.recipes.mergekit._models import Model
from jaxweights.recipes.mergekit._plan import PlannedTensor
from jaxweights.stream._delta_stats import DeltaRequest
from jaxweights.stream._jobs import Operand


def delta_requests(
    config: MergeConfig,
    models: Mapping[ModelRef, Model],
    tensors: Sequence[PlannedTensor],
) -> list[DeltaRequest]:
    """What is compared: every merged tensor of the models with that of the base.

    Where the method merges models rather than deltas, the origin is the configuration's base if it
    names one, and the first model if not.

    Args:
      config: The document.
      models: Its models.
      tensors: What it makes.

    Returns:
      One for each tensor that more than one model takes part in.
    """
    base = None
    if METHODS[config.method].merges_base and config.base_model is not None:
        base = models[config.base_model]
    requests = []
    for tensor in tensors:
        if tensor.method == "copy" or not tensor.job.entries:
            continue
        origin, *_ = operands = tensor.job.operands
        if base is not None and base.label in tensor.inputs:
            origin = Operand(base.tensors, tensor.inputs[base.label], base.label)
        # A model that an average names twice has one delta.
        others = dict.fromkeys(operand for operand in operands if operand != origin)
        if others:
            kept = _kept(tensor, len(others))
            requests.append(DeltaRequest(tensor.job.name, (origin, *others), kept))
    return requests


def _kept(tensor: PlannedTensor, n: int) -> tuple[int, ...] | None:
    """How many entries the densities leave, as the methods count them."""
    density = tensor.parameters.get("density")
    if tensor.method == "task_arithmetic" or not isinstance(density, dict) or len(density) != n:
        return None
    if all(share >= 1 for share in density.values()):
        return None
    entries = tensor.job.entries
    return tuple(
        min(max(int(share * entries), 1), entries) if share > 0 else 0 for share in density.values()
    )
