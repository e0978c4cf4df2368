"""mergekit's configuration, checked strictly: what it would ignore is an error here."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from jaxweights.recipes._check import (
    MISSING,
    Problems,
    describe,
    read,
    read_keys,
    unknown_key,
    without_nulls,
)
from jaxweights.recipes._yaml import Located, RecipeError, parse_yaml_documents
from jaxweights.recipes.mergekit._chat_templates import AUTO, CHAT_TEMPLATES
from jaxweights.recipes.mergekit._method import Compat
from jaxweights.recipes.mergekit._methods import METHODS
from jaxweights.recipes.mergekit._model_ref import ModelRef, read_model
from jaxweights.recipes.mergekit._parameters import Setting, check_share, read_setting
from jaxweights.recipes.mergekit._tokenizer_rules import TokenizerRules, read_tokenizer

DTYPES = ("float32", "float16", "bfloat16")
_ORIGIN = "jaxweights merge"
# Parameters of all methods: what one of them does not have is no typo, but is ignored by mergekit.
_KINDS = {name: p.kind for method in METHODS.values() for name, p in method.parameters.items()}
# How mergekit stores signs on the way; without effect on any value, for any method.
_WITHOUT_EFFECT = ("int8_mask",)
# Keys of files for other programs, and what there is instead.
_OTHERS = {
    "experts": "This is a configuration of mergekit-moe, which builds another architecture. "
    "jaxweights.merge.upcycle and jaxweights.models.mixtral_checkpoint do so from Python.",
    "transforms": "This is a recipe. Run it with `jaxweights run`.",
    "genome": "This is a configuration of mergekit-evolve. jaxweights.merge.evolution searches "
    "for coefficients with a score of your own.",
}

# A key of slices that mergekit reads and does not use.
_RESIDUAL = "residual_weight"

Settings = dict[str, Setting]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, or a range of its layers, and the settings that are its own.

    Args:
      model: Which model.
      layers: First layer, and the one behind the last; None for all.
      parameters: Settings by name.
      line: Where it stands.
    """

    model: ModelRef
    layers: tuple[int, int] | None
    parameters: Settings
    line: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """Layers of the result that are merged from layers of the sources.

    Args:
      sources: As many layers of each.
      base_model: The base, where it differs from the configuration's.
      parameters: Settings by name.
      line: Where it stands.
    """

    sources: tuple[Source, ...]
    base_model: ModelRef | None
    parameters: Settings
    line: int


@dataclasses.dataclass(frozen=True)
class Module:
    """A tower of the model, or all of it.

    Args:
      name: What the configuration calls it; None for the whole model.
      slices: What is merged; one slice without layers where the module has `models`.
      parameters: Settings by name, between those of slices and those for all.
      line: Where it stands.
    """

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Settings
    line: int

    @property
    def is_sliced(self) -> bool:
        """Whether layers are chosen."""
        return self.slices[0].sources[0].layers is not None


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """One document.

    Args:
      file: The file.
      name: What later documents call the result.
      method: A key of `METHODS`.
      base_model: The base.
      modules: What is merged; one without a name where the document has `models` or `slices`.
      parameters: Settings for all.
      dtype: Dtype that inputs are rounded to before they are merged.
      out_dtype: Dtype that is written; None takes `dtype`, or else that of the base.
      tokenizer: Where the vocabulary comes from, and rules for its rows; None leaves it alone.
      chat_template: A template that is written: its text, the name of a usual one, or `"auto"` for
        the one that most models have.
      line: Where it starts.
    """

    file: str
    name: str | None
    method: str
    base_model: ModelRef | None
    modules: tuple[Module, ...]
    parameters: Settings
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerRules | None
    chat_template: str | None
    line: int

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """Every model that is read, the base first."""
        found = {} if self.base_model is None else {self.base_model: None}
        for part in (part for module in self.modules for part in module.slices):
            found |= {} if part.base_model is None else {part.base_model: None}
            found |= {source.model: None for source in part.sources}
        if self.tokenizer is not None and isinstance(self.tokenizer.source, ModelRef):
            found[self.tokenizer.source] = None
        return tuple(found)

    @property
    def settings(self) -> tuple[tuple[str, Setting], ...]:
        """Every parameter that is given at any level, with its name."""
        parts = [part for module in self.modules for part in module.slices]
        levels = [self.parameters]
        levels += [holder.parameters for holder in (*self.modules, *parts)]
        levels += [source.parameters for part in parts for source in part.sources]
        return tuple(pair for level in levels for pair in level.items())

    @property
    def unused(self) -> dict[str, Setting]:
        """Parameters that the method does not have, by name."""
        known = METHODS[self.method].parameters if self.method in METHODS else _KINDS
        return {
            name: setting
            for name, setting in self.settings
            if name not in known and name not in _WITHOUT_EFFECT
        }


def load_merge_config(
    path: str | os.PathLike[str], *, compat: Compat = "fixed"
) -> list[MergeConfig]:
    """Reads a configuration; several documents build on each other by name.

    Args:
      path: A YAML file as mergekit reads it.
      compat: `"mergekit"` lets pass parameters that this method ignores, and shares above 1.

    Returns:
      Its documents.

    Raises:
      RecipeError: If anything in it is unknown, misspelt or of the wrong type; all problems, with
        their lines, in one message.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "merge.yml"
      >>> _ = file.write_text("{merge_method: linear, models: [{model: a}, {model: b}]}")
      >>> load_merge_config(file)[0].method
      'linear'
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{_ORIGIN}: '{path}' cannot be read: {error}.") from None
    problems = Problems(str(path))
    configs = [
        _document(node, str(path), problems)
        for node in parse_yaml_documents(text, str(path), aliases=True)
    ]
    configs = [config for config in configs if config is not MISSING]
    for config in configs if compat == "fixed" else ():
        for name, setting in config.unused.items():
            problems.add(
                setting.line,
                f"{config.method} has no parameter {name!r}: mergekit ignores it. Leave it out, or "
                "say --compat mergekit to have it ignored here, too.",
            )
    for name, setting in (pair for config in configs for pair in config.settings):
        check_share(name, setting, problems, most=1 if compat == "fixed" else math.inf)
    problems.check()
    return configs


_KEYS = {
    "name": str,
    "merge_method": str,
    "models": Any,
    "slices": Any,
    "modules": Any,
    "base_model": Any,
    "parameters": Any,
    "dtype": Any,
    "out_dtype": Any,
    "tokenizer": Any,
    "tokenizer_source": Any,
    "chat_template": str,
}


def _document(node: Located, file: str, problems: Problems) -> Any:
    node = without_nulls(node, _KEYS)
    for key in _OTHERS:
        if isinstance(node.value, dict) and key in node.value:
            problems.add(node.keys[key], f"{key}: {_OTHERS[key]}")
            return MISSING
    values = read_keys(node, _KEYS, ["merge_method"], "configuration", problems)
    if not isinstance(node.value, dict):
        return MISSING
    keys: dict[str, Located] = node.value
    method = values["merge_method"] if values is not MISSING else None
    if method is not None and method not in METHODS:
        problems.add(keys["merge_method"].line, unknown_key(method, METHODS, "merge_method"))
        method = None
    given = [key for key in ("models", "slices", "modules") if key in keys]
    if len(given) != 1:
        problems.add(
            node.line,
            f"has {' and '.join(map(repr, given)) or 'none'} of 'models', 'slices' and 'modules'. "
            "Give exactly one of them.",
        )
        return MISSING
    settings = _settings(keys.get("parameters"), method, "parameters", problems)
    modules = _modules(given[0], keys[given[0]], method, problems)
    for key in ("dtype", "out_dtype"):
        if key in keys and keys[key].value not in (*DTYPES, None):
            problems.add(
                keys[key].line,
                f"{key}: is {describe(keys[key])}. It must be one of {', '.join(DTYPES)}.",
            )
    if "tokenizer" in keys and "tokenizer_source" in keys:
        problems.add(keys["tokenizer"].line, "has 'tokenizer' and 'tokenizer_source'. Give one.")
    return MergeConfig(
        file=file,
        name=keys["name"].value if "name" in keys else None,
        method=method or "",
        base_model=read_model(keys["base_model"], "base_model", problems)
        if "base_model" in keys
        else None,
        modules=modules,
        parameters=settings,
        dtype=keys["dtype"].value if "dtype" in keys else None,
        out_dtype=keys["out_dtype"].value if "out_dtype" in keys else None,
        tokenizer=read_tokenizer(keys, problems),
        chat_template=_chat_template(keys.get("chat_template"), problems),
        line=node.line,
    )


def _chat_template(node: Located | None, problems: Problems) -> str | None:
    if node is None or not isinstance(node.value, str):
        return None
    if "{" not in node.value and node.value != AUTO and node.value not in CHAT_TEMPLATES:
        problems.add(
            node.line,
            f"chat_template: is {describe(node)}. It must be {AUTO!r}, one of "
            f"{', '.join(map(repr, CHAT_TEMPLATES))}, or the text of a Jinja template.",
        )
    return node.value


def _modules(
    kind: str, node: Located, method: str | None, problems: Problems
) -> tuple[Module, ...]:
    if kind != "modules":
        return (Module(None, _slices(kind, node, method, problems), {}, node.line),)
    if not isinstance(node.value, dict) or not node.value:
        problems.add(node.line, f"modules: is {describe(node)}. It must be a mapping by name.")
        return ()
    found = [_module(name, inner, method, problems) for name, inner in node.value.items()]
    return tuple(module for module in found if module is not None)


def _module(name: str, node: Located, method: str | None, problems: Problems) -> Module | None:
    where = f"modules.{name}"
    kinds = {"models": Any, "slices": Any, "parameters": Any}
    if read_keys(node, kinds, [], where, problems) is MISSING:
        return None
    given = [key for key in ("models", "slices") if key in node.value]
    if len(given) != 1:
        problems.add(node.line, f"{where}: must have one of 'models' and 'slices'.")
        return None
    slices = _slices(given[0], node.value[given[0]], method, problems)
    settings = _settings(node.value.get("parameters"), method, where, problems)
    return Module(name, slices, settings, node.line)


def _slices(kind: str, node: Located, method: str | None, problems: Problems) -> tuple[Slice, ...]:
    if not isinstance(node.value, list) or not node.value:
        problems.add(node.line, f"{kind}: is {describe(node)}. It must be a list.")
        return ()
    if kind == "models":
        sources = [_source(item, f"models[{i}]", False, method, problems)
                   for i, item in enumerate(node.value)]  # fmt: skip
        found = tuple(source for source in sources if source is not None)
        return (Slice(found, None, {}, node.line),)
    slices = [_slice(item, f"slices[{i}]", method, problems) for i, item in enumerate(node.value)]
    return tuple(part for part in slices if part is not None)


def _slice(node: Located, where: str, method: str | None, problems: Problems) -> Slice | None:
    keys = {"sources": Any, "base_model": Any, "parameters": Any, _RESIDUAL: Any}
    node = without_nulls(node, keys)
    if read_keys(node, keys, ["sources"], where, problems) is MISSING:
        return None
    sources = node.value["sources"]
    if not isinstance(sources.value, list) or not sources.value:
        problems.add(sources.line, f"{where}.sources: is {describe(sources)}. It must be a list.")
        return None
    found = [
        _source(item, f"{where}.sources[{i}]", True, method, problems)
        for i, item in enumerate(sources.value)
    ]
    base = node.value.get("base_model")
    settings = _settings(node.value.get("parameters"), method, where, problems)
    if _RESIDUAL in node.value:
        settings[_RESIDUAL] = Setting((), node.value[_RESIDUAL].line)
    part = Slice(
        tuple(source for source in found if source is not None),
        None if base is None else read_model(base, f"{where}.base_model", problems),
        settings,
        node.line,
    )
    lengths = {s.layers[1] - s.layers[0] for s in part.sources if s.layers is not None}
    if len(lengths) > 1:
        problems.add(
            node.line,
            f"{where}: its sources have {' and '.join(map(str, sorted(lengths)))} layers. Layers "
            "are merged one by one, so give ranges of one length.",
        )
    return part


def _source(
    node: Located, where: str, ranged: bool, method: str | None, problems: Problems
) -> Source | None:
    keys = {"model": Any, "parameters": Any} | ({"layer_range": Any} if ranged else {})
    required = ["model", "layer_range"] if ranged else ["model"]
    if read_keys(node, keys, required, where, problems) is MISSING:
        return None
    layers = None
    if ranged:
        layers = read(node.value["layer_range"], tuple[int, int], f"{where}.layer_range", problems)
        if layers is MISSING:
            return None
        if not 0 <= layers[0] < layers[1]:
            problems.add(
                node.value["layer_range"].line,
                f"{where}.layer_range: is {list(layers)}. It must be [first, one behind the last].",
            )
    model = read_model(node.value["model"], f"{where}.model", problems)
    settings = _settings(node.value.get("parameters"), method, where, problems)
    return None if model is None else Source(model, layers, settings, node.line)


def _settings(node: Located | None, method: str | None, where: str, problems: Problems) -> Settings:
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        problems.add(node.line, f"{where}.parameters: is {describe(node)}. It must be a mapping.")
        return {}
    known = METHODS[method].parameters if method else _KINDS
    found = {}
    for name, value in node.value.items():
        if method and name not in _KINDS:
            problems.add(node.keys[name], unknown_key(name, known, f"parameters of {method}"))
            continue
        setting = read_setting(value, _KINDS.get(name), name, problems)
        if setting is not None:
            found[name] = setting
    return found
