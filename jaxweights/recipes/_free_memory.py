"""How much memory is free, and whether calibrating a whole model at once fits into it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.calibrate._calibrate import _assign
from jaxweights.core import Needs, chain, flatten
from jaxweights.lift._infer_layout import trace_model
from jaxweights.recipes._bytes import say_bytes
from jaxweights.recipes._measure import CalibrationData
from jaxweights.recipes._model import Model
from jaxweights.recipes._recipe import Recipe
from jaxweights.weights._axes import View

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> float:
    """Bytes that programs can have without swapping; endless where the system does not tell."""
    return min(_free_of_machine(), _free_of_group())


def _free_of_machine() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return math.inf


def _free_of_group() -> float:
    """What is left of a container's limit; its file cache can be had back."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError):  # no container, or no limit: its file says "max"
        return math.inf
    return max(limit - used + cached, 0)


def refuse_large_model(path: Path) -> None:
    """Refuses to load a checkpoint that takes more than the free memory.

    Raises:
      ValueError: If it does.
    """
    size, free = bytes_of(path), free_memory()
    if size > free:
        raise ValueError(
            f"jaxweights run: '{path}' takes {say_bytes(size)}, but only {say_bytes(free)} of "
            "memory are free. Hold one block of layers at a time, such as with `memory: 4GB` in "
            "the recipe (--memory 4GB)."
        )


def bytes_of(path: Path) -> int:
    """Bytes of a checkpoint's file, or of its safetensors."""
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def refuse_short_memory(recipe: Recipe, model: Model, data: CalibrationData | None) -> None:
    """Refuses a calibration of all layers at once that the system would end without a word.

    Args:
      recipe: What is run.
      model: The model, which is in memory.
      data: What it is calibrated on.

    Raises:
      ValueError: If the free memory does not suffice.
    """
    section = recipe.calibrate
    if section is None or data is None or section.again == "each_block":
        return
    transforms = [step.transform for step in recipe.steps]
    parts = transforms if section.again == "each_step" else [chain(*transforms)]
    every = [tx.needs(model.params) for tx in parts if tx.reads_statistics]
    statistics = max((_statistics_bytes(model, needs, data) for needs in every), default=0)
    # Those of a batch are added to those of the batches before.
    statistics *= min(len(data.batches), 2)
    batch = max(_activation_bytes(model, *tokens.shape) for (tokens,) in data.batches)
    free = free_memory()
    if statistics + batch <= free:
        return
    raise ValueError(
        f"jaxweights run: calibrating all layers at once takes about "
        f"{say_bytes(statistics + batch)} beside the model ({say_bytes(statistics)} for their "
        f"statistics, {say_bytes(batch)} for a batch of {section.batch} sequences), but only "
        f"{say_bytes(free)} are free. Hold one block of layers at a time, such as with "
        "`memory: 4GB` in the recipe (--memory 4GB), or take smaller batches (--batch 1)."
    )


def _statistics_bytes(model: Model, needs: Needs, data: CalibrationData) -> int:
    """Bytes of the Gram matrices of all layers; other statistics are vectors."""
    flat = flatten(model.params)[0]
    tokens = jax.ShapeDtypeStruct(data.batches[0][0].shape, np.int32)
    trace = trace_model(model.forward, model.params, (tokens,))
    wanted, _ = _assign(needs, flat, trace.layout, dict(trace.owners))
    total = 0
    for path, names in wanted.items():
        view = View.of(flat[path].shape, trace.layout[path])
        stack = [flat[path].shape[axis] for axis in view.stack_axes(len(flat[path].shape))]
        sizes = [view.in_dim**2 if name == "gram" else view.in_dim for name in names]
        total += 4 * math.prod(stack) * sum(sizes)
    return total


def _activation_bytes(model: Model, rows: int, length: int) -> int:
    """What a layer makes of a batch, in float32: scores of attention, or the MLP between."""
    config: Any = model.pretrained.config
    scores = 2 * rows * config.num_heads * length**2
    between = rows * length * (3 * config.intermediate_size + 4 * config.hidden_size)
    return 4 * max(scores, between)
