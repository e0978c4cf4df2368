"""mergekit's methods: their parameters, and the jobs that do the same here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxweights.recipes.mergekit._delta_methods import COUNT, della_method, delta_method
from jaxweights.recipes.mergekit._method import (
    ARITHMETIC,
    WEIGHT,
    Inputs,
    Method,
    names_of,
    on_base,
    transformed,
)
from jaxweights.recipes.mergekit._parameters import REQUIRED, Parameter
from jaxweights.stream._jobs import Job

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


# Spheres, and methods that look at more than an entry.


def _slerp(inputs: Inputs) -> Job:
    from jaxweights.merge import slerp

    return on_base(inputs, slerp, t=inputs.values["t"], compat=inputs.mode)


def _with_or_without_base(inputs: Inputs, make: Callable[..., Any], **settings: Any) -> Job:
    """A method of the library that merges deltas where there is a base, and models where not."""
    if inputs.base is not None:
        return on_base(inputs, make, deltas=True, **settings)
    tx = make(**settings, names=names_of(inputs), out_dtype=inputs.dtype)
    return transformed(inputs, tx, inputs.models, leaf_is_model=True)


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
    tx = karcher(**settings, names=names_of(inputs), out_dtype=inputs.dtype)
    return transformed(inputs, tx, inputs.models, leaf_is_model=True)


def _model_stock(inputs: Inputs) -> Job:
    from jaxweights.merge import model_stock

    group = "output" if inputs.values["filter_wise"] and len(inputs.shape) > 1 else "leaf"
    return on_base(inputs, model_stock, group=group, compat=inputs.mode)


def _nearswap(inputs: Inputs) -> Job:
    from jaxweights.merge import nearswap

    return on_base(inputs, nearswap, t=inputs.values["t"])


def _arcee_fusion(inputs: Inputs) -> Job:
    from jaxweights.merge import arcee_fusion

    return on_base(inputs, arcee_fusion, compat=inputs.mode)


def _sce(inputs: Inputs) -> Job:
    from jaxweights.merge import sce

    density = min(inputs.values["select_topk"], 1.0)
    return on_base(inputs, sce, density=density, compat=inputs.mode)


def _ram(inputs: Inputs) -> Job:
    from jaxweights.merge import ram

    return on_base(inputs, ram, epsilon=inputs.values["epsilon"])


def _ramplus(inputs: Inputs) -> Job:
    from jaxweights.merge import ram_plus

    values = inputs.values
    settings = {"epsilon": values["epsilon"], "gain": values["r"], "most": values["alpha"]}
    return on_base(inputs, ram_plus, **settings)


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
        (ARITHMETIC,),
    ),
    "passthrough": Method(
        {"scale": Parameter(float, "model", None)}, "unused", (1, 1), _passthrough
    ),
    "task_arithmetic": delta_method("none", False, normalize=False, rescale=False),
    "ties": delta_method("magnitude", True, normalize=True, rescale=False, differs=(COUNT,)),
    "dare_linear": delta_method("bernoulli", False, normalize=False, rescale=True),
    "dare_ties": delta_method("bernoulli", True, normalize=False, rescale=True),
    "breadcrumbs": delta_method(
        "outliers", False, normalize=False, rescale=False, extra=_GAMMA, differs=(COUNT,)
    ),
    "breadcrumbs_ties": delta_method(
        "outliers", True, normalize=False, rescale=False, extra=_GAMMA, differs=(COUNT,)
    ),
    "della": della_method(True, True),
    "della_linear": della_method(False, False),
    "slerp": Method(_T, "required", (1, 1), _slerp, (_ANGLES,)),
    "nuslerp": Method(
        {
            "weight": WEIGHT,
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
            "weight": WEIGHT,
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
        (
            "Quartiles are exact; mergekit draws a million entries of large tensors.",
            "Divergences are in float32; those of mergekit in bfloat16 are mostly rounding noise, "
            "and about one entry in 25 is copied by one and kept by the other.",
        ),
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
    "ram": Method({"epsilon": _EPSILON}, "required", (1, None), _ram, (ARITHMETIC,)),
    "ramplus_tl": Method(
        {
            "r": Parameter(float, "all", 0.1),
            "alpha": Parameter(float, "all", 0.2),
            "epsilon": _EPSILON,
        },
        "required",
        (1, None),
        _ramplus,
        (ARITHMETIC,),
    ),
}
