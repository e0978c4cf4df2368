"""Methods by the names that recipes use: `family.method`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from jaxweights.core._paths import nearest
from jaxweights.core._transform import Transform

FAMILIES = ("sparsify", "quantize", "adapt", "merge")

Factory = Callable[..., Transform]


def methods() -> dict[str, Factory]:
    """Every method that a recipe can name: the public functions that return a `Transform`.

    Returns:
      Factories by name, such as `sparsify.wanda`.

    Example:
      >>> "sparsify.wanda" in methods()
      True
    """
    found: dict[str, Factory] = {}
    for family in FAMILIES:
        module = importlib.import_module(f"jaxweights.{family}")
        for name, member in sorted(vars(module).items()):
            if not name.startswith("_") and _returns_transform(member):
                found[f"{family}.{name}"] = member
    return found


def find_method(name: str) -> Factory:
    """The factory of a method.

    Raises:
      ValueError: If there is no such method; says which names are like it.
    """
    known = methods()
    if name not in known:
        # `wanda` alone is the likeliest slip of all.
        unqualified = [full for full in known if full.split(".")[1] == name]
        close = unqualified or nearest(name, known, count=3)
        raise ValueError(f"there is no method {name!r}. The nearest: {', '.join(close)}.")
    return known[name]


def _returns_transform(member: Any) -> bool:
    if not inspect.isfunction(member):
        return False
    returned = member.__annotations__.get("return")
    return returned is Transform or returned == "Transform"
