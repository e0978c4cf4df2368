"""mergekit's methods: their parameters, and the jobs that do the same here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxweights.recipes.mergekit._parameters import REQUIRED, Parameter
from jaxweights.stream._jobs import Job, Operand

Base = Literal["required", "optional", "unused"]


Compat = Literal["fixed", "mergekit"]


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
      compat: Whether to repeat what mergekit does where it loses something.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    base: Operand | None
    models: tuple[Operand, ...]
    values: Mapping[str, Any]
    seed: int
    compat: Compat

    @property
    def mode(self) -> Literal["paper", "mergekit"]:
        """What the library calls it."""
        return "mergekit" if self.compat == "mergekit" else "paper"


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
    return _mean(inputs, inputs.values["weight"], normalize=inputs.values["normalize"])


def _passthrough(inputs: Inputs) -> Job:
    [operand], [scale] = inputs.models, inputs.values["scale"]
    if scale is None and operand.dtype == inputs.dtype:
        return Job(inputs.name, inputs.shape, inputs.dtype, (operand,))
    return _mean(inputs, [1.0 if scale is None else scale], normalize=False)


def _mean(inputs: Inputs, weights: Sequence[float], *, normalize: bool) -> Job:
    from jaxweights.stream._mean import mean_job

    return mean_job(inputs.name, inputs.dtype, inputs.models, weights=weights, normalize=normalize)


def _names(inputs: Inputs) -> list[str]:
    return [operand.label for operand in inputs.models]


# Spheres, and methods of two or more models that look at whole tensors.


def _slerp(inputs: Inputs) -> Job:
    from jaxweights.stream._slerp import slerp_job

    assert inputs.base is not None
    cosine = 0.9995 if inputs.compat == "mergekit" else None
    ends = (inputs.base, inputs.models[0])
    return slerp_job(inputs.name, inputs.dtype, ends, t=inputs.values["t"], lerp_cosine=cosine)


def _on_base(inputs: Inputs, make: Callable[..., Any], **settings: Any) -> Job:
    """A method of the library whose tree is the base."""
    assert inputs.base is not None
    tx = make(**settings, names=_names(inputs), out_dtype=inputs.dtype)
    return _transformed(inputs, tx, (inputs.base, *inputs.models))


def _with_or_without_base(inputs: Inputs, make: Callable[..., Any], **settings: Any) -> Job:
    """A method of the library that merges deltas where there is a base, and models where not."""
    if inputs.base is not None:
        return _on_base(inputs, make, deltas=True, **settings)
    tx = make(**settings, names=_names(inputs), out_dtype=inputs.dtype)
    return _transformed(inputs, tx, inputs.models, leaf_is_model=True)


def _nuslerp(inputs: Inputs) -> Job:
    from jaxweights.merge import nuslerp

    values = inputs.values
    group = "leaf"
    if not values["nuslerp_flatten"] and len(inputs.shape) > 1:
        group = "input" if values["nuslerp_row_wise"] else "output"
    settings = {"weights": values["weight"], "group": group, "compat": inputs.mode}
    return _with_or_without_base(inputs, nuslerp, antipodal="lerp", **settings)


def _multislerp(inputs: Inputs) -> Job:
    from jaxweights.merge import multislerp

    values = inputs.values
    settings = {"weights": values["weight"], "normalize": values["normalize_weights"]}
    return _with_or_without_base(inputs, multislerp, **settings)


def _karcher(inputs: Inputs) -> Job:
    from jaxweights.merge import karcher

    settings: dict[str, Any] = {"compat": inputs.mode}
    if inputs.compat == "mergekit":
        settings |= {"steps": inputs.values["max_iter"], "tolerance": inputs.values["tol"]}
    tx = karcher(**settings, names=_names(inputs), out_dtype=inputs.dtype)
    return _transformed(inputs, tx, inputs.models, leaf_is_model=True)


def _model_stock(inputs: Inputs) -> Job:
    from jaxweights.merge import model_stock

    group = "output" if inputs.values["filter_wise"] and len(inputs.shape) > 1 else "leaf"
    return _on_base(inputs, model_stock, group=group, compat=inputs.mode)


def _nearswap(inputs: Inputs) -> Job:
    from jaxweights.merge import nearswap

    return _on_base(inputs, nearswap, t=inputs.values["t"])


def _arcee_fusion(inputs: Inputs) -> Job:
    from jaxweights.merge import arcee_fusion

    return _on_base(inputs, arcee_fusion, compat=inputs.mode)


def _sce(inputs: Inputs) -> Job:
    from jaxweights.merge import sce

    return _on_base(inputs, sce, density=inputs.values["select_topk"], compat=inputs.mode)


def _ram(inputs: Inputs) -> Job:
    from jaxweights.merge import ram

    return _on_base(inputs, ram, epsilon=inputs.values["epsilon"])


def _ramplus(inputs: Inputs) -> Job:
    from jaxweights.merge import ram_plus

    values = inputs.values
    settings = {"epsilon": values["epsilon"], "gain": values["r"], "most": values["alpha"]}
    return _on_base(inputs, ram_plus, **settings)


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
        return _on_base(
            inputs,
            della if self.consensus else della_linear,
            weights=values["weight"],
            density=values["density"],
            epsilon=epsilon,
            normalize=values["normalize"],
            rescale=None if values["rescale"] else "none",
            scale=values["lambda"],
            compat="mergekit",
        )


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


def _della(consensus: bool, normalize: bool) -> Method:
    table = _delta("none", consensus, normalize=normalize, rescale=True)
    epsilon = {"epsilon": Parameter(float, "tuned", 0.15)}
    parameters = dict(table.parameters) | epsilon
    return dataclasses.replace(table, parameters=parameters, job=_Della(consensus))


_T = {"t": Parameter(float, "all", REQUIRED)}
_ANGLES = (
    "Angles come from lengths of differences and sums, which tell apart models whose cosine rounds "
    "to 1; mergekit interpolates linearly above a cosine of 0.9995."
)
_EPSILON = Parameter(float, "all", 1e-5)
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
    "della": _della(True, True),
    "della_linear": _della(False, False),
    "slerp": Method(_T, "required", (1, 1), _slerp, (_ANGLES,)),
    "nuslerp": Method(
        {
            "weight": _WEIGHT,
            "nuslerp_flatten": Parameter(bool, "all", True),
            "nuslerp_row_wise": Parameter(bool, "all", False),
        },
        "optional",
        (2, 2),
        _nuslerp,
        ("Weights that sum to zero are an error; mergekit takes them as equal.",),
    ),
    "multislerp": Method(
        {
            "weight": _WEIGHT,
            "normalize_weights": Parameter(bool, "all", True),
            "eps": Parameter(float, "all", 1e-8),
        },
        "optional",
        (1, None),
        _multislerp,
        ("No epsilon is added to norms.",),
    ),
    "karcher": Method(
        {"max_iter": Parameter(int, "all", 10), "tol": Parameter(float, "all", 1e-5)},
        "unused",
        (1, None),
        _karcher,
        ("The iteration runs to its end; max_iter and tol are not needed.",),
    ),
    "model_stock": Method(
        {"filter_wise": Parameter(bool, "all", False)},
        "required",
        (2, None),
        _model_stock,
        (
            "Cosines of small deltas are exact; mergekit divides by 1e-6 at least, which pulls "
            "small tensors to the base.",
            "The share of the mean is kept in [0, 1].",
        ),
    ),
    "nearswap": Method(_T, "required", (1, 1), _nearswap),
    "arcee_fusion": Method(
        {},
        "required",
        (1, 1),
        _arcee_fusion,
        ("Quartiles are exact; mergekit draws a million entries of large tensors.",),
    ),
    "sce": Method(
        {
            "select_topk": Parameter(float, "all", 1.0),
            "int8_mask": Parameter(bool, "all", False),
        },
        "required",
        (1, None),
        _sce,
        (
            "Models are weighted by their energy however small it is; mergekit's weights are equal "
            "where mean squares sum to less than 1e-6.",
        ),
    ),
    "ram": Method({"epsilon": _EPSILON}, "required", (1, None), _ram, (_ARITHMETIC,)),
    "ramplus_tl": Method(
        {
            "r": Parameter(float, "all", 0.1),
            "alpha": Parameter(float, "all", 0.2),
            "epsilon": _EPSILON,
        },
        "required",
        (1, None),
        _ramplus,
        (_ARITHMETIC,),
    ),
}
