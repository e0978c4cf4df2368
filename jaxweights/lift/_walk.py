"""The walk over a jaxpr in which some values are represented weights."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax

from jaxweights.lift import _compat
from jaxweights.weights._weight import Weight

OnMaterialize = Literal["ok", "warn", "error"]
Record = dict[str, Any]
# (walk, equation, values) -> outputs, or None where the rule does not apply.
Rule = Callable[["Walk", Any, list[Any]], Sequence[Any] | None]
# (named weight, activations, kind of product, its parameters) -> record, or None.
Observer = Callable[["Named", jax.Array, str, dict[str, Any]], Record | None]

RULES: dict[str, Rule] = {}


def rule(*primitive_names: str) -> Callable[[Rule], Rule]:
    """Registers how primitives treat represented weights, by the primitives' names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitive_names, fn))
        return fn

    return register


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    """A represented weight on its way through the walk, with the path that messages call it by."""

    weight: Weight
    path: str = dataclasses.field(metadata={"static": True})

    def become(self, weight: Weight | None) -> list[Named] | None:
        """The same weight in another form, as a rule's output; None passes None on."""
        return None if weight is None else [Named(weight, self.path)]


@dataclasses.dataclass
class Walk:
    """One evaluation of a jaxpr.

    Args:
      on_materialize: What to do where a weight has to become dense.
      observer: Called at every product of activations with a weight; what it returns is combined
        over repeated uses and carried out of scans, loops and branches.
      combine: How two records of one path become one.
      identity: The record that changes nothing when combined, for a record's abstract form.
      lost: Weights that became dense where nobody observed them, and the primitive that took them.
    """

    on_materialize: OnMaterialize = "ok"
    observer: Observer | None = None
    combine: Callable[[Record, Record], Record] | None = None
    identity: Callable[[Record], Record] | None = None
    lost: dict[str, str] = dataclasses.field(default_factory=dict)
    _frames: list[dict[str, Record]] = dataclasses.field(default_factory=lambda: [{}])
    _observed: list[Named] = dataclasses.field(default_factory=list)

    @property
    def observing(self) -> bool:
        """Whether records are collected."""
        return self.observer is not None

    @property
    def inside(self) -> bool:
        """Whether this is the body of a loop, a branch or a `shard_map`."""
        return len(self._frames) > 1

    def run(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr; inputs and outputs may be `Named`."""
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, _compat.Literal) else env[var]

        for eqn in jaxpr.eqns:
            values = [read(var) for var in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, list(values)), strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        """Evaluates one equation, by its rule where a weight reaches it."""
        if any(isinstance(value, Named) for value in values):
            self._observed.clear()
            special = RULES.get(eqn.primitive.name)
            outputs = special(self, eqn, values) if special else None
            if outputs is not None:
                return outputs
            values = [self.dense(value, eqn.primitive.name) for value in values]
        return _compat.evaluate(eqn, values)

    def dense(self, value: Any, why: str) -> Any:
        """The array of a value, reported where a weight is given up."""
        if not isinstance(value, Named):
            return value
        if why != "output" and not any(value is named for named in self._observed):
            self.lost.setdefault(value.path, why)
        if self.on_materialize != "ok":
            message = (
                f"lift: {value.path!r}: the primitive {why!r} has no rule for a "
                f"{type(value.weight).__name__} used like this, so the dense weight "
                f"{value.weight.shape} is built. Pass on_materialize='ok' to accept it, or "
                "contract the weight with `@`, einsum or lax.dot_general."
            )
            if self.on_materialize == "error":
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        return value.weight.materialize()

    def observe(self, named: Named, x: jax.Array, kind: str, params: dict[str, Any]) -> None:
        """Lets the observer see one product of activations with a weight."""
        if self.observer is not None:
            record = self.observer(named, x, kind, params)
            if record is not None:
                self._observed.append(named)
                self.record(named.path, record)

    def record(self, path: str, record: Record) -> None:
        """Adds a record to the innermost frame."""
        frame = self._frames[-1]
        if path in frame:
            assert self.combine is not None
            record = self.combine(frame[path], record)
        frame[path] = record

    def record_all(self, records: dict[str, Record]) -> None:
        """Adds the records of an inner frame."""
        for path, record in records.items():
            self.record(path, record)

    @contextlib.contextmanager
    def frame(self) -> Iterator[dict[str, Record]]:
        """Collects the records of a loop's body or a branch apart from those around it."""
        self._frames.append({})
        try:
            yield self._frames[-1]
        finally:
            self._frames.pop()

    @property
    def records(self) -> dict[str, Record]:
        """Everything recorded outside all loops and branches."""
        return self._frames[0]


def unstack(value: Any) -> Any:
    """Tells a weight that axis 0 was taken away from all its fields."""
    return Named(value.weight.unstacked(), value.path) if isinstance(value, Named) else value


def stackable(value: Any) -> bool:
    """Whether slicing every field along axis 0 slices the value."""
    return not isinstance(value, Named) or len(value.weight.stack_shape) > 0
