"""A recipe: its file read and checked before any work is done."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxweights.core._chain import chain
from jaxweights.core._partition import Rule, partition
from jaxweights.core._paths import Path as LeafPath
from jaxweights.core._paths import check_pattern, matching
from jaxweights.core._transform import Transform, identity
from jaxweights.recipes._check import (
    MISSING,
    Problems,
    read,
    read_keys,
    settings_of,
)
from jaxweights.recipes._methods import Factory, find_method
from jaxweights.recipes._recipe_memory import check_memory
from jaxweights.recipes._sections import Calibrate, Distill, Evaluate, ModelSource, Output
from jaxweights.recipes._yaml import Located, RecipeError, parse_yaml

if TYPE_CHECKING:
    from jaxweights.models import BertConfig, LlamaConfig
    from jaxweights.quantize import Fold

    ModelConfig = LlamaConfig | BertConfig

Stream = Literal["auto", "always", "never"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One entry of `transforms`.

    Attributes:
      method: Name, such as `sparsify.wanda`.
      settings: What its factory was given.
      match: Patterns of the leaves it acts on; empty leaves the choice to the method.
      exempt: Patterns of the leaves it passes over (`except` in the file).
      transform: What it does.
      line: Line in the file.
      plain: The same, not restricted to the leaves that `match` and `exempt` name.
      with_folds: The same as `plain`, given the folds of the model; None where the step does not
        ask for them by `folds: model`. Until it is given, `plain` has none.
    """

    method: str
    settings: dict[str, Any]
    match: tuple[str, ...]
    exempt: tuple[str, ...]
    transform: Transform
    line: int
    plain: Transform
    with_folds: Callable[[tuple[Fold, ...]], Transform] | None = None

    def given(self, folds: tuple[Fold, ...]) -> Step:
        """The step, with the folds of the model where it asks for them."""
        if self.with_folds is None:
            return self
        plain = self.with_folds(folds)
        transform = _select(plain, self.match, self.exempt)
        return dataclasses.replace(self, plain=plain, transform=transform)

    def on(self, path: LeafPath) -> Transform | None:
        """What is done to a tree of this leaf alone; None where the step passes over it."""
        if any(matching(pattern, [path]) for pattern in self.exempt):
            return None
        if not self.match:
            return self.plain.on(path)
        named = any(matching(pattern, [path]) for pattern in self.match)
        return self.transform.on(path) if named else None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
      name: The file's name, for errors.
      text: The file, word for word.
      model: What is changed.
      steps: The changes, in order.
      output: What is written.
      models: Other models, for methods that merge.
      calibrate: Text for statistics.
      distill: How the result is trained towards the original, if it is.
      evaluate: What is measured.
      seed: Seed of the methods that draw random numbers.
      stream: Whether the model is changed tensor by tensor instead of in memory: `auto` does it
        for models that would fill much of the memory, where the recipe allows it.
      memory: Most bytes that the process may hold: the model is changed block by block of its
        layers, statistics included; None holds all of it. `4GB` in the file.
      lines: Line of each section.
    """

    name: str
    text: str
    model: ModelSource
    steps: tuple[Step, ...]
    output: Output
    models: tuple[ModelSource, ...] = ()
    calibrate: Calibrate | None = None
    distill: Distill | None = None
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    seed: int = 0
    stream: Stream = "auto"
    memory: int | None = None
    lines: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def transform(self) -> Transform:
        """All steps as one transform."""
        return chain(*(step.transform for step in self.steps))

    def for_model(self, config: ModelConfig) -> Recipe:
        """The recipe, with the folds of a model where steps ask for them by `folds: model`."""
        from jaxweights.models import LlamaConfig
        from jaxweights.quantize import bert_folds, llama_folds

        is_llama = isinstance(config, LlamaConfig)
        folds = llama_folds(config) if is_llama else bert_folds(config)
        return dataclasses.replace(self, steps=tuple(step.given(folds) for step in self.steps))


_SECTIONS = {
    "model": ModelSource,
    "models": tuple[ModelSource, ...],
    "calibrate": Calibrate | None,
    "distill": Distill | None,
    "evaluate": Evaluate | None,
    "output": Output,
    "seed": int,
    "stream": Stream,
    "memory": str | int,
}


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads and checks a recipe file.

    Args:
      path: A YAML file; those in `configs/` explain every key.

    Returns:
      The recipe, with its transforms built.

    Raises:
      RecipeError: If anything is wrong; every problem is listed with its line.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "recipe.yaml"
      >>> _ = file.write_text('''
      ... model: {path: my-model}
      ... transforms:
      ...   - method: quantize.round_to_nearest
      ...     bits: 4
      ... output: {directory: runs/mine}
      ... ''')
      >>> load_recipe(file).steps[0].settings
      {'bits': 4}
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text, so it is no recipe.") from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path}: is a folder. A recipe is a YAML file, whose model: {{path: {path}}} names "
            "a folder; those in configs/ explain every key."
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from None
    return parse_recipe(text, name=os.fspath(path))


def parse_recipe(text: str, *, name: str = "recipe") -> Recipe:
    """Checks a recipe's text.

    Args:
      text: YAML.
      name: What errors call it.

    Returns:
      The recipe.

    Raises:
      RecipeError: If anything is wrong; every problem is listed with its line.

    Example:
      >>> recipe = parse_recipe('''
      ... model: {path: my-model}
      ... transforms:
      ...   - method: quantize.round_to_nearest
      ...     bits: 4
      ... output: {directory: runs/mine}
      ... ''')
      >>> recipe.steps[0].settings
      {'bits': 4}
    """
    root = parse_yaml(text, name=name)
    problems = Problems(name)
    if not isinstance(root.value, dict):
        problems.add(root.line, "a recipe is a mapping with `model`, `transforms` and `output`.")
        problems.check()
    if "merge_method" in root.value:
        problems.add(
            root.keys["merge_method"],
            f"is a merge configuration, no recipe. Run it with `jaxweights merge {name} OUT`.",
        )
        problems.check()
    steps_node = root.value.get("transforms")
    sections = read_sections(root, problems)
    steps = () if steps_node is None else _read_steps(steps_node, problems)
    if "calibrate" not in root.value:
        for step in steps:
            if step.transform.reads_statistics:
                problems.add(
                    step.line,
                    f"{step.method} reads statistics of the model's inputs, but the recipe has no "
                    "`calibrate` section. Add one, or take a method that needs none.",
                )
        if sections.get("distill") is not None:
            problems.add(
                root.keys["distill"],
                "distill trains on the sequences of `calibrate`, but the recipe has no such "
                "section. Add one, or remove it.",
            )
    evaluate = sections.get("evaluate")
    if evaluate is not None and evaluate.curve is not None and not sections.get("models"):
        problems.add(
            root.keys["evaluate"],
            "evaluate.curve is measured on the way to `models`, but the recipe has none. Add them, "
            "or remove it.",
        )
    calibrate = sections.get("calibrate")
    if calibrate is None or calibrate.again == "never":
        _check_chain(steps, problems)
    if calibrate is not None and calibrate.again != "each_block":
        _check_alone(steps, problems)
    check_memory(root, sections, steps, problems)
    problems.check()
    values = {key: value for key, value in sections.items() if value is not None}
    lines = {"": root.line, **_lines(root)}
    return Recipe(name=name, text=text, steps=steps, lines=lines, **values)


def _check_chain(steps: tuple[Step, ...], problems: Problems) -> None:
    """Refuses a step that reads statistics which an earlier one has made wrong."""
    mover = None
    for step in steps:
        if mover is not None and step.transform.reads_statistics:
            problems.add(
                step.line,
                f"{step.method} reads statistics, but {mover} before it moves or rescales input "
                "axes, after which they are wrong. Add `again: each_step` to `calibrate`.",
            )
        mover = step.method if step.transform.moves_inputs else mover


def _check_alone(steps: tuple[Step, ...], problems: Problems) -> None:
    """Refuses a step that compares blocks of layers where they are not gone through one by one."""
    for step in steps:
        for name in filter(step.settings.get, ("error_propagation", "asymmetric_calibration")):
            problems.add(
                step.line,
                f"{step.method}: {name} compares every block of layers with the "
                "original one, so they are gone through one by one. Add `again: each_block` to "
                "`calibrate`.",
            )


def read_sections(root: Located, problems: Problems) -> dict[str, Any]:
    """Reads all sections but `transforms`, which the methods' own signatures check."""
    annotations = _SECTIONS | {"transforms": Any}
    rest = Located(root.value, root.line, root.keys)
    values = read_keys(rest, annotations, ("model", "transforms", "output"), "recipe", problems)
    if values is MISSING:
        return {}
    values.pop("transforms")
    return values


def _read_steps(node: Located, problems: Problems) -> tuple[Step, ...]:
    if not isinstance(node.value, list) or not node.value:
        problems.add(
            node.line,
            "transforms: must be a list of steps, each with a `method`, such as "
            "`- method: sparsify.wanda`.",
        )
        return ()
    steps = [_read_step(item, f"transforms[{i}]", problems) for i, item in enumerate(node.value)]
    return tuple(step for step in steps if step is not None)


def _read_step(node: Located, where: str, problems: Problems) -> Step | None:
    if not isinstance(node.value, dict) or "method" not in node.value:
        problems.add(node.line, f"{where}: a step is a mapping with a `method` and its settings.")
        return None
    name = read(node.value["method"], str, f"{where}.method", problems)
    if name is MISSING:
        return None
    try:
        factory = find_method(name)
    except ValueError as error:
        problems.add(node.keys["method"], f"{where}: {error}")
        return None
    annotations, required = settings_of(factory)
    patterns = str | tuple[str, ...] | None
    common = {"method": str, "match": patterns, "except": patterns}
    # A method around another, such as `quantizer: {method: quantize.gptq, bits: 3}`.
    nested = [key for key, annotation in annotations.items() if annotation is Transform]
    annotations |= dict.fromkeys(nested, Any)
    folds = node.value.get("folds")
    if "folds" in annotations and folds is not None and isinstance(folds.value, str):
        annotations["folds"] = Literal["model"]  # the architecture's, known once the model is
    # A setting that is called as an entry of every step keeps its default.
    values = read_keys(node, annotations | common, required, name, problems)
    if values is MISSING:
        return None
    settings = {key: value for key, value in values.items() if key not in common}
    inner = {
        key: _read_step(node.value[key], f"{name}.{key}", problems)
        for key in nested
        if key in settings
    }
    if None in inner.values():
        return None
    match, exempt = _patterns(values.get("match")), _patterns(values.get("except"))
    try:
        for key, pattern in [*(("match", p) for p in match), *(("except", p) for p in exempt)]:
            line = node.keys[key]
            check_pattern(name, pattern)
        line = node.keys["method"]
        make = _maker(factory, settings, {key: step for key, step in inner.items() if step})
        plain = make(())
    except (ValueError, TypeError) as error:
        problems.add(line, str(error))
        return None
    asks = settings.get("folds") == "model" or any(s and s.with_folds for s in inner.values())
    return Step(
        name,
        settings,
        match,
        exempt,
        _select(plain, match, exempt),
        node.keys["method"],
        plain,
        make if asks else None,
    )


def _maker(
    factory: Factory, settings: Mapping[str, Any], inner: Mapping[str, Step]
) -> Callable[[tuple[Fold, ...]], Transform]:
    """Makes a step's transform from the folds of the model."""

    def make(folds: tuple[Fold, ...]) -> Transform:
        given = {"folds": folds} if settings.get("folds") == "model" else {}
        steps = {key: step.given(folds).transform for key, step in inner.items()}
        return factory(**{**settings, **given, **steps})

    return make


def _patterns(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _select(transform: Transform, match: tuple[str, ...], exempt: tuple[str, ...]) -> Transform:
    """Restricts a transform to the leaves that a step names."""
    if not match and not exempt:
        return transform
    rules: list[Rule] = [(pattern, identity()) for pattern in exempt]
    rules += [(pattern, transform) for pattern in match] if match else [(..., transform)]
    return partition(*rules)


def _lines(node: Located, prefix: str = "") -> dict[str, int]:
    """Line of every key, by its dotted name."""
    lines = {}
    for key, line in node.keys.items():
        lines[prefix + key] = line
        lines |= _lines(node.value[key], f"{prefix}{key}.")
    return lines
