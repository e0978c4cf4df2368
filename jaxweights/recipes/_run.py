"""Runs a recipe: loads, measures, calibrates, changes, measures again, writes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.calibrate import calibrate, pipeline
from jaxweights.checkpoint import atomic_directory
from jaxweights.checkpoint._check_destination import check_destination
from jaxweights.checkpoint._json import sayable
from jaxweights.core import Context, Transform, apply, chain, flatten
from jaxweights.core._leafwise import describe_nonfinite
from jaxweights.core._paths import fail
from jaxweights.recipes._download import Progress
from jaxweights.recipes._free_memory import refuse_large_model, refuse_short_memory
from jaxweights.recipes._leaves import (
    LeafResult,
    compare_leaves,
    spectra,
    tree_bytes,
)
from jaxweights.recipes._measure import (
    CalibrationData,
    measure_curves,
    prepare_calibration,
    prepare_measures,
)
from jaxweights.recipes._model import Model, check_fit, load_model, locate
from jaxweights.recipes._plan_recipe import plan_steps
from jaxweights.recipes._recipe import Recipe, Step
from jaxweights.recipes._report import render_report
from jaxweights.recipes._sections import Distill
from jaxweights.recipes._stream import Streaming, outline_model, streams
from jaxweights.recipes._summary import provenance_of, summarize
from jaxweights.recipes._write import (
    check_formats,
    write_checkpoint,
)
from jaxweights.weights import materialize


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
      directory: Where it was written.
      summary: Everything that was found out, as `result.json` holds it.
      leaves: What became of each leaf.
      params: The parameters, with represented weights; None where the model was streamed.
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
    resume: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Runs a recipe from its model to its report.

    Everything that can be refused is refused before the long work: a destination that exists, a
    pattern that matches nothing, a text that is too short. The destination appears whole at the
    end, or not at all.

    A model that is changed tensor by tensor (`stream` in the recipe) or block by block (`memory`)
    is written and reported on in the same way, but its parameters are not returned.

    Args:
      recipe: A checked recipe.
      output: Where to write, in place of the recipe's own directory.
      overwrite: Whether an existing directory may be replaced, in one step, at the end.
      resume: Whether to go on where a killed run of a recipe with `memory` stopped.
      progress: Called with (task, done, total).

    Returns:
      What was found out, and the changed parameters.

    Raises:
      FileExistsError: If the destination exists and `overwrite` is False.
      RecipeError: If the recipe does not suit the model.
      ValueError: If a weight of the model is not finite, or a text is too short.

    Example:
      >>> import json, tempfile
      >>> import jax.numpy as jnp, jaxweights as jw
      >>> config = jw.models.LlamaConfig(
      ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2
      ... )
      >>> tokens = jnp.zeros((1, 4), jnp.int32)
      >>> params = jw.models.build(config).init(jax.random.key(0), tokens)["params"]
      >>> folder = Path(tempfile.mkdtemp())
      >>> jw.checkpoint.write_safetensors(
      ...     folder / "model",
      ...     jw.models.checkpoint_from_params(params, config),
      ...     files={"config.json": json.dumps(jw.models.config_to_dict(config))},
      ... )
      >>> recipe = jw.recipes.parse_recipe(f'''
      ... model: {{path: {folder}/model}}
      ... transforms: [{{method: quantize.round_to_nearest, bits: 4, group_size: 32}}]
      ... output: {{directory: {folder}/small, formats: [safetensors], report: false}}
      ... ''')
      >>> result = run_recipe(recipe)
      >>> sorted(path.name for path in (folder / "small").iterdir())
      ['recipe.yaml', 'result.json', 'safetensors']
    """
    report = progress or (lambda task, done, total: None)
    clock = Clock()
    directory = Path(output or recipe.output.directory)
    check_destination("jaxweights run", directory, overwrite=overwrite, directory=True)
    _refuse_unrelated(directory)
    if recipe.memory is not None:
        from jaxweights.recipes._run_blocks import run_blocks

        return run_blocks(recipe, directory, clock, report, overwrite=overwrite, resume=resume)
    if resume:
        raise ValueError(
            "jaxweights run: only runs block by block can be gone on with. Give the recipe a "
            "`memory`, such as memory: 4GB, or start anew, without resuming."
        )
    if streams(recipe, progress=report):
        return _run_stream(recipe, directory, clock, report, overwrite=overwrite)

    with clock("load"):
        refuse_large_model(locate(recipe.model, progress=report)[0])
        model = load_model(recipe.model, progress=report)
        others = tuple(load_model(m, progress=report).params for m in recipe.models)
        check_fit(recipe, model)
        recipe = recipe.for_model(model.pretrained.config)
        _refuse_nonfinite(model)
        layout, _ = plan_steps(recipe, model, others)
        data = prepare_calibration(recipe, model, report)
        refuse_short_memory(recipe, model, data)
        measures = prepare_measures(recipe, model, report)
    before = model.params
    with clock("measure before"):
        scores: dict[str, dict[str, Any]] = {
            m.name: {"before": m.score(before, "before")} for m in measures
        }
    with clock("change"):
        after = _transform(recipe, model, others, layout, data, report)
        jax.block_until_ready(jax.tree.leaves(after))
    losses: list[float] = []
    if recipe.distill is not None and data is not None:
        with clock("distill"):
            after, losses = _distill(recipe.distill, model, after, data, report)
    with clock("change"):
        check_formats(recipe.output.formats, model.pretrained, after)
    with clock("measure after"):
        for measure in measures:
            scores[measure.name]["after"] = measure.score(after, "after")
            scores[measure.name]["definition"] = measure.definition
        points, curves = recipe.evaluate.curve, None
        if points is not None:
            [scored] = [m for m in measures if m.name == "perplexity"]
            curves = measure_curves(scored, before, others, points)
    with clock("compare"):
        report("Comparing", 0, 1)
        leaves = compare_leaves(before, after, layout, recipe)
        panels = spectra(before, after, layout, leaves) if recipe.output.report else {}
        report("Comparing", 1, 1)

    provenance = provenance_of(recipe, model, leaves)
    sizes = {"before": tree_bytes(before), "after": tree_bytes(after)}
    summary = summarize(recipe, model, sizes, scores, data, leaves, provenance)
    if curves is not None:
        summary["curves"] = curves
    if losses:
        summary["distill"] = {"losses": losses}
    with atomic_directory(directory, overwrite=overwrite) as folder:
        with clock("write"):
            _write_weights(folder, recipe, model, after, provenance, report)
        summary["seconds"] = clock.seconds
        summary["size"]["on_disk"] = flatten_folder(folder, recipe)
        write_report(folder, recipe, summary, leaves, panels, report)
    return RunResult(directory, summary, leaves, after)


def _run_stream(
    recipe: Recipe, directory: Path, clock: Clock, report: Progress, *, overwrite: bool
) -> RunResult:
    """The run of a model that is never in memory as a whole."""
    with clock("load"):
        model, places = outline_model(recipe.model, progress=report)
        others = tuple(outline_model(m, progress=report)[1] for m in recipe.models)
        check_fit(recipe, model)
        recipe = recipe.for_model(model.pretrained.config)
        layout, _ = plan_steps(recipe, model, tuple(other.pretrained.params for other in others))
    streaming = Streaming(recipe, model, places, others, layout)
    with atomic_directory(directory, overwrite=overwrite) as folder:
        with clock("change"):
            said = {"name": Path(recipe.name).name, "yaml": recipe.text}
            streaming.write(folder / "safetensors", recipe=said, progress=report)
        leaves = streaming.findings.leaves()
        provenance = provenance_of(recipe, model, leaves, sampled=True)
        sizes = {
            "before": sum(leaf.bytes_before for leaf in leaves),
            "after": sum(leaf.bytes_after for leaf in leaves),
            "on_disk": flatten_folder(folder, recipe),
        }
        summary = summarize(recipe, model, sizes, {}, None, leaves, provenance)
        summary["seconds"] = clock.seconds
        panels = streaming.findings.spectra() if recipe.output.report else {}
        write_report(folder, recipe, summary, leaves, panels, report)
    return RunResult(directory, summary, leaves, None)


class Clock:
    """Seconds that the parts of a run took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = self.seconds.get(part, 0.0) + time.perf_counter() - start
        self.seconds[part] = round(spent, 2)


def _refuse_nonfinite(model: Model) -> None:
    """Names every weight that holds NaN or infinity, before all that they would spoil."""
    bad = [
        (path, leaf)
        for path, leaf in flatten(model.params)[0].items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        and not np.isfinite(np.asarray(materialize(leaf))).all()
    ]
    fail("jaxweights run", [describe_nonfinite(path, leaf) for path, leaf in bad])


def _refuse_unrelated(directory: Path) -> None:
    """Refuses to overwrite a folder that no run made: all that it holds would be lost."""
    if not directory.is_dir() or (directory / "result.json").is_file():
        return
    entries = sorted(entry.name for entry in directory.iterdir())
    if entries:
        raise FileExistsError(
            f"jaxweights run: '{directory}' is a folder that no run made; it holds {entries[:5]}, "
            "which overwriting would remove. Nothing was written. Choose another folder."
        )


def _transform(
    recipe: Recipe,
    model: Model,
    others: tuple[Any, ...],
    layout: Any,
    data: CalibrationData | None,
    report: Progress,
) -> Any:
    key = jax.random.key(recipe.seed)
    steps = _watched(recipe, report)
    section = recipe.calibrate

    def calibrating(what: str, done: int, total: int | None) -> None:
        del what
        report("Calibrating", done, total or 0)

    if section is not None and section.again != "never" and data is not None:
        return pipeline(
            model.forward,
            model.params,
            data.batches,
            steps,
            block_by_block=section.again == "each_block",
            loss=model.loss if model.is_decoder else None,
            key=key,
            progress=calibrating,
        )
    transform, stats = chain(*steps), None
    needs = transform.needs(model.params)
    if needs and data is not None:
        stats = calibrate(
            model.forward,
            model.params,
            data.batches,
            needs=needs,
            loss=model.loss if model.is_decoder else None,
            progress=calibrating,
        )
    return apply(
        transform, model.params, stats=stats, models=others or None, key=key, layout=layout
    )


def _distill(
    section: Distill, model: Model, params: Any, data: CalibrationData, report: Progress
) -> tuple[Any, list[float]]:
    """The parameters, trained to give the outputs of the original, and the losses on the way."""
    from jaxweights.quantize import distill

    settings = dataclasses.asdict(section)
    settings["loss"] = section.loss or ("divergence" if model.is_decoder else "squared")
    found = distill(
        model.forward,
        model.params,
        params,
        data.batches,
        **settings,
        progress=lambda what, done, total: report("Distilling", done, total or 0),
    )
    return found.params, np.asarray(found.losses, float).tolist()


def _watched(recipe: Recipe, report: Progress) -> list[Transform]:
    """The steps' transforms, each reporting its leaves under its own name."""

    def watch(number: int, step: Step) -> Transform:
        task = f"Step {number} of {len(recipe.steps)}: {step.method}"

        def show(path: Path | str, done: int, total: int) -> None:
            report(task, done, total)

        def update(params: Any, state: Any, context: Context) -> tuple[Any, Any]:
            return step.transform.update(params, state, dataclasses.replace(context, progress=show))

        return dataclasses.replace(step.transform, update=update)

    return [watch(number, step) for number, step in enumerate(recipe.steps, start=1)]


def _write_weights(
    folder: Path, recipe: Recipe, model: Model, params: Any, provenance: Any, report: Progress
) -> None:
    formats = recipe.output.formats
    for done, form in enumerate(formats):
        report("Writing weights", done, len(formats))
        write_checkpoint(folder / form, form, model.pretrained, params, provenance=provenance)
    report("Writing weights", len(formats), len(formats))


def flatten_folder(folder: Path, recipe: Recipe) -> dict[str, int]:
    """Bytes of each format on the disk; moves the files of a flat one into the folder itself."""
    sizes = {form: _folder_bytes(folder / form) for form in recipe.output.formats}
    if recipe.output.flat:
        [form] = recipe.output.formats
        # A file of the checkpoint may have the name of its folder.
        inner = (folder / form).rename(folder / ".weights")
        for entry in sorted(inner.iterdir()):
            entry.rename(folder / entry.name)
        inner.rmdir()
    return sizes


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_report(
    folder: Path,
    recipe: Recipe,
    summary: dict[str, Any],
    leaves: tuple[LeafResult, ...],
    panels: dict[str, Any],
    report: Progress,
) -> None:
    (folder / "recipe.yaml").write_text(recipe.text, encoding="utf-8")
    (folder / "result.json").write_text(
        json.dumps(sayable(summary), indent=1, ensure_ascii=False, allow_nan=False),
        encoding="utf-8",
    )
    if recipe.output.report:
        report("Writing the report", 0, 1)
        page = render_report(summary | {"spectra": panels}, leaves)
        (folder / "report.html").write_text(page, encoding="utf-8")
        report("Writing the report", 1, 1)
