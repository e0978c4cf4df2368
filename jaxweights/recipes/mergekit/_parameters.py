"""Values of a parameter: one, a gradient over layers, or one for each kind of tensor."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from jaxweights.recipes._check import Problems, describe
from jaxweights.recipes._yaml import Located

Kind = type[float] | type[bool] | type[int]
Scope = Literal["all", "model", "tuned"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a method.

    Args:
      kind: What its values are.
      scope: Whether there is one for `"all"` models, one for each `"model"`, or one for each but
        the base (`"tuned"`).
      default: Its value where none is given; `REQUIRED` has none.
    """

    kind: Kind
    scope: Scope
    default: Any


REQUIRED: Any = object()
# What counts a part of a tensor's entries.
_SHARES = ("density", "gamma", "select_topk")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value as it stands in the file.

    Args:
      values: `(filter, gradient)` pairs, of which the first that fits a tensor's name counts; the
        filter None fits all. A gradient of one value is that value.
      line: Where it stands.
    """

    values: tuple[tuple[str | None, tuple[Any, ...]], ...]
    line: int

    def at(self, name: str, t: float) -> Any:
        """The value for a tensor at a depth from 0 to 1; None where no filter fits."""
        for part, gradient in self.values:
            if part is None or part in name:
                return _interpolate(gradient, t)
        return None


def _interpolate(gradient: tuple[Any, ...], t: float) -> Any:
    if len(gradient) == 1:
        return gradient[0]
    place = t * (len(gradient) - 1)
    first = min(int(place), len(gradient) - 2)
    if any(isinstance(value, bool) for value in gradient):
        return gradient[int(place)]
    share = place - first
    return (1 - share) * gradient[first] + share * gradient[first + 1]


def read_setting(node: Located, kind: Kind | None, name: str, problems: Problems) -> Setting | None:
    """Reads a value of any of the three forms; None after noting what is wrong."""
    entries = node.value if isinstance(node.value, list) else [node]
    if not entries:
        problems.add(node.line, f"{name}: is an empty list. Give at least one value.")
        return None
    if not any(isinstance(entry.value, dict) for entry in entries):
        gradient = _gradient(node, kind, name, problems)
        return None if gradient is None else Setting(((None, gradient),), node.line)
    found = []
    for entry in entries:
        keys = entry.value if isinstance(entry.value, dict) else {}
        if "value" not in keys or not set(keys) <= {"value", "filter"}:
            problems.add(entry.line, f"{name}: must be a value, a list of values, or a list of "
                         "mappings with 'filter' and 'value'.")  # fmt: skip
            return None
        part = keys["filter"].value if "filter" in keys else None
        gradient = _gradient(keys["value"], kind, name, problems)
        if gradient is None:
            return None
        found.append((None if part in (None, "*") else str(part), gradient))
    return Setting(tuple(found), node.line)


def check_share(name: str, setting: Setting, problems: Problems, *, most: float) -> None:
    """Notes a share of entries that is negative or above `most`, which percents are."""
    values = [value for _, gradient in setting.values for value in gradient]
    wrong = [value for value in values if not 0 <= value <= most] if name in _SHARES else []
    if not wrong:
        return
    remedy = "Give a fraction of the entries."
    if wrong[0] > 1:
        remedy = (
            f"Give a fraction of the entries, such as {wrong[0] / 100:g} for {wrong[0]:g} percent, "
            "or say --compat mergekit to have it taken as 1, as mergekit does."
        )
    problems.add(setting.line, f"{name}: is {wrong[0]:g}. It must lie in [0, 1]. {remedy}")


def _gradient(
    node: Located, kind: Kind | None, name: str, problems: Problems
) -> tuple[Any, ...] | None:
    entries = node.value if isinstance(node.value, list) else [node]
    values = []
    for entry in entries:
        value = _value(entry.value, kind)
        if value is None:
            problems.add(entry.line, f"{name}: is {describe(entry)}. It must be {_WORDS[kind]}.")
            return None
        values.append(value)
    return tuple(values)


_WORDS: dict[Any, str] = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    None: "a finite number, or true or false",
}


def _value(value: Any, kind: Kind | None) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if kind is bool:
        return bool(value) if isinstance(value, bool) or value in (0, 1) else None
    if kind is None:
        return value if isinstance(value, int | float) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind is int:
        return int(value) if value == int(value) else None
    return float(value)
