"""mergekit's methods: their parameters, and the jobs that do the same here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxweights.recipes.mergekit._parameters import REQUIRED, Parameter
from jaxweights.stream._jobs import Job, Operand

Base = Literal["required", "optional", "unused"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One tensor of the result: what it is made of, with every parameter resolved.

    Args:
      name: Its name.
      shape: Its shape.
      dtype: Dtype that is written.
      base: The base's tensor, if there is one.
      models: Those of the models that are merged; the base is among them only where the method
        has a parameter for it.
      values: Resolved parameters: one value, or one for each of `models`.
      seed: For random methods.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    base: Operand | None
    models: tuple[Operand, ...]
    values: Mapping[str, Any]
    seed: int


@dataclasses.dataclass(frozen=True)
class Method:
    """One merge method.

    Args:
      parameters: What can be set, by name.
      base: Whether it needs a base.
      models: Least and most models besides the base (None for any number).
      job: Makes the job of one tensor.
      differs: What is done otherwise than in mergekit, and why.
    """

    parameters: Mapping[str, Parameter]
    base: Base
    models: tuple[int, int | None]
    job: Callable[[Inputs], Job]
    differs: tuple[str, ...] = ()

    @property
    def merges_base(self) -> bool:
        """Whether the base is one of the models where it is listed among them."""
        return self.base == "unused"


_WEIGHT = Parameter(float, "tuned", REQUIRED)
_ARITHMETIC = "Arithmetic is in float32 whatever `dtype` says, with one cast at the end."
_DIVISOR = "Normalising divides by the sum of |weight|, so that a negative weight keeps its sign."
_COUNT = "At least one entry of a tensor is kept; a tensor with fewer entries than 1/gamma is kept."


def _transformed(
    inputs: Inputs, tx: Any, operands: Sequence[Operand], *, leaf_is_model: bool = False
) -> Job:
    """A job that runs a transform of the library on one tensor."""
    from jaxweights.stream._transform import transform_job
    from jaxweights.weights._axes import Axes

    rank = len(inputs.shape)
    # Checkpoints that mergekit reads hold torch's orientation: outputs first.
    layout = {}
    if rank >= 2:
        layout = {_exactly(inputs.name): Axes(inputs=tuple(range(1 - rank, 0)), outputs=(-rank,))}
    return transform_job(
        inputs.name,
        operands,
        tx,
        dtype=inputs.dtype,
        layout=layout,
        seed=inputs.seed,
        leaf_is_model=leaf_is_model,
    )


def _exactly(name: str) -> str:
    import re

    return re.escape(name)


# Averages and copies.


def _linear(inputs: Inputs) -> Job:
    from jaxweights.merge import mean

    tx = mean(
        weights=inputs.values["weight"],
        normalize=inputs.values["normalize"],
        out_dtype=inputs.dtype,
        names=_names(inputs),
    )
    return _transformed(inputs, tx, inputs.models, leaf_is_model=True)


def _passthrough(inputs: Inputs) -> Job:
    from jaxweights.merge import mean

    [operand], [scale] = inputs.models, inputs.values["scale"]
    if scale is None and operand.dtype == inputs.dtype:
        return Job(inputs.name, inputs.shape, inputs.dtype, (operand,))
    weight = 1.0 if scale is None else scale
    tx = mean(weights=[weight], normalize=False, out_dtype=inputs.dtype, names=_names(inputs))
    return _transformed(inputs, tx, inputs.models, leaf_is_model=True)


def _names(inputs: Inputs) -> list[str]:
    return [operand.label for operand in inputs.models]


# The table of delta merges.


@dataclasses.dataclass(frozen=True)
class _Delta:
    """A row of the table as mergekit means it: ranked and normed tensor by tensor."""

    sparsifier: Literal["none", "magnitude", "outliers", "bernoulli"]
    consensus: bool

    def __call__(self, inputs: Inputs) -> Job:
        from jaxweights.merge import delta_merge
        from jaxweights.merge._delta_leaf import Row
        from jaxweights.stream._delta import DeltaSettings, delta_job

        values, base = inputs.values, inputs.base
        assert base is not None
        n = len(inputs.models)
        densities = tuple(values["density"])
        thins = self.sparsifier != "none" and any(density < 1 for density in densities)
        sparsifier = self.sparsifier if thins else "none"
        rescale = "l1" if values["rescale"] and thins else "none"
        normalize = "none"
        if values["normalize"]:
            normalize = "entries" if self.consensus else "models"
        outliers = tuple(values["gamma"]) if sparsifier == "outliers" else (0.0,) * n
        consensus = "sum" if self.consensus else "none"
        if rescale == "l1" and sparsifier != "bernoulli":
            tx = delta_merge(
                sparsifier=sparsifier,
                density=densities,
                outliers=outliers,
                rescale="l1",
                weights=values["weight"],
                consensus=consensus,
                normalize=normalize,
                scale=values["lambda"],
                compat="mergekit",
                names=_names(inputs),
                out_dtype=inputs.dtype,
            )
            return _transformed(inputs, tx, (base, *inputs.models))
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
            models=tuple(_names(inputs)),
            seed=inputs.seed,
        )
        operands = (base, *inputs.models)
        return delta_job(inputs.name, inputs.shape, inputs.dtype, operands, settings)


def _delta(
    sparsifier: Any,
    consensus: bool,
    *,
    normalize: bool,
    rescale: bool,
    extra: Mapping[str, Parameter] | None = None,
    differs: tuple[str, ...] = (),
) -> Method:
    parameters = {
        "weight": _WEIGHT,
        "density": Parameter(float, "tuned", 1.0),
        **(extra or {}),
        "normalize": Parameter(bool, "all", normalize),
        "rescale": Parameter(bool, "all", rescale),
        "lambda": Parameter(float, "all", 1.0),
        # Only how mergekit stores signs on the way.
        "int8_mask": Parameter(bool, "all", False),
    }
    build = _Delta(sparsifier, consensus)
    return Method(parameters, "required", (1, None), build, (_ARITHMETIC, _DIVISOR, *differs))


_GAMMA = {"gamma": Parameter(float, "tuned", 0.01)}

METHODS: dict[str, Method] = {
    "linear": Method(
        {"weight": Parameter(float, "model", REQUIRED), "normalize": Parameter(bool, "all", True)},
        "unused",
        (1, None),
        _linear,
        (_ARITHMETIC,),
    ),
    "passthrough": Method(
        {"scale": Parameter(float, "model", None)}, "unused", (1, 1), _passthrough
    ),
    "task_arithmetic": _delta("none", False, normalize=False, rescale=False),
    "ties": _delta("magnitude", True, normalize=True, rescale=False, differs=(_COUNT,)),
    "dare_linear": _delta("bernoulli", False, normalize=False, rescale=True),
    "dare_ties": _delta("bernoulli", True, normalize=False, rescale=True),
    "breadcrumbs": _delta(
        "outliers", False, normalize=False, rescale=False, extra=_GAMMA, differs=(_COUNT,)
    ),
    "breadcrumbs_ties": _delta(
        "outliers", True, normalize=False, rescale=False, extra=_GAMMA, differs=(_COUNT,)
    ),
}
