"""From a configuration to one job for every tensor of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jaxweights.recipes._yaml import RecipeError
from jaxweights.recipes.mergekit._config import MergeConfig, Module, Slice, Source
from jaxweights.recipes.mergekit._method import Compat, Inputs
from jaxweights.recipes.mergekit._methods import METHODS
from jaxweights.recipes.mergekit._model_ref import ModelRef
from jaxweights.recipes.mergekit._models import LayerName, Model, is_before_layers
from jaxweights.recipes.mergekit._parameters import REQUIRED, Setting
from jaxweights.stream._jobs import Job, Operand

_LISTED = 10


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result.

    Args:
      job: What makes it.
      method: The method, or `"copy"`.
      depth: Where it stands, from 0 to 1; gradients are read off there.
      inputs: Names of the tensors that it is made of, by model.
      parameters: Resolved values; those that each model has are by model.
    """

    job: Job
    method: str
    depth: float
    inputs: dict[str, str]
    parameters: dict[str, Any]


class Planner:
    """Plans the tensors of one module; everything wrong is one error.

    Args:
      config: The document.
      module: The module.
      models: The opened models, with the module's tensors.
      compat: `"mergekit"` repeats its habits where they lose something.
      missing: `"take"` merges a tensor from the models that have it; `"error"` refuses.
      seed: For random methods.
    """

    def __init__(
        self,
        config: MergeConfig,
        module: Module,
        models: Mapping[ModelRef, Model],
        *,
        compat: Compat = "fixed",
        missing: Literal["error", "take"] = "error",
        seed: int = 0,
    ):
        """Checks what does not depend on tensors."""
        self._config = config
        self._module = with_base(config, module) if compat == "mergekit" else module
        self._models = models
        self._method = METHODS[config.method]
        self._compat: Compat = compat
        self._missing = missing
        self._seed = seed
        self._problems: list[str] = []

    def plan(self) -> list[PlannedTensor]:
        """The tensors, in the order of the reference model's.

        Raises:
          RecipeError: If models do not fit each other or the method; all problems at once.
        """
        for part in self._module.slices:
            self._check_models(part)
        self._raise()
        planned = []
        for tensor in self._tensors():
            found = self._plan_tensor(*tensor)
            if found is not None:
                planned.append(found)
        self._raise()
        return planned

    def _raise(self) -> None:
        if self._problems:
            shown = self._problems[:_LISTED]
            if len(self._problems) > _LISTED:
                shown.append(f"and {len(self._problems) - _LISTED} more problems")
            raise RecipeError("\n".join(f"{self._config.file}: {problem}" for problem in shown))

    def _base_of(self, part: Slice) -> ModelRef | None:
        return part.base_model or self._config.base_model

    def _check_models(self, part: Slice) -> None:
        method = self._config.method
        base = self._base_of(part)
        if self._method.base == "required" and base is None:
            self._problems.append(f"{method} needs a 'base_model'. Name the model that the others "
                                  "were tuned from.")  # fmt: skip
        others = [s.model for s in part.sources if self._method.merges_base or s.model != base]
        least, most = self._method.models
        if len(others) < least or (most is not None and len(others) > most):
            wanted = f"{least}" if most == least else f"{least} or more"
            self._problems.append(
                f"line {part.line}: {method} merges {wanted} model{'s' if wanted != '1' else ''}"
                f"{'' if self._method.merges_base else ' besides the base'}, not {len(others)}."
            )
        seen = [s.model for s in part.sources]
        twice = {str(model) for model in seen if seen.count(model) > 1}
        if twice:
            self._problems.append(
                f"line {part.line}: {sorted(twice)} stand twice in one slice. Add their weights."
            )
        for source in part.sources:
            if source.layers is None:
                continue
            stacks = self._models[source.model].stacks
            if len(stacks) != 1:
                self._problems.append(
                    f"line {source.line}: {source.model} has {len(stacks)} stacks of layers, "
                    f"{sorted(stacks)}, so 'layer_range' is ambiguous. Merge whole models."
                )
            elif source.layers[1] > next(iter(stacks.values())):
                self._problems.append(
                    f"line {source.line}: layer_range {list(source.layers)} goes beyond the "
                    f"{next(iter(stacks.values()))} layers of {source.model}."
                )
        if not self._module.slices:
            self._problems.append("has nothing to merge.")

    def _tensors(self) -> Iterable[tuple[str, Slice, dict[ModelRef, str], float]]:
        """Name, slice, name in each model, and depth of every tensor."""
        slices = self._module.slices
        if not self._module.is_sliced:
            part = slices[0]
            refs = self._refs(part)
            reference = self._models[refs[0]]
            for name in self._names(refs):
                yield name, part, dict.fromkeys(refs, name), self._depth(reference, name)
            return
        yield from self._sliced(slices)

    def _refs(self, part: Slice) -> list[ModelRef]:
        """Models of a slice, the base first."""
        base = self._base_of(part)
        found = {} if base is None else {base: None}
        return list(found | {source.model: None for source in part.sources})

    def _names(self, refs: Sequence[ModelRef]) -> list[str]:
        names = dict.fromkeys(self._models[refs[0]].names)
        for ref in refs[1:]:
            extra = [name for name in self._models[ref].names if name not in names]
            if extra and self._missing == "error":
                self._problems.append(
                    f"{self._models[ref].label} has {extra[:5]}"
                    f"{f' and {len(extra) - 5} more' if len(extra) > 5 else ''}, which "
                    f"{self._models[refs[0]].label} lacks. Are these models of one architecture? "
                    "To take such tensors from the model that has them, say --missing take."
                )
            names |= dict.fromkeys(extra)
        return list(names)

    def _sliced(
        self, slices: Sequence[Slice]
    ) -> Iterable[tuple[str, Slice, dict[ModelRef, str], float]]:
        first, last = slices[0], slices[-1]
        outside = [n for n in self._names(self._refs(first)) if LayerName.of(n) is None]
        yield from (
            (name, first, dict.fromkeys(self._refs(first), name), 0.0)
            for name in outside
            if is_before_layers(name)
        )
        offset = 0
        for part in slices:
            ranges = {s.model: s.layers for s in part.sources if s.layers is not None}
            start, stop = next(iter(ranges.values()))
            reference = self._models[next(iter(ranges))]
            for i in range(stop - start):
                depth = i / (stop - start - 1) if stop - start > 1 else 1.0
                for name in reference.names:
                    parts = LayerName.of(name)
                    if parts is None or parts.layer != start + i:
                        continue
                    names = {model: parts.at(r[0] + i) for model, r in ranges.items()}
                    base = self._base_of(part)
                    if base is not None and base not in names:
                        names[base] = name
                    yield parts.at(offset + i), part, names, depth
            offset += stop - start
        after = self._module.slices[-1]
        depth = 0.0 if self._compat == "mergekit" else 1.0
        outside = [n for n in self._names(self._refs(last)) if LayerName.of(n) is None]
        yield from (
            (name, after, dict.fromkeys(self._refs(after), name), depth)
            for name in outside
            if not is_before_layers(name)
        )

    def _depth(self, reference: Model, name: str) -> float:
        if LayerName.of(name) is None and self._compat == "mergekit":
            return 0.0
        return reference.depth(name) if name in reference.known else 1.0

    def _plan_tensor(
        self, name: str, part: Slice, names: dict[ModelRef, str], depth: float
    ) -> PlannedTensor | None:
        held = {ref: own for ref, own in names.items() if own in self._models[ref].known}
        absent = [ref for ref in names if ref not in held]
        if absent and self._missing == "error":
            self._problems.append(
                f"{name!r}: {', '.join(self._models[ref].label for ref in absent)} lacks it. Give "
                "models of one architecture, or say --missing take to merge it from the others."
            )
            return None
        operands = {
            ref: Operand(self._models[ref].tensors, own, self._models[ref].label)
            for ref, own in held.items()
        }
        if self._differ_in_shape(name, operands):
            return None
        base = self._base_of(part)
        first = operands[base] if base in operands else next(iter(operands.values()))
        dtype = written_dtype(self._config, first.dtype)
        sources = [s for s in part.sources if s.model in operands]
        if not self._method.merges_base:
            sources = [s for s in sources if s.model != base]
        labels = {operand.label: operand.name for operand in operands.values()}
        narrow = [o for o in operands.values() if _is_packed_float(o.dtype)]
        if narrow:
            self._problems.append(
                f"{name!r}: is {narrow[0].dtype} in {narrow[0].label}, whose values mean something "
                "with their scales only. Convert that checkpoint to bfloat16 first."
            )
            return None
        # Where some models lack a tensor, what is left may be too little for the method.
        baseless = base is not None and base not in operands and self._method.base != "unused"
        few = bool(absent) and (baseless or len(sources) < self._method.models[0])
        if not _is_float(first.dtype) or not sources or few:
            job = copied(name, first, dtype)
            return PlannedTensor(job, "copy", depth, {first.label: first.name}, {})
        values, shown = {}, {}
        for key, parameter in self._method.parameters.items():
            resolved = [
                self._resolve(
                    key, held[s.model] if parameter.scope != "all" else name, part, s, depth
                )
                for s in (sources if parameter.scope != "all" else sources[:1])
            ]
            if any(value is REQUIRED for value in resolved):
                lacking = [str(s.model) for s, v in zip(sources, resolved) if v is REQUIRED]
                of = "" if parameter.scope == "all" else f" for {', '.join(lacking)}"
                self._problems.append(
                    f"{name!r}: {self._config.method} needs the parameter {key!r}{of}. Give it "
                    "under the model's 'parameters', or for all under the document's."
                )
                return None
            if parameter.scope == "all":
                values[key] = shown[key] = resolved[0]
            else:
                values[key] = resolved
                shown[key] = dict(zip([str(s.model) for s in sources], resolved, strict=True))
        inputs = Inputs(
            name,
            first.shape,
            dtype,
            operands.get(base) if base is not None else None,
            tuple(operands[s.model] for s in sources),
            values,
            self._seed,
            self._compat,
        )
        try:
            job = self._method.job(inputs)
        except ValueError as error:
            self._problems.append(f"{name!r}: {error}")
            return None
        return PlannedTensor(job, self._config.method, depth, labels, shown)

    def _resolve(self, key: str, name: str, part: Slice, source: Any, depth: float) -> Any:
        parameter = self._method.parameters[key]
        levels: list[Mapping[str, Setting]] = [
            source.parameters if parameter.scope != "all" else {},
            part.parameters,
            self._module.parameters,
            self._config.parameters,
        ]
        for level in levels:
            if key in level and (value := level[key].at(name, depth)) is not None:
                return value
        return parameter.default

    def _differ_in_shape(self, name: str, operands: Mapping[ModelRef, Operand]) -> bool:
        shapes = {operand.label: operand.shape for operand in operands.values()}
        if len(set(shapes.values())) == 1:
            return False
        words = ", ".join(f"{shape} in {label}" for label, shape in shapes.items())
        tails = {shape[1:] for shape in shapes.values()}
        remedy = "Models that are merged must be of one architecture."
        if len(tails) == 1 and len(next(iter(tails))) == 1:
            remedy = (
                "Where vocabularies differ, say which one the result has with 'tokenizer_source: "
                "union' (or 'base', or a model)."
            )
        self._problems.append(f"{name!r}: is {words}. {remedy}")
        return True


def adds_base(config: MergeConfig) -> bool:
    """Whether mergekit merges a base that is not listed, with a method that has no base.

    It appends the base to every list of `models` that lacks it.
    """
    whole = [module for module in config.modules if not module.is_sliced]
    return any(with_base(config, module) != module for module in whole)


def with_base(config: MergeConfig, module: Module) -> Module:
    """The module with the models that mergekit merges."""
    base, unused = config.base_model, METHODS[config.method].merges_base
    if base is None or not unused or not module.slices or module.is_sliced:
        return module
    [part] = module.slices
    if base in [source.model for source in part.sources]:
        return module
    source = Source(base, None, {}, part.line)
    part = dataclasses.replace(part, sources=(*part.sources, source))
    return dataclasses.replace(module, slices=(part,))


def written_dtype(config: MergeConfig, stored: np.dtype) -> np.dtype:
    """The dtype in which a tensor is written."""
    wanted = config.out_dtype or config.dtype
    return stored if wanted is None or not _is_float(stored) else np.dtype(_DTYPES[wanted])


_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def copied(name: str, operand: Operand, dtype: np.dtype) -> Job:
    """The job that takes a tensor over, in the dtype of the result."""
    if operand.dtype == dtype:
        return Job(name, operand.shape, dtype, (operand,))
    values = {"scale": [None]}
    return METHODS["passthrough"].job(
        Inputs(name, operand.shape, dtype, None, (operand,), values, 0, "fixed")
    )


def _is_packed_float(dtype: np.dtype) -> bool:
    """Whether it is a float too narrow to be merged, such as those of 8 bits."""
    return dtype.itemsize == 1 and "float" in dtype.name


def _is_float(dtype: np.dtype) -> bool:
    return dtype in (np.dtype(t) for t in (*_DTYPES.values(), np.float64))
