"""Checks of a config's fields that gather every fault into one message."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxweights.core._paths import nearest


@dataclasses.dataclass
class Fields:
    """Faults found so far in the fields of `record`; each check returns whether it passed."""

    asker: str
    record: Any
    faults: list[str] = dataclasses.field(default_factory=list)
    wrong_kind: bool = False

    def add(self, fault: str) -> bool:
        """Notes a fault that is stated in full."""
        self.faults.append(fault)
        return False

    def integer(self, name: str, *, minimum: int) -> bool:
        """Asks for an int of at least `minimum`."""
        value = getattr(self.record, name)
        if not isinstance(value, int) or isinstance(value, bool):
            return self._kind(name, value, "an int")
        if value < minimum:
            return self.add(f"{name}={value} must be at least {minimum}.")
        return True

    def number(
        self, name: str, *, minimum: float | None = None, above: float | None = None
    ) -> bool:
        """Asks for a finite number, bounded below."""
        value = getattr(self.record, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return self._kind(name, value, "a number")
        if not math.isfinite(value):
            return self.add(f"{name}={value} must be finite.")
        if minimum is not None and value < minimum:
            return self.add(f"{name}={value} must be at least {minimum}.")
        if above is not None and value <= above:
            return self.add(f"{name}={value} must be above {above}.")
        return True

    def flag(self, name: str) -> bool:
        """Asks for a bool."""
        value = getattr(self.record, name)
        return isinstance(value, bool) or self._kind(name, value, "True or False")

    def one_of(self, name: str, choices: tuple[str, ...]) -> bool:
        """Asks for one of a few words."""
        value = getattr(self.record, name)
        if value in choices:
            return True
        close = f" Did you mean {nearest(value, choices)[0]!r}?" if isinstance(value, str) else ""
        return self.add(f"{name}={value!r} must be one of {list(choices)}.{close}")

    def check(self) -> None:
        """Raises one error that lists every fault; TypeError if a kind is wrong."""
        if self.faults:
            error = TypeError if self.wrong_kind else ValueError
            raise error("\n".join(f"{self.asker}: {fault}" for fault in self.faults))

    def _kind(self, name: str, value: object, wanted: str) -> bool:
        self.wrong_kind = True
        return self.add(f"{name}={value!r} is a {type(value).__name__}. It must be {wanted}.")
