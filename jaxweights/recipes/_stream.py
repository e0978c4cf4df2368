"""Runs a recipe tensor by tensor, for models that do not fit in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.core import Layout, Transform, chain, flatten
from jaxweights.core._apply import transform_tree
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import fail
from jaxweights.models._outline import Outline, Place, outline
from jaxweights.recipes._download import Progress
from jaxweights.recipes._findings import Findings
from jaxweights.recipes._free_memory import bytes_of, free_memory
from jaxweights.recipes._model import Model, locate
from jaxweights.recipes._recipe import Recipe
from jaxweights.recipes._write import companion_files
from jaxweights.recipes._yaml import RecipeError
from jaxweights.stream._jobs import Job, Operand
from jaxweights.stream._run import stream_jobs
from jaxweights.weights._weight import materialize

_NAME = "jaxweights run"
_WIDE_BYTES = 16  # float32 copies of a tensor that methods and the comparison make
_SHARE = 3  # models that take more than this part of the free memory are streamed


def streams(recipe: Recipe, *, progress: Progress) -> bool:
    """Whether a recipe runs tensor by tensor.

    Args:
      recipe: The recipe.
      progress: Called while a package is downloaded.

    Returns:
      Whether it does.

    Raises:
      RecipeError: If it shall, but cannot; says all that keeps it.
    """
    if recipe.stream == "never":
        return False
    reasons = _reasons(recipe)
    if reasons and recipe.stream == "auto":
        return False
    if not reasons:
        sources = (recipe.model, *recipe.models)
        paths = [locate(source, progress=progress)[0] for source in sources]
        total = sum(map(bytes_of, paths))
        if recipe.stream == "auto" and total <= free_memory() / _SHARE:
            return False
        reasons = [reason for path in paths if (reason := _why_no_outline(path)) is not None]
    if reasons and recipe.stream == "always":
        line = recipe.lines.get("stream", 1)
        raise RecipeError(
            f"{recipe.name}:{line}: stream: always, but {'; and '.join(reasons)}. Change that, "
            "or leave `stream` out."
        )
    return not reasons


def _why_no_outline(path: Path) -> str | None:
    """Why tensors cannot be told one by one; None if they can."""
    try:
        outline(path)
    except ValueError as error:
        return str(error).removesuffix(".")
    return None


def _reasons(recipe: Recipe) -> list[str]:
    """What keeps a recipe in memory."""
    found = []
    if recipe.evaluate.perplexity is not None or recipe.evaluate.retrieval is not None:
        found.append("`evaluate` runs the model, which needs it in memory")
    if recipe.distill is not None:
        found.append("`distill` trains the model, which needs it in memory")
    if recipe.output.formats != ("safetensors",):
        found.append("only `formats: [safetensors]` is written tensor by tensor")
    for step in recipe.steps:
        if step.plain.reads_statistics:
            found.append(f"{step.method} (line {step.line}) reads statistics of the model's inputs")
        elif step.plain.scope in ("block", "tree"):
            found.append(f"{step.method} (line {step.line}) looks at all leaves together")
        elif step.plain.scope == "leaf":
            found.append(f"{step.method} (line {step.line}) looks at all layers of a leaf together")
    return found


def outline_model(source: Any, *, progress: Progress) -> tuple[Model, Outline]:
    """The model of a recipe, of which no tensor is read."""
    path, name, words = locate(source, progress=progress)
    found = outline(path)
    return Model(name, words, found.pretrained, None), found


class Streaming:
    """One run over the tensors of a model.

    Args:
      recipe: The recipe.
      model: The model, without values.
      places: Its tensors.
      others: The other models of a merge.
      layout: Axes of the leaves.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        places: Outline,
        others: Sequence[Outline],
        layout: Layout,
    ):
        """Plans nothing yet."""
        self._recipe = recipe
        self._model = model
        self._outline = places
        self._others = [
            (other.pretrained.source, {place.written: place.stored for place in other.places})
            for other in others
        ]
        self._layout = layout
        params = places.pretrained.params
        self._findings = Findings(recipe, layout, flatten(params)[0])

    def write(self, destination: Path, *, recipe: dict[str, Any], progress: Progress) -> None:
        """Makes the folder of safetensors."""
        source = self._outline.pretrained.source
        jobs = [self._job(place) for place in self._outline.places]
        for name in self._outline.carried:
            operand = Operand(source, name, self._model.name)
            jobs.append(Job(name, source.shape(name), source.dtype(name), (operand,)))
        stream_jobs(
            _NAME,
            jobs,
            destination,
            recipe=recipe,
            identity={"recipe": recipe},
            files=companion_files(self._outline.pretrained),
            progress=progress,
        )

    @property
    def findings(self) -> Findings:
        """What became of the leaves."""
        return self._findings

    def _job(self, place: Place) -> Job:
        source = self._outline.pretrained.source
        operands = [Operand(source, place.stored, self._model.name)]
        for i, (other, stored) in enumerate(self._others):
            operands.append(Operand(other, stored[place.written], f"models[{i}]"))
        path = place.rule.path
        steps = [tx for step in self._recipe.steps if (tx := step.on(path)) is not None]
        tx = chain(*steps) if steps else None
        layout = dataclasses.replace(
            self._layout,
            entries=tuple(entry for entry in self._layout.entries if entry[0] == path),
            unclear=tuple(entry for entry in self._layout.unclear if entry[0] == path),
            seen=tuple(seen for seen in self._layout.seen if seen == path),
        )
        shape = source.shape(place.stored)
        return Job(
            place.written,
            shape,
            source.dtype(place.stored),
            tuple(operands),
            self._compute(place, tx, layout),
            temporaries=_WIDE_BYTES * len(operands),
        )

    def _compute(
        self, place: Place, tx: Transform | None, layout: Layout
    ) -> Callable[[Sequence[Any], int], np.ndarray]:
        path = place.rule.path

        def compute(arrays: Sequence[Any], start: int) -> np.ndarray:
            del start
            leaf, *others = [self._to_leaf(place, array) for array in arrays]
            if np.issubdtype(leaf.dtype, np.floating) or leaf.dtype.name == "bfloat16":
                bad = not np.isfinite(np.asarray(leaf)).all()
                fail(_NAME, [describe_nonfinite(path, leaf)] if bad else [])
            new = leaf
            if tx is not None:
                models = [{path: other} for other in others] or None
                key = jax.random.key(self._recipe.seed)
                new = transform_tree(tx, {path: leaf}, models=models, key=key, layout=layout)[path]
            self._findings.look(path, place.layer, leaf, new)
            dense = np.array(materialize(new))  # what was read into is used again
            return place.rule.to_checkpoint(dense if place.layer is None else dense[0])

        return compute

    def _to_leaf(self, place: Place, array: Any) -> jax.Array:
        """The tensor as a leaf of the model, with a stack of one layer."""
        part = place.rule.from_checkpoint(np.asarray(array))
        return jax.numpy.array(part if place.layer is None else part[None])
