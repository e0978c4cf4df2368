"""YAML as recipes use it: plain values that remember the line they were written on."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

MAX_BYTES = 1_000_000  # a recipe is a page; anything larger is another file


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem with file and line."""


@dataclasses.dataclass(frozen=True)
class Located:
    """A YAML value and where it stands.

    Attributes:
      value: A string, number, bool or None; a list of `Located`; or a dict of them.
      line: Line on which the value starts, from 1.
      keys: For a dict, the line of each key.
    """

    value: Any
    line: int
    keys: dict[str, int] = dataclasses.field(default_factory=dict)

    def plain(self) -> Any:
        """The value without its lines."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


def parse_yaml(text: str, *, name: str) -> Located:
    r"""Parses a recipe's text without building anything but plain values.

    Args:
      text: YAML.
      name: What errors call the file.

    Returns:
      The top value, with lines.

    Raises:
      RecipeError: If the text is not YAML, repeats a key, or uses a tag, an anchor or an alias.

    Example:
      >>> recipe = parse_yaml("model:\n  path: weights  # here\n", name="recipe.yaml")
      >>> recipe.value["model"].value["path"]
      Located(value='weights', line=2, keys={})
    """
    documents = parse_yaml_documents(text, name)
    if len(documents) > 1:
        raise RecipeError(
            f"{name}:{documents[1].line}: a second document begins. A recipe is one document."
        )
    return documents[0]


def parse_yaml_documents(text: str, name: str, *, aliases: bool = False) -> list[Located]:
    """As `parse_yaml`, for a file of one or more documents, in which aliases may be allowed."""
    import yaml

    if len(text) > MAX_BYTES:
        raise RecipeError(f"{name}: has {len(text)} characters. A recipe has at most {MAX_BYTES}.")
    problems: list[str] = []
    try:
        nodes = list(yaml.compose_all(text, Loader=_loader(aliases)))
        located = [_locate(node, name, problems, {}) for node in nodes if node is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{name}{line}: is not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise RecipeError(f"{name}: is not valid YAML: {error}.") from None
    except RecursionError:
        raise RecipeError(f"{name}: is nested too deeply.") from None
    if not located:
        raise RecipeError(f"{name}: is empty.")
    if problems:
        raise RecipeError("\n".join(problems))
    return located


# YAML 1.2's core schema. PyYAML's own is YAML 1.1, which reads `2:4` as 124 (base 60), `no` as
# False, and `1e-5` as text.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def _loader(aliases: bool) -> Any:
    """PyYAML's safe loader, most often without aliases; the values are built here."""
    import yaml
    from yaml.composer import ComposerError

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            named = isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None)
            if named and not aliases:
                raise ComposerError(
                    None,
                    None,
                    "recipes have no anchors and aliases: write it out",
                    event.start_mark,
                )
            return super().compose_node(parent, index)

    return Loader


def _locate(node: Any, name: str, problems: list[str], seen: dict[int, Located]) -> Located:
    """The value of a node; what several aliases name is built once, however often it is named."""
    if id(node) not in seen:
        seen[id(node)] = _locate_new(node, name, problems, seen)
    return seen[id(node)]


def _locate_new(node: Any, name: str, problems: list[str], seen: dict[int, Located]) -> Located:
    import yaml

    line = node.start_mark.line + 1
    # An explicit tag (`!!python/object`, `!mine`) survives composition; a guessed one is YAML's.
    guessed = "tag:yaml.org,2002:"
    if not node.tag.startswith(guessed) or node.tag.startswith(f"{guessed}python"):
        problems.append(f"{name}:{line}: the tag {node.tag!r} is not allowed. Write a plain value.")
        return Located(None, line)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, name, problems, seen)
    if isinstance(node, yaml.SequenceNode):
        return Located([_locate(item, name, problems, seen) for item in node.value], line)
    quoted = node.style is not None
    return Located(node.value if quoted else _scalar(node.value), line)


def _mapping(node: Any, name: str, problems: list[str], seen: dict[int, Located]) -> Located:
    value: dict[str, Located] = {}
    keys: dict[str, int] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key, str):
            problems.append(f"{name}:{key_line}: a key must be a word, not a list or a mapping.")
            continue
        if key in keys:
            problems.append(
                f"{name}:{key_line}: the key {key!r} is here for the second time; it was on line "
                f"{keys[key]} already. Remove one."
            )
        keys[key] = key_line
        value[key] = _locate(value_node, name, problems, seen)
    return Located(value, node.start_mark.line + 1, keys)


def _scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
