"""Runs a recipe: loads, measures, calibrates, changes, measures again, writes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxweights.recipes._download import Progress
from jaxweights.recipes._leaves import (
    LeafResult,
    compare_leaves,
    provenance_errors,
    spectra,
    tree_bytes,
)
from jaxweights.recipes._measure import (
    CalibrationData,
    prepare_calibration,
    prepare_measures,
)
from jaxweights.recipes._model import Model, check_fit, companion_files, load_model
from jaxweights.recipes._recipe import Recipe
from jaxweights.recipes._yaml import RecipeError


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
      directory: Where it was written.
      summary: Everything that was found out, as `result.json` holds it.
      leaves: What became of each leaf.
      params: The parameters, with represented weights.
    """

    directory: Path
    summary: dict[str, Any]
    leaves: tuple[LeafResult, ...]
    params: Any


def run_recipe(
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Runs a recipe from its model to its report.

    Everything that can be refused is refused before the long work: a destination that exists, a
    pattern that matches nothing, a text that is too short. The destination appears whole at the
    end, or not at all.

    Args:
      recipe: A checked recipe.
      output: Where to write, in place of the recipe's own directory.
      overwrite: Whether an existing directory may be replaced, in one step, at the end.
      progress: Called with (task, done, total).

    Returns:
      What was found out, and the changed parameters.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False.
      RecipeError: If the recipe does not suit the model.
    """
    from jaxweights.checkpoint import atomic_directory
    from jaxweights.checkpoint._atomic import check_destination

    report = progress or (lambda task, done, total: None)
    clock = _Clock()
    directory = Path(output or recipe.output.directory)
    check_destination("jaxweights run", directory, overwrite=overwrite, directory=True)

    with clock("load"):
        model = load_model(recipe.model, progress=report)
        others = tuple(load_model(m, progress=report).params for m in recipe.models)
        check_fit(recipe, model)
        layout = check_leaves(recipe, model)
        data = prepare_calibration(recipe, model, report)
        measures = prepare_measures(recipe, model, report)
    before = model.params
    with clock("measure before"):
        scores = {m.name: {"before": m.score(before, "before")} for m in measures}
    with clock("change"):
        after = _transform(recipe, model, others, layout, data, report)
        jax.block_until_ready(jax.tree.leaves(after))
    with clock("measure after"):
        for measure in measures:
            scores[measure.name]["after"] = measure.score(after, "after")
            scores[measure.name]["definition"] = measure.definition
    with clock("compare"):
        report("Comparing", 0, 1)
        leaves = compare_leaves(before, after, layout, recipe)
        panels = spectra(before, after, layout, leaves) if recipe.output.report else {}
        report("Comparing", 1, 1)

    provenance = _provenance(recipe, model, leaves)
    summary = _summarize(recipe, model, (before, after), scores, data, leaves, provenance)
    with atomic_directory(directory, overwrite=overwrite) as folder:
        with clock("write"):
            _write_weights(folder, recipe, model, after, provenance, report)
        summary["seconds"] = clock.seconds
        _write_report(folder, recipe, summary, leaves, panels, report)
    return RunResult(directory, summary, leaves, after)


class _Clock:
    """Seconds that the parts of a run took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - start, 2)


def check_leaves(recipe: Recipe, model: Model) -> Any:
    """Reads the layout off the model's trace, and tries every pattern on the model's leaves.

    Returns:
      The layout.

    Raises:
      RecipeError: If a pattern matches nothing; says which line.
    """
    from jaxweights.core import flatten
    from jaxweights.lift import infer_layout

    flat = flatten(model.params)[0]
    problems = []
    for step in recipe.steps:
        try:
            step.transform.init(flat)
        except ValueError as error:
            problems += [f"{recipe.name}:{step.line}: {line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError("\n".join(problems))
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    return infer_layout(model.forward, model.params, tokens)


def _transform(
    recipe: Recipe,
    model: Model,
    others: tuple[Any, ...],
    layout: Any,
    data: CalibrationData | None,
    report: Progress,
) -> Any:
    from jaxweights.calibrate import calibrate, pipeline
    from jaxweights.core import apply

    key = jax.random.key(recipe.seed)
    watch = _Watch(report)
    section = recipe.calibrate
    if section is not None and section.again != "never" and data is not None:
        return pipeline(
            model.forward,
            model.params,
            data.batches,
            [step.transform for step in recipe.steps],
            block_by_block=section.again == "each_block",
            loss=model.loss if model.is_decoder else None,
            key=key,
            progress=watch,
        )
    transform, stats = recipe.transform, None
    needs = transform.needs(model.params)
    if needs and data is not None:
        stats = calibrate(
            model.forward,
            model.params,
            data.batches,
            needs=needs,
            loss=model.loss if model.is_decoder else None,
            progress=watch,
        )
    return apply(
        transform,
        model.params,
        stats=stats,
        models=others or None,
        key=key,
        layout=layout,
        progress=watch,
    )


class _Watch:
    """Passes progress of calibration and of leaves on, under names that people read."""

    def __init__(self, report: Progress) -> None:
        self._report = report

    def __call__(self, what: str, done: int, total: int | None) -> None:
        task = "Calibrating" if what == "calibrate" else "Changing weights"
        self._report(task, done, total or 0)


def _provenance(recipe: Recipe, model: Model, leaves: tuple[LeafResult, ...]) -> Any:
    from jaxweights.checkpoint import Provenance

    return Provenance.collect(
        recipe={"name": Path(recipe.name).name, "yaml": recipe.text},
        source=model.pretrained.source.fingerprint(),
        errors=provenance_errors(leaves),
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _summarize(
    recipe: Recipe,
    model: Model,
    trees: tuple[Any, Any],
    scores: dict[str, Any],
    data: CalibrationData | None,
    leaves: tuple[LeafResult, ...],
    provenance: Any,
) -> dict[str, Any]:
    return {
        "model": {
            "name": model.name,
            "source": model.source,
            "fingerprint": provenance.source,
            "parameters": sum(leaf.parameters for leaf in leaves),
        },
        "steps": [
            {
                "method": step.method,
                "settings": step.settings,
                "match": list(step.match),
                "except": list(step.exempt),
            }
            for step in recipe.steps
        ],
        "calibration": None if data is None else {"definition": data.definition},
        "size": {"before": tree_bytes(trees[0]), "after": tree_bytes(trees[1])},
        "evaluation": scores,
        "leaves": [dataclasses.asdict(leaf) | {"error": leaf.error} for leaf in leaves],
        "versions": provenance.versions,
        "timestamp": provenance.timestamp,
        "recipe": recipe.text,
    }


def _write_weights(
    folder: Path, recipe: Recipe, model: Model, params: Any, provenance: Any, report: Progress
) -> None:
    from jaxweights.checkpoint import save_tree, write_safetensors
    from jaxweights.models import checkpoint_from_params, config_to_dict
    from jaxweights.weights import materialize

    formats = recipe.output.formats
    files = companion_files(model)
    for done, form in enumerate(formats):
        report("Writing weights", done, len(formats))
        if form == "orbax":
            config = config_to_dict(model.pretrained.config)
            extra = {name: file for name, file in files.items() if name != "config.json"}
            save_tree(folder / "orbax", params, config=config, provenance=provenance, files=extra)
        else:
            dense = jax.tree.map(np.asarray, materialize(params))
            tensors = checkpoint_from_params(dense, model.pretrained.config)
            tensors |= dict(model.pretrained.carried)
            write_safetensors(
                folder / "safetensors",
                tensors,
                metadata={"jaxweights": provenance.to_json()},
                files=files,
            )
    report("Writing weights", len(formats), len(formats))


def _write_report(
    folder: Path,
    recipe: Recipe,
    summary: dict[str, Any],
    leaves: tuple[LeafResult, ...],
    panels: dict[str, Any],
    report: Progress,
) -> None:
    from jaxweights.recipes._report import render_report

    (folder / "recipe.yaml").write_text(recipe.text, encoding="utf-8")
    (folder / "result.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    if recipe.output.report:
        report("Writing the report", 0, 1)
        page = render_report(summary | {"spectra": panels}, leaves)
        (folder / "report.html").write_text(page, encoding="utf-8")
        report("Writing the report", 1, 1)
