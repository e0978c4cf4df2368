"""Reads a foreign config so that nothing in it goes unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxweights.core._paths import fail, nearest

_REQUIRED: Any = object()


class Settings:
    """The entries of a config, each to be taken, demanded or known to be harmless.

    Args:
      asker: Named in errors.
      values: The entries.
      prefix: Put before every key, as GGUF puts the architecture.
    """

    def __init__(self, asker: str, values: Mapping[str, Any], prefix: str = ""):
        """Starts with nothing taken and no fault."""
        self.asker = asker
        self.faults: list[str] = []
        self._values = values
        self._prefix = prefix
        self._known: set[str] = set()

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`, or the default where it is missing or None."""
        key = self._prefix + key
        self._known.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            similar = nearest(key, self._values, count=2) if self._values else []
            hint = f" Nearest keys: {', '.join(map(repr, similar))}." if similar else ""
            self.faults.append(f"{key!r} is missing.{hint}")
            return None
        return default

    def has(self, key: str) -> bool:
        """Whether `key` is there, even as None."""
        return self._prefix + key in self._values

    def demand(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuses a value other than the allowed ones; a missing one is fine."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            self.faults.append(
                f"{self._prefix + key!r} is {value!r}, which is not supported. "
                f"Supported: {', '.join(map(repr, allowed))}."
            )

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Raises one error for all faults and all entries that nobody took."""
        ignored = {self._prefix + key for key in harmless}
        for key, value in self._values.items():
            fresh = key not in self._known and key not in ignored and not key.startswith("_")
            if key.startswith(self._prefix) and fresh and value is not None:
                self.faults.append(
                    f"{key!r} is set to {value!r}, which is not supported. Remove it only if it "
                    "does not change what the model computes."
                )
        fail(self.asker, self.faults)
