"""What a run leaves as a record: `result.json`, and the provenance of its weights."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from jaxweights.checkpoint import Provenance
from jaxweights.recipes._leaves import LeafResult, provenance_errors
from jaxweights.recipes._measure import CalibrationData
from jaxweights.recipes._model import Model
from jaxweights.recipes._recipe import Recipe


def provenance_of(
    recipe: Recipe, model: Model, leaves: tuple[LeafResult, ...], *, sampled: bool = False
) -> Provenance:
    """How the weights came about; `sampled` reads parts of a source that is too large to read."""
    return Provenance.collect(
        recipe={"name": Path(recipe.name).name, "yaml": recipe.text},
        source=model.pretrained.source.fingerprint(sampled=sampled),
        errors=provenance_errors(leaves),
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def summarize(
    recipe: Recipe,
    model: Model,
    sizes: dict[str, Any],
    scores: dict[str, Any],
    data: CalibrationData | None,
    leaves: tuple[LeafResult, ...],
    provenance: Provenance,
) -> dict[str, Any]:
    """Everything that was found out, as `result.json` holds it."""
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
        "size": sizes,
        "evaluation": scores,
        "leaves": [dataclasses.asdict(leaf) | {"error": leaf.error} for leaf in leaves],
        "versions": provenance.versions,
        "timestamp": provenance.timestamp,
        "recipe": recipe.text,
    }
