"""Runs a recipe block by block, for models that do not fit in memory."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax

from jaxweights.core import flatten
from jaxweights.models import load_tokenizer
from jaxweights.recipes._bytes import say_bytes
from jaxweights.recipes._download import Progress
from jaxweights.recipes._findings import Findings, Seen
from jaxweights.recipes._measure import perplexity_windows, prepare_calibration
from jaxweights.recipes._model import Model, check_fit, locate
from jaxweights.recipes._plan_recipe import plan_steps
from jaxweights.recipes._recipe import Recipe
from jaxweights.recipes._run import Clock, RunResult, flatten_folder, write_report
from jaxweights.recipes._summary import provenance_of, summarize
from jaxweights.recipes.onload._block_files import BlockFiles
from jaxweights.recipes.onload._layers import Layers
from jaxweights.recipes.onload._measure import BlockMeasure
from jaxweights.recipes.onload._run import BlockRun
from jaxweights.recipes.onload._work import refuse_outside, work_folder, write_blocks

_NAME = "jaxweights run"


def run_blocks(
    recipe: Recipe,
    directory: Path,
    clock: Clock,
    report: Progress,
    *,
    overwrite: bool,
    resume: bool,
) -> RunResult:
    """The run of a model of which one block of layers is in memory at a time."""
    with clock("load"):
        path, name, words = locate(recipe.model, progress=report)
        layers = Layers(_NAME, path, dequantize=recipe.model.dequantize)
        tokens = layers.pretrained.tokenizer_path is not None
        tokenizer = load_tokenizer(layers.pretrained) if tokens else None
        model = Model(name, words, layers.pretrained, tokenizer)
        check_fit(recipe, model)
        recipe = recipe.for_model(layers.pretrained.config)
        layout, plan = plan_steps(recipe, model, ())
        refuse_outside(_NAME, layers, [leaf.path for leaf in plan.changed])
        data = prepare_calibration(recipe, model, report)
        run = BlockRun(
            _NAME,
            layers,
            [step.transform for step in recipe.steps],
            [] if data is None else data.batches,
            again="never" if recipe.calibrate is None else recipe.calibrate.again,
            key=jax.random.key(recipe.seed),
            memory=recipe.memory,
        )
        measure = _Measured.of(recipe, model, layers, run, report)
    findings = Findings(recipe, layout, flatten(model.params)[0])
    source = layers.pretrained.source.fingerprint(sampled=True)
    # The result is the same whatever may be held.
    identity = {"source": source, "recipe": re.sub(r"(?m)^memory:.*\n", "", recipe.text)}
    with work_folder(_NAME, directory, identity=identity, overwrite=overwrite, resume=resume) as (
        folder,
        kept,
    ):
        with clock("change"):
            files = run.run(
                kept,
                look=lambda *leaf: dataclasses.asdict(findings.look(*leaf)),
                progress=report,
            )
        scores: dict[str, Any] = {}
        if measure is not None:
            with clock("measure"):
                scores = measure.scores(kept / "measure", files, report)
        _look_back(findings, files, layers)
        leaves = findings.leaves()
        provenance = provenance_of(recipe, model, leaves, sampled=True)
        with clock("write"):
            for form in recipe.output.formats:
                write_blocks(
                    folder / form, form, layers, files, provenance=provenance, progress=report
                )
        sizes = {
            "before": sum(leaf.bytes_before for leaf in leaves),
            "after": sum(leaf.bytes_after for leaf in leaves),
            "on_disk": flatten_folder(folder, recipe),
        }
        summary = summarize(recipe, model, sizes, scores, data, leaves, provenance)
        summary["seconds"] = clock.seconds
        panels = findings.spectra() if recipe.output.report else {}
        write_report(folder, recipe, summary, leaves, panels, report)
    return RunResult(directory, summary, leaves, None)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Perplexity, as a run in memory measures it.

    Args:
      blocks: Measures it.
      definition: What it is.
    """

    blocks: BlockMeasure
    definition: str

    @classmethod
    def of(
        cls, recipe: Recipe, model: Model, layers: Layers, run: BlockRun, report: Progress
    ) -> _Measured | None:
        """What a recipe asks for, if it does.

        Raises:
          ValueError: If the memory does not suffice.
        """
        section = recipe.evaluate.perplexity
        if section is None:
            return None
        tokens, definition = perplexity_windows(section, recipe, model, report)
        blocks = BlockMeasure(_NAME, layers, run.programs, tokens, section.batch)
        needed = run.needed.process + blocks.needed
        if recipe.memory is not None and needed > recipe.memory:
            raise ValueError(
                f"{_NAME}: memory={say_bytes(recipe.memory)} does not suffice to measure: it takes "
                f"about {say_bytes(needed)}. Give {say_bytes(needed)} or more, take shorter "
                "windows, or leave `evaluate` out."
            )
        return cls(blocks, definition)

    def scores(self, folder: Path, files: BlockFiles, report: Progress) -> dict[str, Any]:
        """Scores before and behind the change, as `result.json` has them."""
        found = self.blocks.run(folder, files, report)
        scored = {when: dataclasses.asdict(score) for when, score in found.items()}
        return {"perplexity": scored | {"definition": self.definition}}


def _look_back(findings: Findings, files: Any, layers: Layers) -> None:
    """Takes in what an earlier run saw of the blocks that it finished."""
    for layer in range(layers.count):
        for path, said in files.said(layer).items():
            pair = None if said["spectra"] is None else tuple(said["spectra"])
            one = said | {"errors": tuple(said["errors"]), "spectra": pair}
            findings.add(path, Seen(**one))
