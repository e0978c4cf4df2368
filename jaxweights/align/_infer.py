"""infer_permutations: the freedoms of a model, read off its trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxweights.align._parts import Axes, Axis, Part, bind, fix, fresh, give_up, length, pieces
from jaxweights.align._primitives import ELEMENTWISE, RULES, elementwise
from jaxweights.align._spec import AxisName, PermutationSpec
from jaxweights.core._paths import Params, Path, fail, flatten, unflatten
from jaxweights.lift import _compat
from jaxweights.weights._weight import is_weight

_LARGEST_CONSTANT = 10**7  # entries; larger ones are not searched for equal slices


def infer_permutations(
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    unproven: Literal["error", "fix"] = "error",
) -> PermutationSpec:
    """Reads off a model's trace which hidden units may be renumbered without changing its results.

    Every axis of every value is followed through the program: elementwise operations bind the axes
    of their operands, products those they contract, sums forget them; reshapes cut them into parts;
    loops bind what they carry. What inputs, outputs, constants, slices or positions tell apart is
    fixed. What is left free on a leaf is a permutation. It differs along layers, experts or
    heads if it always occurs with them. Nothing is computed, and every permutation found is
    proven; not every one there is need be found (heads of which queries, keys and values are one
    kernel of unequal shares, for example).

    Args:
      fn: The model, called as `fn(params, *inputs)`.
      params: Its parameters; arrays or abstract arrays.
      *inputs: Example inputs; arrays or abstract arrays, anything else passes through.
      unproven: What to do where an operation is not understood, or where a leaf carries a
        permutation on two axes (a recurrent kernel), which matching cannot solve: `"error"`, or
        `"fix"` the axes that are concerned.

    Returns:
      The spec. A permutation is called after a leaf that has it, and the axis there.

    Raises:
      ValueError: If something is not understood, naming the operation and the leaves; or if there
        is no permutation.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> model = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> infer_permutations(model, params, jnp.ones((4, 3))).axes
      {'down': ('down:0', None), 'up': (None, 'down:0')}
    """
    name = "align.infer_permutations"
    if unproven not in ("error", "fix"):
        raise ValueError(f"{name}: unproven={unproven!r} is neither 'error' nor 'fix'.")
    flat, _ = flatten(params)
    fail(
        name,
        [
            f"{path!r}: is a {type(leaf).__name__}. Pass jaxweights.materialize(params)."
            for path, leaf in flat.items()
            if is_weight(leaf)
        ],
        TypeError,
    )
    trace = _Trace()
    leaves = _follow_model(trace, fn, params, inputs)
    _fix_squares(leaves)
    if unproven == "error":
        fail(name, _complaints(leaves))
    free = {
        piece
        for axes in leaves.values()
        for axis in axes
        for piece in pieces(axis)
        if _is_free(piece)
    }
    if not free:
        raise ValueError(
            f"{name}: no hidden units may be renumbered: {_reasons(leaves)}. Pass the function "
            "from inputs to outputs, with all parameters in `params`."
        )
    return _spec_of(flat, leaves, trace.above(leaves))


def _is_free(piece: Part) -> bool:
    return piece.fixed is None and piece.unproven is None


def _follow_model(
    trace: _Trace, fn: Callable[..., Any], params: Params, inputs: Sequence[Any]
) -> dict[Path, Axes]:
    """Axes of the leaves, after everything that the program says about them."""
    flat, structure = flatten(params)
    arrays = {path: leaf for path, leaf in flat.items() if hasattr(leaf, "dtype")}
    rest, input_tree = jax.tree.flatten(tuple(inputs))
    traced = [i for i, x in enumerate(rest) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def run(leaves: list[Any], given: list[Any]) -> Any:
        filled = list(rest)
        for i, x in zip(traced, given, strict=True):
            filled[i] = x
        tree = unflatten(structure, flat | dict(zip(arrays, leaves, strict=True)))
        out = fn(tree, *jax.tree.unflatten(input_tree, filled))
        return [x for x in jax.tree.leaves(out) if hasattr(x, "dtype")]

    closed = jax.make_jaxpr(run)(
        [_compat.shape_of(x) for x in arrays.values()],
        [_compat.shape_of(rest[i]) for i in traced],
    )
    leaves = {path: fresh(leaf.shape) for path, leaf in arrays.items()}
    given = [fresh(rest[i].shape, "it is an input's") for i in traced]
    read = {var for eqn in closed.jaxpr.eqns for var in eqn.invars if not _is_literal(var)}
    for var, axes in zip(closed.jaxpr.invars, leaves.values(), strict=False):
        if var not in read:
            fix(tuple(part for axis in axes for part in axis), "the model does not read it")
    consts = [_constant(c) for c in closed.consts]
    for axes in trace.run(closed.jaxpr, consts, [*leaves.values(), *given]):
        for axis in axes:
            fix(axis, "it is an output's")
    return leaves


def _is_literal(var: Any) -> bool:
    return isinstance(var, _compat.Literal)


def _constant(value: Any) -> Axes:
    """Axes of a constant, free where all slices are equal."""
    axes = fresh(np.shape(value))
    why = "a constant tells its entries apart"
    if np.size(value) > _LARGEST_CONSTANT or not hasattr(value, "dtype"):
        array = None
    elif jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        array = None
    else:
        array = np.asarray(value)
    for i, axis in enumerate(axes):
        if array is None or not (array == array.take([0], axis=i)).all():
            fix(axis, why)
    return axes


class _Trace:
    """Walks a program; remembers which parts occur together, for what may differ along what."""

    def __init__(self) -> None:
        self._values: list[tuple[Axes, Axis]] = []  # axes of a value; stacks it is a slice of
        self._pairs: list[tuple[Axes, Axes, Axis, Axis]] = []  # operands, matched, slices
        self._scope: Axis = ()

    def run(self, jaxpr: Any, consts: Sequence[Axes], values: Sequence[Axes]) -> list[Axes]:
        """Axes of the results of a program."""
        env: dict[Any, Axes] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))
        self._values += [(axes, self._scope) for axes in (*consts, *values)]

        def read(var: Any) -> Axes:
            return _constant(var.val) if _is_literal(var) else env[var]

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(var) for var in eqn.invars])
            self._values += [(axes, self._scope) for axes in outputs]
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[Axes]) -> Sequence[Axes]:
        name = eqn.primitive.name
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, inputs)
        matched: list[Axis] = []
        if name in ELEMENTWISE:
            outputs = elementwise(eqn, inputs)
        else:
            outputs = RULES[name](eqn, inputs, matched) if name in RULES else None
        # A release of JAX in which an operation means more than its rule knows is noticed here.
        if outputs is not None and all(map(_fits, outputs, eqn.outvars)):
            if matched:
                together = tuple(part for axis in matched for part in axis)
                self._pairs.append((inputs[0], inputs[1], together, self._scope))
            return outputs
        for axes in inputs:
            for axis in axes:
                give_up(axis, f"what {name!r} does with it is not understood")
        return [fresh(_shape(var), f"it comes from {name!r}") for var in eqn.outvars]

    def inline(self, jaxpr: Any, inputs: Sequence[Axes]) -> list[Axes]:
        """Axes of the results of a program inside another."""
        inner, consts = _compat.open_jaxpr(jaxpr)
        return self.run(inner, [_constant(c) for c in consts], inputs)

    def scan(self, eqn: Any, inputs: list[Axes]) -> Sequence[Axes]:
        """A loop: what it carries keeps its axes; what it runs over is a stack of slices."""
        parts = _compat.scan_parts(eqn.params)
        consts, rest = inputs[: parts.consts], inputs[parts.consts :]
        carry, xs = rest[: parts.carry], rest[parts.carry :]
        stack = fresh((eqn.params["length"],), "a loop runs over it in order")[0]
        for axes in xs:
            bind(stack, axes[0])
        outer, self._scope = self._scope, (*self._scope, *stack)
        outs = self.inline(eqn.params["jaxpr"], [*consts, *carry, *(axes[1:] for axes in xs)])
        self._scope = outer
        _bind_all(carry, outs[: parts.carry])
        return [*carry, *((stack, *axes) for axes in outs[parts.carry :])]

    def while_loop(self, eqn: Any, inputs: list[Axes]) -> Sequence[Axes]:
        """A loop without slices."""
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = inputs[n + m :]
        self.inline(eqn.params["cond_jaxpr"], [*inputs[:n], *carry])
        outs = self.inline(eqn.params["body_jaxpr"], [*inputs[n : n + m], *carry])
        _bind_all(carry, outs)
        return carry

    def cond(self, eqn: Any, inputs: list[Axes]) -> Sequence[Axes]:
        """Branches, whose results move together."""
        outs = [self.inline(branch, inputs[1:]) for branch in eqn.params["branches"]]
        for other in outs[1:]:
            _bind_all(outs[0], other)
        return outs[0]

    def call(self, eqn: Any, inputs: list[Axes]) -> Sequence[Axes]:
        """A function inside the function."""
        return self.inline(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), inputs)

    def above(self, leaves: dict[Path, Axes]) -> dict[Part, list[Part]]:
        """The parts of leaves along which each free part may differ.

        That is sound where every value that has the one has the other exactly once (or is inside a
        loop over it), and where two operands that both have the one are run through along the
        other together: then every step sees one row of the permutation.
        """
        having: dict[Part, list[tuple[Counter[Part], set[Part]]]] = {}
        for axes, scope in self._values:
            count = Counter(_all_pieces(axes))
            for part in count:
                having.setdefault(part, []).append((count, set(pieces(scope))))
        every = dict.fromkeys(piece for axes in leaves.values() for piece in _all_pieces(axes))
        found: dict[Part, list[Part]] = {}
        for part in every:
            if not _is_free(part):
                continue
            shared = set(every) - {part}
            for count, scope in having[part]:
                alone = count[part] == 1
                shared = {x for x in shared if alone and count[x] + (x in scope) == 1}
            found[part] = [x for x in every if x in shared and self._run_together(part, x)]
        return found

    def _run_together(self, part: Part, other: Part) -> bool:
        for left, right, matched, scope in self._pairs:
            both = part in _all_pieces(left) and part in _all_pieces(right)
            if both and other not in pieces(matched) and other not in pieces(scope):
                return False
        return True


def _all_pieces(axes: Axes) -> list[Part]:
    return [piece for axis in axes for piece in pieces(axis)]


def _bind_all(first: Sequence[Axes], second: Sequence[Axes]) -> None:
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            bind(a, b)


def _fits(axes: Axes, var: Any) -> bool:
    return tuple(map(length, axes)) == _shape(var)


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


_CONTROL: dict[str, Callable[[_Trace, Any, list[Axes]], Sequence[Axes]]] = {
    _compat.JIT.name: _Trace.call,
    _compat.REMAT.name: _Trace.call,
    _compat.CUSTOM_JVP.name: _Trace.call,
    _compat.CUSTOM_VJP.name: _Trace.call,
    _compat.SCAN.name: _Trace.scan,
    _compat.WHILE.name: _Trace.while_loop,
    _compat.COND.name: _Trace.cond,
}


def _fix_squares(leaves: dict[Path, Axes]) -> None:
    """A leaf with one permutation on two axes is no linear assignment."""
    for axes in leaves.values():
        found = _all_pieces(axes)
        for piece in dict.fromkeys(found):
            if found.count(piece) > 1 and _is_free(piece):
                give_up((piece,), "it is on two axes of one leaf, so its match is not linear")


def _complaints(leaves: dict[Path, Axes]) -> list[str]:
    """Why parts are fixed that nothing proven fixes, each with the leaves that have them."""
    found: dict[Part, list[str]] = {}
    for path, axes in leaves.items():
        for i, axis in enumerate(axes):
            for piece in pieces(axis):
                if piece.fixed is None and piece.unproven is not None:
                    found.setdefault(piece, []).append(f"axis {i} of {path!r}")
    return [
        f"{', '.join(places)}: {piece.unproven}. Write the spec by hand, or pass unproven='fix' to "
        "leave the entries where they are."
        for piece, places in found.items()
    ]


def _reasons(leaves: dict[Path, Axes]) -> str:
    """Why the axes of the first leaves stay."""
    shown = [
        f"axis {i} of {path!r} stays because {piece.fixed or piece.unproven}"
        for path, axes in leaves.items()
        for i, axis in enumerate(axes)
        for piece in pieces(axis)
    ]
    return "; ".join(shown[:4]) or "no leaf has an axis"


def _spec_of(
    flat: dict[Path, Any], leaves: dict[Path, Axes], above: dict[Part, list[Part]]
) -> PermutationSpec:
    order = _without_circles(above)
    used = {other for others in order.values() for other in others}
    names: dict[Part, str] = {}
    for path, axes in leaves.items():
        for i, axis in enumerate(axes):
            found = pieces(axis)
            for j, piece in enumerate(found):
                label = f"{path}:{i}" + (f".{j}" if len(found) > 1 else "")
                if _is_free(piece) or piece in used:
                    names.setdefault(piece, label)
    return PermutationSpec(
        {
            path: tuple(_axis_name(axis, names) for axis in leaves.get(path, ()))
            for path in flat
            if path in leaves
        },
        sizes={name: part.size for part, name in names.items() if _is_free(part)},
        stacks={name: part.size for part, name in names.items() if not _is_free(part)},
        over={names[part]: tuple(names[x] for x in others) for part, others in order.items()},
    )


def _without_circles(above: dict[Part, list[Part]]) -> dict[Part, list[Part]]:
    """Where two differ along one another, only the later along the earlier."""
    order: dict[Part, list[Part]] = {}

    def reaches(start: Part, goal: Part) -> bool:
        return any(x is goal or reaches(x, goal) for x in order.get(start, ()))

    for part, others in above.items():
        order[part] = []
        for other in others:
            if not reaches(other, part):
                order[part].append(other)
    return order


def _axis_name(axis: Axis, names: dict[Part, str]) -> AxisName:
    found: list[str | int] = []
    for piece in pieces(axis):
        if piece in names:
            found.append(names[piece])
        elif found and isinstance(found[-1], int):
            found[-1] *= piece.size
        else:
            found.append(piece.size)
    if len(found) == 1:
        return found[0] if isinstance(found[0], str) else None
    return tuple(found) if found else None
