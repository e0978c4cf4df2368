"""A merge method of mergekit: its parameters, and what makes the job that does the same here."""

from __future__ import annotations

import dataclasses
import re
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


WEIGHT = Parameter(float, "tuned", REQUIRED)
ARITHMETIC = "Arithmetic is in float32 whatever `dtype` says, with one cast at the end."


def transformed(
    inputs: Inputs, tx: Any, operands: Sequence[Operand], *, leaf_is_model: bool = False
) -> Job:
    """A job that runs a transform of the library on one tensor."""
    from jaxweights.stream._transform import transform_job
    from jaxweights.weights._axes import Axes

    rank = len(inputs.shape)
    # Checkpoints that mergekit reads hold torch's orientation: outputs first.
    layout = {}
    if rank >= 2:
        layout = {re.escape(inputs.name): Axes(inputs=tuple(range(1 - rank, 0)), outputs=(-rank,))}
    return transform_job(
        inputs.name,
        operands,
        tx,
        dtype=inputs.dtype,
        layout=layout,
        seed=inputs.seed,
        leaf_is_model=leaf_is_model,
    )


def names_of(inputs: Inputs) -> list[str]:
    return [operand.label for operand in inputs.models]


def on_base(inputs: Inputs, make: Callable[..., Any], **settings: Any) -> Job:
    """A method of the library whose tree is the base."""
    assert inputs.base is not None
    tx = make(**settings, names=names_of(inputs), out_dtype=inputs.dtype)
    return transformed(inputs, tx, (inputs.base, *inputs.models))
