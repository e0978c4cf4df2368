"""How a model uses each of its leaves, read off its jaxpr without evaluating anything."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

from jaxweights.lift import _compat
from jaxweights.lift._lookup import row_column
from jaxweights.lift._traced_leaf import TracedLeaf

UseKind = Literal["dot", "conv", "lookup", "other"]
# What besides the image says what a convolution multiplies its kernel with.
_OF_A_WINDOW = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "feature_group_count",
    "batch_group_count",
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a leaf.

    Args:
      path: The leaf.
      kind: Product, convolution, row lookup, or anything else.
      inputs: Contracted original axes, ascending.
      outputs: Original axes that the product keeps, ascending.
      source: Identifies the activations and how they are contracted: equal for two leaves exactly
        where they provably read the same input. None where there is none.
      primitive: What used it.
      groups: Feature groups of a convolution.
    """

    path: str
    kind: UseKind
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    source: Any = None
    primitive: str = ""
    groups: int = 1


def find_uses(jaxpr: Any, consts: Sequence[Any], paths: Sequence[str | None]) -> list[Use]:
    """Lists every use of the inputs that have a path.

    Args:
      jaxpr: The traced model.
      consts: Its constants.
      paths: A path per input; None for inputs that are no parameters.

    Returns:
      Uses in program order. Loops and branches count once.
    """
    analysis = _Analysis()
    values = [
        analysis.fresh() if path is None else TracedLeaf.whole(path, var.aval.shape)
        for path, var in zip(paths, jaxpr.invars, strict=True)
    ]
    analysis.run(jaxpr, [analysis.fresh() for _ in consts], values)
    return analysis.uses


class _Analysis:
    """Numbers the values of a program, so that equal computations get equal numbers."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self._counter = itertools.count()
        self._known: dict[Any, list[int]] = {}
        self._alive: list[Any] = []  # keeps the jaxprs whose ids are keys
        # The loop's body or the branch at hand, which may run several times or not at all.
        self.scope = self.fresh()

    def fresh(self) -> int:
        return next(self._counter)

    def run(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))

        def read(var: Any) -> Any:
            if isinstance(var, _compat.Literal):
                return ("literal", str(var.val), str(var.aval))
            return env[var]

        for eqn in jaxpr.eqns:
            inputs = [read(var) for var in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, inputs), strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
        if not any(isinstance(x, TracedLeaf) for x in inputs):
            return self.number(eqn, inputs)
        name = eqn.primitive.name
        handler = _HANDLERS.get(name)
        outputs = handler(self, eqn, inputs) if handler else None
        if outputs is not None:
            return outputs
        for x in inputs:
            if isinstance(x, TracedLeaf):
                self.uses.append(Use(x.path, "other", primitive=name))
        return [self.fresh() for _ in eqn.outvars]

    def number(self, eqn: Any, inputs: list[Any]) -> list[int]:
        params = []
        for key, value in sorted(eqn.params.items()):
            if isinstance(value, int | float | str | bool | type(None) | tuple):
                params.append((key, str(value)))
            else:
                self._alive.append(value)
                params.append((key, id(value) if "jaxpr" in key or callable(value) else str(value)))
        key = (eqn.primitive.name, tuple(params), tuple(inputs))
        if key not in self._known:
            self._known[key] = [self.fresh() for _ in eqn.outvars]
        return self._known[key]

    def inline(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        inner, consts = _compat.open_jaxpr(jaxpr)
        return self.run(inner, [("const", id(c)) for c in consts], inputs)


def _call(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return analysis.inline(jaxpr, inputs)


def _body_once(analysis: _Analysis, eqn: Any, jaxpr: Any, inputs: list[Any]) -> Sequence[Any]:
    outer, analysis.scope = analysis.scope, analysis.fresh()
    analysis.inline(jaxpr, inputs)
    analysis.scope = outer
    return [analysis.fresh() for _ in eqn.outvars]


def _scan(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    parts = _compat.scan_parts(eqn.params)
    consts, rest = inputs[: parts.consts], inputs[parts.consts :]
    carry = [analysis.fresh() for _ in rest[: parts.carry]]
    xs = [
        x.one_step() if isinstance(x, TracedLeaf) else analysis.fresh() for x in rest[parts.carry :]
    ]
    return _body_once(analysis, eqn, eqn.params["jaxpr"], [*consts, *carry, *xs])


def _while(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body_consts = inputs[n_cond : n_cond + n_body]
    carry = [analysis.fresh() for _ in inputs[n_cond + n_body :]]
    return _body_once(analysis, eqn, eqn.params["body_jaxpr"], [*body_consts, *carry])


def _cond(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    for branch in eqn.params["branches"]:
        _body_once(analysis, eqn, branch, inputs[1:])
    return [analysis.fresh() for _ in eqn.outvars]


def _shard_map(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    inner, _ = _compat.open_jaxpr(eqn.params["jaxpr"])
    local = [
        dataclasses.replace(x, shape=tuple(var.aval.shape)) if isinstance(x, TracedLeaf) else x
        for x, var in zip(inputs, inner.invars, strict=True)
    ]
    return _body_once(analysis, eqn, eqn.params["jaxpr"], local)


def _dot_general(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    left, right = inputs
    if isinstance(left, TracedLeaf) and isinstance(right, TracedLeaf):
        return None
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    if isinstance(left, TracedLeaf):
        leaf, x, contract, batch, x_contract, x_batch = left, right, lc, lb, rc, rb
    else:
        leaf, x, contract, batch, x_contract, x_batch = right, left, rc, rb, lc, lb
    # Equal pairs of axes in any order read the same input, if the matrices list them in one order.
    order = [
        leaf.axes_met(own, others) for own, others in ((contract, x_contract), (batch, x_batch))
    ]
    return _product(analysis, eqn, leaf, "dot", contract, batch, (x, *order))


def _ragged_dot(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    x, leaf, sizes = inputs[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
    if not isinstance(leaf, TracedLeaf) or isinstance(x, TracedLeaf) or not plain:
        return None
    return _product(analysis, eqn, leaf, "dot", (1,), (0,), (x, sizes))


def _conv(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    x, leaf = inputs
    if isinstance(x, TracedLeaf):
        return None
    numbers = eqn.params["dimension_numbers"]
    _, *contract = numbers.rhs_spec  # channels, then what slides over the image
    window = tuple((key, str(eqn.params[key])) for key in _OF_A_WINDOW)
    spatial = tuple(leaf.shape[a] for a in contract[1:])
    order = leaf.axes_met(contract, range(len(contract)))
    source = (x, tuple(numbers.lhs_spec), window, spatial, order)
    groups = int(eqn.params["feature_group_count"])
    return _product(analysis, eqn, leaf, "conv", contract, (), source, groups)


def _product(
    analysis: _Analysis,
    eqn: Any,
    leaf: TracedLeaf,
    kind: UseKind,
    contract: Sequence[int],
    batch: Sequence[int],
    source: Any,
    groups: int = 1,
) -> Sequence[Any] | None:
    free = [a for a in range(len(leaf.shape)) if a not in contract and a not in batch]
    inputs, outputs = leaf.original_axes(contract), leaf.original_axes(free)
    if not inputs or not outputs:
        return None
    source = (source, leaf.place, analysis.scope)
    analysis.uses.append(Use(leaf.path, kind, inputs, outputs, source, eqn.primitive.name, groups))
    return [analysis.fresh()]


def _gather(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    leaf = inputs[0]
    if not isinstance(leaf, TracedLeaf) or isinstance(inputs[1], TracedLeaf):
        return None
    if row_column(eqn.params, leaf.shape) is None:
        return None
    outputs = tuple(original for original, _, _ in leaf.origins[0])
    rest = tuple(original for origin in leaf.origins[1:] for original, _, _ in origin)
    analysis.uses.append(Use(leaf.path, "lookup", rest, outputs, None, "gather"))
    return [analysis.fresh()]


def _same(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    del analysis, eqn
    return [inputs[0]]


def _all_same(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    del analysis, eqn
    return inputs


def _transpose(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    del analysis
    return [inputs[0].with_axes(eqn.params["permutation"])]


def _squeeze(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    del analysis
    leaf, gone = inputs[0], eqn.params["dimensions"]
    return [leaf.with_axes([a for a in range(len(leaf.shape)) if a not in gone])]


def _reshape(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    del analysis
    return _if_any(inputs[0].reshaped(tuple(eqn.params["new_sizes"])))


def _slice(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    del analysis
    leaf, *starts = inputs
    if not isinstance(leaf, TracedLeaf):
        return None
    strides = eqn.params.get("strides") or (1,)
    start = starts[0] if starts else eqn.params["start_indices"][0]
    return _if_any(leaf.layers(start, strides[0], tuple(eqn.outvars[0].aval.shape)))


def _rev(analysis: _Analysis, eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    del analysis
    return [inputs[0].upside_down()] if tuple(eqn.params["dimensions"]) == (0,) else None


def _if_any(leaf: TracedLeaf | None) -> list[TracedLeaf] | None:
    return None if leaf is None else [leaf]


_HANDLERS = {
    _compat.JIT.name: _call,
    _compat.REMAT.name: _call,
    _compat.CUSTOM_JVP.name: _call,
    _compat.CUSTOM_VJP.name: _call,
    _compat.SCAN.name: _scan,
    _compat.WHILE.name: _while,
    _compat.COND.name: _cond,
    _compat.SHARD_MAP_NAME: _shard_map,
    _compat.RAGGED_DOT_NAME: _ragged_dot,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "transpose": _transpose,
    "slice": _slice,
    "dynamic_slice": _slice,
    "squeeze": _squeeze,
    "rev": _rev,
    "reshape": _reshape,
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "stop_gradient": _same,
    "optimization_barrier": _all_same,
    _compat.PVARY_NAME: _same,
    "sharding_constraint": _same,
}
