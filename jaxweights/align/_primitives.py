"""What every primitive binds together and what it tells apart, axis by axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxweights.align._parts import Axes, Axis, bind, fix, fresh, length, regroup, split_axis

# (equation, axes of the operands) -> axes of the results; None where the rule does not apply.
# `matched` collects axes of two operands that are run through together.
Rule = Callable[[Any, list[Axes], list[Axis]], Sequence[Axes] | None]

RULES: dict[str, Rule] = {}

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc
    exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p
    logistic lt max min mul name ne neg nextafter not optimization_barrier or polygamma
    population_count pow pvary real reduce_precision regularized_incomplete_beta rem round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sharding_constraint sign sin
    sinh sqrt square stop_gradient sub tan tanh xor""".split()
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives by their names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def elementwise(eqn: Any, inputs: list[Axes]) -> Sequence[Axes]:
    """Operands of one shape move together; scalars have no axes, and axes of length 1 no parts."""
    if eqn.primitive.name == "optimization_barrier":
        return inputs
    out = []
    for together in zip(*(axes for axes in inputs if axes), strict=True):
        present = [axis for axis in together if axis]
        for other in present[1:]:
            bind(present[0], other)
        out.append(present[0] if present else ())
    return [tuple(out) for _ in eqn.outvars]


@rule("dot_general")
def _dot_general(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    (left_in, right_in), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = inputs
    for i, j in zip((*left_in, *left_batch), (*right_in, *right_batch), strict=True):
        bind(left[i], right[j])
        matched.append(left[i])
    keep_left = [axis for i, axis in enumerate(left) if i not in (*left_in, *left_batch)]
    keep_right = [axis for i, axis in enumerate(right) if i not in (*right_in, *right_batch)]
    return [(*(left[i] for i in left_batch), *keep_left, *keep_right)]


@rule("ragged_dot_general")
def _ragged_dot(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes] | None:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if numbers.dot_dimension_numbers != (((1,), (1,)), ((), ())):
        return None
    x, weight = inputs[:2]
    bind(x[1], weight[1])
    matched.append(x[1])
    fix(x[0], "its rows are assigned to groups by their order")
    fix(weight[0], "groups are told apart by their number")
    return [(x[0], weight[2])]


@rule("conv_general_dilated")
def _conv(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes] | None:
    params, (x, kernel) = eqn.params, inputs
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    features, (out_axis, in_axis) = x[numbers.lhs_spec[1]], numbers.rhs_spec[:2]
    heads = split_axis(features, groups)
    outs = split_axis(kernel[out_axis], groups)
    if heads is None or outs is None:
        return None
    bind(heads[1], kernel[in_axis])
    bind(heads[0], outs[0])
    matched += [heads[0], heads[1]]
    for axis in numbers.rhs_spec[2:]:
        fix(kernel[axis], "a convolution tells positions apart")
    for axis in numbers.lhs_spec[2:]:
        fix(x[axis], "a convolution tells positions apart")
    shape = eqn.outvars[0].aval.shape
    out = list(fresh(shape, "a convolution tells positions apart"))
    out[numbers.out_spec[0]] = x[numbers.lhs_spec[0]]
    out[numbers.out_spec[1]] = kernel[out_axis]
    return [tuple(out)]


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
def _reduce(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    gone = eqn.params["axes"]
    return [tuple(axis for i, axis in enumerate(inputs[0]) if i not in gone)]


@rule("argmax", "argmin")
def _arg_reduce(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    for i in eqn.params["axes"]:
        fix(inputs[0][i], f"{eqn.primitive.name} tells its entries apart")
    return [tuple(x for i, x in enumerate(inputs[0]) if i not in eqn.params["axes"])]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    return [_mixed(inputs[0], (eqn.params["axis"],), f"{eqn.primitive.name} runs over it in order")]


@rule("sort")
def _sort(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    elementwise(eqn, inputs)
    return [_mixed(x, (eqn.params["dimension"],), "sort gives its entries places") for x in inputs]


@rule("top_k", "approx_top_k")
def _top_k(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes] | None:
    if eqn.params.get("axis", -1) not in (-1, len(inputs[0]) - 1):
        return None
    why = "top_k tells its entries apart"
    fix(inputs[0][-1], why)
    return [(*inputs[0][:-1], *fresh(var.aval.shape[-1:], why)) for var in eqn.outvars]


@rule("rev")
def _rev(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    return [_mixed(inputs[0], eqn.params["dimensions"], "it is reversed")]


def _mixed(axes: Axes, places: Sequence[int], why: str) -> Axes:
    """Axes after an operation in which entries of some take the places of others."""
    out = list(axes)
    for i in places:
        fix(axes[i], why)
        out[i] = fresh((length(axes[i]),), why)[0]
    return tuple(out)


@rule("transpose")
def _transpose(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    return [tuple(inputs[0][i] for i in eqn.params["permutation"])]


@rule("squeeze")
def _squeeze(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    gone = eqn.params["dimensions"]
    return [tuple(axis for i, axis in enumerate(inputs[0]) if i not in gone)]


@rule("reshape")
def _reshape(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes] | None:
    if eqn.params.get("dimensions") is not None:
        return None
    return [regroup(inputs[0], eqn.params["new_sizes"])]


@rule("broadcast_in_dim")
def _broadcast(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    out = list(fresh(shape))  # copies of one entry: any order is the same
    for axis, n, place in zip(inputs[0], eqn.invars[0].aval.shape, places, strict=True):
        if n == shape[place]:
            out[place] = axis
    return [tuple(out)]


@rule("iota")
def _iota(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    out = fresh(eqn.outvars[0].aval.shape)
    fix(out[eqn.params["dimension"]], "it is numbered")
    return [out]


@rule("slice")
def _slice(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    params, old = eqn.params, eqn.invars[0].aval.shape
    strides = params["strides"] or (1,) * len(old)
    cuts = zip(
        inputs[0], old, params["start_indices"], params["limit_indices"], strides, strict=True
    )
    return [tuple(_cut(axis, n, start, stop, stride) for axis, n, start, stop, stride in cuts)]


@rule("split")
def _split(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    where, start, outs = eqn.params["axis"], 0, []
    total = eqn.invars[0].aval.shape[where]
    for size in eqn.params["sizes"]:
        axes = list(inputs[0])
        axes[where] = _cut(axes[where], total, start, start + size, 1)
        outs.append(tuple(axes))
        start += size
    return outs


def _cut(axis: Axis, n: int, start: int, stop: int, stride: int) -> Axis:
    """A slice of an axis. Slices that cut it into equal runs keep the order inside the runs."""
    size = len(range(start, stop, stride))
    if size == n:
        return axis
    if stride == 1 and size and n % size == 0 and start % size == 0:
        found = split_axis(axis, n // size)
        if found is not None:
            fix(found[0], f"entries {start} to {stop - 1} are taken out")
            return found[1]
    fix(axis, f"entries {start} to {stop - 1} are taken out")
    return fresh((size,), "it is a slice")[0]


@rule("dynamic_slice")
def _dynamic_slice(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    out = []
    sizes = eqn.outvars[0].aval.shape
    for axis, n, size in zip(inputs[0], eqn.invars[0].aval.shape, sizes, strict=True):
        if n != size:
            fix(axis, "a slice of it is taken")
        out.append(axis if n == size else fresh((size,), "it is a slice")[0])
    return [tuple(out)]


@rule("dynamic_update_slice")
def _update_slice(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    old, new = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    for a, b, n, size in zip(inputs[0], inputs[1], old, new, strict=True):
        if n == size:
            bind(a, b)
        else:
            fix((*a, *b), "a slice of it is replaced")
    return [inputs[0]]


@rule("concatenate")
def _concatenate(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    where = eqn.params["dimension"]
    sizes = [var.aval.shape[where] for var in eqn.invars]
    for other in inputs[1:]:
        for i, (a, b) in enumerate(zip(inputs[0], other, strict=True)):
            if i != where:
                bind(a, b)
    out = list(inputs[0])
    why = "it is joined with others"
    if len(set(sizes)) == 1:  # runs of one length, inside which all may move alike
        for other in inputs[1:]:
            bind(inputs[0][where], other[where])
        out[where] = (*fresh((len(sizes),), why)[0], *inputs[0][where])
    else:
        for axes in inputs:
            fix(axes[where], why)
        out[where] = fresh((sum(sizes),), why)[0]
    return [tuple(out)]


@rule("pad")
def _pad(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    out = []
    sizes = eqn.outvars[0].aval.shape
    for axis, config, size in zip(inputs[0], eqn.params["padding_config"], sizes, strict=True):
        if any(config):
            fix(axis, "it is padded")
        out.append(fresh((size,), "it is padded")[0] if any(config) else axis)
    return [tuple(out)]


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _reduce_window(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    params, out = eqn.params, []
    rank = len(inputs[0])
    windows = zip(
        inputs[0],
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params.get("base_dilation") or (1,) * rank,
        eqn.outvars[0].aval.shape,
        strict=True,
    )
    for axis, window, stride, padding, dilation, size in windows:
        plain = window == stride == dilation == 1 and not any(padding)
        if not plain:
            fix(axis, "pooling tells positions apart")
        out.append(axis if plain else fresh((size,), "pooling tells positions apart")[0])
    return [tuple(out)]


@rule("gather")
def _gather(eqn: Any, inputs: list[Axes], matched: list[Axis]) -> Sequence[Axes]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = inputs
    old = eqn.invars[0].aval.shape
    why = "entries are looked up in it by number"
    batch = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    kept = []
    for i, (axis, n, size) in enumerate(zip(operand, old, sizes, strict=True)):
        if i in batch:
            bind(axis, indices[batch[i]])
            matched.append(axis)
            continue
        whole = n == size and i not in numbers.start_index_map
        if not whole:
            fix(axis, why)
        if i not in numbers.collapsed_slice_dims:
            kept.append(axis if whole else fresh((size,), why)[0])
    fix(indices[-1], "it holds the parts of an index")
    looked_up, offsets = iter(indices[:-1]), iter(kept)
    rank = len(eqn.outvars[0].aval.shape)
    return [tuple(next(offsets if i in numbers.offset_dims else looked_up) for i in range(rank))]
