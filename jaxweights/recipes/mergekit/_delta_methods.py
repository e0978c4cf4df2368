"""mergekit's merges of deltas: rows of one table, and DELLA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxweights.recipes.mergekit._method import (
    ARITHMETIC,
    WEIGHT,
    Inputs,
    Method,
    names_of,
    on_base,
)
from jaxweights.recipes.mergekit._parameters import Parameter
from jaxweights.stream._jobs import Job

DIVISOR = "Normalising divides by the sum of |weight|, so that a negative weight keeps its sign."
COUNT = "At least one entry of a tensor is kept; a tensor with fewer entries than 1/gamma is kept."


@dataclasses.dataclass(frozen=True)
class _Della:
    """DELLA, with or without the election of signs."""

    consensus: bool

    def __call__(self, inputs: Inputs) -> Job:
        from jaxweights.merge import della, della_linear

        values = inputs.values
        # An epsilon says nothing where nothing is dropped; mergekit's default would leave [0, 1].
        epsilon = [
            0.0 if density >= 1 else value
            for value, density in zip(values["epsilon"], values["density"], strict=True)
        ]
        return on_base(
            inputs,
            della if self.consensus else della_linear,
            weights=values["weight"],
            density=[min(density, 1.0) for density in values["density"]],
            epsilon=epsilon,
            normalize=values["normalize"],
            rescale=None if values["rescale"] else "none",
            scale=values["lambda"],
            compat="mergekit",
        )


@dataclasses.dataclass(frozen=True)
class _Delta:
    """A row of the table as mergekit means it: ranked and normed tensor by tensor."""

    sparsifier: Literal["none", "magnitude", "outliers", "bernoulli"]
    consensus: bool

    def __call__(self, inputs: Inputs) -> Job:
        from jaxweights.merge._delta_leaf import Row
        from jaxweights.stream._delta import delta_job
        from jaxweights.stream._delta_settings import DeltaSettings

        values, base = inputs.values, inputs.base
        assert base is not None
        n = len(inputs.models)
        densities = tuple(min(density, 1.0) for density in values["density"])
        thins = self.sparsifier != "none" and any(density < 1 for density in densities)
        sparsifier = self.sparsifier if thins else "none"
        rescale = "l1" if values["rescale"] and thins else "none"
        normalize = "none"
        if values["normalize"]:
            normalize = "entries" if self.consensus else "models"
        outliers = tuple(values["gamma"]) if sparsifier == "outliers" else (0.0,) * n
        consensus = "sum" if self.consensus else "none"
        row = Row(
            sparsifier=sparsifier,
            rescale=rescale,
            consensus=consensus,
            combine="sum",
            normalize=normalize,
            sign_ties="positive",
            scope="leaf",
            compat="mergekit",
        )
        settings = DeltaSettings(
            row=row,
            weights=tuple(values["weight"]),
            density=densities if thins else (1.0,) * n,
            outliers=outliers,
            scale=values["lambda"],
            models=tuple(names_of(inputs)),
            seed=inputs.seed,
        )
        operands = (base, *inputs.models)
        return delta_job(inputs.name, inputs.shape, inputs.dtype, operands, settings)


def delta_method(
    sparsifier: Any,
    consensus: bool,
    *,
    normalize: bool,
    rescale: bool,
    extra: Mapping[str, Parameter] | None = None,
    differs: tuple[str, ...] = (),
) -> Method:
    parameters = {
        "weight": WEIGHT,
        "density": Parameter(float, "tuned", 1.0),
        **(extra or {}),
        "normalize": Parameter(bool, "all", normalize),
        "rescale": Parameter(bool, "all", rescale),
        "lambda": Parameter(float, "all", 1.0),
        # Only how mergekit stores signs on the way.
        "int8_mask": Parameter(bool, "all", False),
    }
    build = _Delta(sparsifier, consensus)
    return Method(parameters, "required", (1, None), build, (ARITHMETIC, DIVISOR, *differs))


def della_method(consensus: bool, normalize: bool) -> Method:
    table = delta_method("none", consensus, normalize=normalize, rescale=True)
    epsilon = {"epsilon": Parameter(float, "tuned", 0.15)}
    parameters = dict(table.parameters) | epsilon
    return dataclasses.replace(table, parameters=parameters, job=_Della(consensus))
