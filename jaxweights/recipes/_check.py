"""Checks YAML values against type annotations, noting file and line of everything wrong."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Union

from jaxweights.core._paths import nearest
from jaxweights.recipes._yaml import Located, RecipeError

MISSING: Any = object()

_WORDS = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class Problems:
    """Everything found wrong in one recipe, to be raised together."""

    def __init__(self, name: str) -> None:
        """Starts with nothing wrong in the file called `name`."""
        self.name = name
        self._found: list[tuple[int, str]] = []

    def add(self, line: int, message: str) -> None:
        """Notes one problem on a line."""
        self._found.append((line, message))

    def __bool__(self) -> bool:
        return bool(self._found)

    def check(self) -> None:
        """Raises one error that lists every problem, in the order of the file."""
        if self._found:
            ordered = sorted(self._found, key=lambda item: item[0])
            raise RecipeError(
                "\n".join(f"{self.name}:{line}: {message}" for line, message in ordered)
            )


def read_dataclass(cls: type, node: Located, where: str, problems: Problems) -> Any:
    """Builds a dataclass from a mapping, whose keys and types must be those of its fields.

    Args:
      cls: A dataclass. A method `faults()` may list what else is wrong, as pairs of a field's name
        and a sentence.
      node: The mapping.
      where: What the mapping is, such as `calibrate`.
      problems: Where faults are noted.

    Returns:
      The instance, or `MISSING` if it could not be built.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    values = read_keys(node, {name: hints[name] for name in fields}, required, where, problems)
    if values is MISSING:
        return MISSING
    instance = cls(**values)
    faults = instance.faults() if hasattr(instance, "faults") else ()
    for field, fault in faults:
        problems.add(node.keys.get(field, node.line), f"{where}: {fault}")
    return MISSING if faults else instance


def read_keys(
    node: Located,
    annotations: Mapping[str, Any],
    required: Collection[str],
    where: str,
    problems: Problems,
) -> Any:
    """Reads a mapping whose keys are known: unknown, missing and mistyped ones are problems.

    Returns:
      A dict of values by key, or `MISSING` if anything was wrong.
    """
    if not isinstance(node.value, dict):
        problems.add(
            node.line,
            f"{where}: is {describe(node)}. It must be a mapping with the keys "
            f"{_listing(annotations)}.",
        )
        return MISSING
    fine = True
    for key in node.value:
        if key not in annotations:
            problems.add(node.keys[key], unknown_key(key, annotations, where))
            fine = False
    absent = [key for key in required if key not in node.value]
    if absent:
        problems.add(node.line, f"{where}: {_listing(absent)} is missing. Add it.")
        fine = False
    values = {}
    for key, annotation in annotations.items():
        if key in node.value:
            below = key if where == "recipe" else f"{where}.{key}"
            values[key] = read(node.value[key], annotation, below, problems)
            fine = fine and values[key] is not MISSING
    return values if fine else MISSING


def read(node: Located, annotation: Any, where: str, problems: Problems) -> Any:
    """Reads a value of the annotated type, or notes that it is none and returns `MISSING`.

    Lists become tuples where the annotation asks for a tuple. A type that YAML cannot express
    (a function, an array) is refused; text stands for a dtype.
    """
    record = _record(annotation)
    if record is not None and not (node.value is None and annotation is not record):
        return read_dataclass(record, node, where, problems)
    item = _record(next(iter(typing.get_args(annotation)), None))
    if item is not None and typing.get_origin(annotation) is tuple and isinstance(node.value, list):
        items = [
            read_dataclass(item, entry, f"{where}[{i}]", problems)
            for i, entry in enumerate(node.value)
        ]
        return MISSING if any(entry is MISSING for entry in items) else tuple(items)
    value = _convert(node, annotation)
    if value is not MISSING:
        return value
    choices = _choices(annotation)
    hint = ""
    if choices and isinstance(node.value, str):
        hint = f" Did you mean {nearest(node.value, map(str, choices))[0]!r}?"
    problems.add(node.line, f"{where}: is {describe(node)}. It must be {spell(annotation)}.{hint}")
    return MISSING


def without_nulls(node: Located, known: Collection[str]) -> Located:
    """A mapping without those of its known keys that are null, as if they were not written."""
    if not isinstance(node.value, dict):
        return node
    left = {k: v for k, v in node.value.items() if v.value is not None or k not in known}
    return dataclasses.replace(node, value=left)


def unknown_key(key: str, known: Collection[str], where: str) -> str:
    """The sentence for a key that is not known."""
    if not known:
        return f"{where}: unknown key {key!r}. It takes none."
    return (
        f"{where}: unknown key {key!r}. Did you mean {nearest(key, known)[0]!r}? "
        f"Known keys: {_listing(known)}."
    )


def describe(node: Located) -> str:
    """What a value is, for an error."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return f"the list {node.plain()!r}"
    if node.value is None:
        return "empty"
    word = {str: "the text", bool: "the truth value", int: "the integer", float: "the number"}
    shown = repr(node.value).lower() if isinstance(node.value, bool) else repr(node.value)
    return f"{word[type(node.value)]} {shown}"


def spell(annotation: Any) -> str:
    """A type in the words of a recipe's author."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    if dataclasses.is_dataclass(annotation):
        return "a mapping"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"one of {_listing(args)}" if len(args) > 1 else _listing(args)
    if _is_union(annotation):
        # A function or an array is no choice that a file has.
        writable = [arg for arg in args if _is_writable(arg)] or args
        return " or ".join(dict.fromkeys(spell(arg) for arg in writable))
    if origin in (tuple, list, Sequence, Collection):
        items = [arg for arg in args if arg is not ...]
        if origin is tuple and items and ... not in args:
            return f"a list of {len(items)}: {', '.join(spell(arg) for arg in items)}"
        return f"a list of {spell(items[0])} each" if items else "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return getattr(annotation, "__name__", str(annotation))


def _is_writable(annotation: Any) -> bool:
    """Whether YAML has a value of a type."""
    known = (Literal, tuple, list, Sequence, Collection, dict, Mapping)
    return (
        annotation in _WORDS
        or typing.get_origin(annotation) in known
        or dataclasses.is_dataclass(annotation)
        or _is_union(annotation)
    )


def settings_of(factory: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
    """What a method's factory takes: annotations by name, and which of them have no default."""
    annotations, required = {}, []
    hints = _hints(factory)
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # **settings: Unpack[SomeTypedDict]
            packed = next(iter(typing.get_args(hints.get(name))), None)
            annotations |= typing.get_type_hints(packed) if typing.is_typeddict(packed) else {}
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotations[name] = hints.get(name, Any)
        if parameter.default is parameter.empty:
            required.append(name)
    return annotations, required


def _record(annotation: Any) -> Any:
    """The dataclass that an annotation asks for, alone or beside None; else None."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    records = [option for option in options if dataclasses.is_dataclass(option)]
    return records[0] if records else None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(factory)
    except NameError:  # a name that is only imported for type checkers
        return {}


def _convert(node: Located, annotation: Any) -> Any:
    """The value as the annotated type, or MISSING."""
    value = node.value
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (None, type(None)):
        return None if value is None else MISSING
    if annotation is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if fits else MISSING
    if annotation in (str, int, bool):
        return value if type(value) is annotation else MISSING
    if origin is Literal:
        # `1 == True`: the type must agree too.
        return value if any(value == a and type(value) is type(a) for a in args) else MISSING
    if _is_union(annotation):
        tries = (_convert(node, arg) for arg in _exact_first(args, value))
        return next((found for found in tries if found is not MISSING), MISSING)
    if origin in (tuple, list, Sequence, Collection):
        return _convert_list(node, origin, args)
    if origin in (dict, Mapping):
        return _convert_mapping(node, args)
    if annotation is Any:
        return node.plain()
    if annotation in (tuple, list):
        return annotation(node.plain()) if isinstance(value, list) else MISSING
    if _is_dtype(annotation):
        return value if isinstance(value, str) else MISSING
    return MISSING


def _exact_first(args: tuple[Any, ...], value: Any) -> list[Any]:
    """Members of a union, those of the value's own type first: 4 is an int before it is 4.0."""
    return sorted(args, key=lambda arg: arg is not type(value))


def _convert_list(node: Located, origin: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(node.value, list):
        return MISSING
    if origin is tuple and args and ... not in args:
        if len(args) != len(node.value):
            return MISSING
        wanted: Sequence[Any] = args
    else:
        wanted = [args[0] if args else Any] * len(node.value)
    items = [_convert(item, arg) for item, arg in zip(node.value, wanted, strict=True)]
    if any(item is MISSING for item in items):
        return MISSING
    return items if origin is list else tuple(items)


def _convert_mapping(node: Located, args: tuple[Any, ...]) -> Any:
    if not isinstance(node.value, dict):
        return MISSING
    item_type = args[1] if args else Any
    items = {key: _convert(item, item_type) for key, item in node.value.items()}
    return MISSING if any(item is MISSING for item in items.values()) else items


def _is_dtype(annotation: Any) -> bool:
    name = getattr(annotation, "__name__", str(annotation))
    return "dtype" in name.lower() or "SupportsDType" in str(annotation)


def _choices(annotation: Any) -> list[Any]:
    """Every literal that an annotation allows."""
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [choice for arg in typing.get_args(annotation) for choice in _choices(arg)]


def _listing(names: Collection[Any]) -> str:
    return ", ".join(repr(name) for name in names)
