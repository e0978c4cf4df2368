"""adadim: groups along inputs or along outputs, whichever errs less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxweights.core._host import on_host
from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._calibrated import (
    OnFailure,
    check_failures,
    describe_failure,
    status_of,
    warn_of_fallback,
    warn_of_few_tokens,
)
from jaxweights.quantize._gptq_levels import GridLevels
from jaxweights.quantize._gptq_matrix import GptqMatrix, prepare_gram, round_rows
from jaxweights.quantize._grid import (
    Codes,
    Grid,
    GridKind,
    GroupAxis,
    GroupSize,
    Pad,
    Search,
    make_grid,
    round_matrix,
)
from jaxweights.quantize._leaves import (
    REFUSAL,
    describe_bad_scales,
    pack,
    replace_leaf,
    unfit_leaf,
)
from jaxweights.quantize._output_error import output_error
from jaxweights.quantize._settings import check_damping, is_word
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._quantized import Quantized

_NAME = "quantize.adadim"

Method = Literal["round_to_nearest", "gptq"]
Metric = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
AXES: tuple[GroupAxis, ...] = get_args(GroupAxis)


class AxisChoice(NamedTuple):
    """What `adadim` chose for one leaf.

    Attributes:
      axis: "input" or "output".
      errors: The metric for those that were tried, summed over the leaf's stack.
    """

    axis: GroupAxis
    errors: dict[GroupAxis, float]


class _Result(NamedTuple):
    """One leaf's candidates on their way through `leafwise`; stack axes come first."""

    codes: tuple[Codes, ...]  # by axis
    errors: tuple[jax.Array, ...]
    tokens: jax.Array
    damping: jax.Array
    inputs: jax.Array
    finite_gram: jax.Array


def adadim(
    *,
    bits: int,
    group_size: GroupSize = None,
    pad: Pad | None = None,
    grid: GridKind = "affine",
    method: Method = "round_to_nearest",
    metric: Metric = output_error,
    damping: float = 0.01,
    scale_dtype: DTypeLike = jnp.float32,
    search: Search = "absmax",
    on_failure: OnFailure = "error",
    report: Callable[[Path, AxisChoice], object] | None = None,
) -> Transform:
    r"""Quantizes each leaf in groups along its inputs or its outputs, whichever errs less.

    Groups of neighbouring columns within one input row keep the rows that outlying inputs make
    sensitive from sharing a scale with others. Neither kind is better everywhere, so both are tried
    and the one is kept whose outputs change less on calibration data. A stack is stored in arrays
    of one shape, so that all its matrices get the same. No common runtime reads groups along
    outputs.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Rows or columns sharing one scale, a divisor of both axes; None gives one per
        output or one per input.
      pad: "zero" where the last group of rows may have fewer, and groups of columns are tried only
        where `group_size` divides the outputs; None refuses a matrix that it does not divide.
      grid: As in `Grid`.
      method: "round_to_nearest", or "gptq", in order of activity, with scales found before any row
        is changed along inputs, and when a row is reached along outputs.
      metric: `metric(weight, rounded, gram)`, the error of one `(in, out)` matrix, traceable.
      damping: As in `gptq`; read by method="gptq".
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      search: As in `Grid`.
      on_failure: What to do with a matrix that no token reached, or, by method="gptq", whose Gram
        matrix no damping makes positive definite: refuse it by name, or round it to nearest.
      report: Called on the host with each leaf's path and `AxisChoice`.

    Returns:
      A transform from dense or masked matrices to `Quantized` ones, of the same shape and dtype. It
      needs the statistics "gram" and "count". The choice changes the shape of the scales, so it is
      made outside `jit`.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, as `gptq`, or if it is traced.

    Warns:
      UserWarning: As `gptq`.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)).at[3].mul(20.0)}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> chosen = {}
      >>> tx = jw.quantize.adadim(bits=3, group_size=32, report=chosen.__setitem__)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].scale.shape, chosen["kernel"].axis
      ((64, 1), 'output')

    Source: Heo et al. 2023, arXiv:2309.15531, section 4.
    Differs: (1) The error is that of the layer's own outputs, from its Gram matrix, unless `metric`
      says otherwise; the authors run the block around it. (2) By method="gptq" the results of GPTQ
      are compared, not those of rounding.
    """
    if not is_word(method, get_args(Method)):
        raise ValueError(
            f"{_NAME}: method={method!r} is unknown. Choose 'round_to_nearest' or 'gptq'."
        )
    if is_word(group_size, ["tensor"]):
        raise ValueError(f"{_NAME}: group_size='tensor' has no axis to choose. Give a length.")
    check_damping(_NAME, damping)
    if not callable(metric):
        raise TypeError(f"{_NAME}: metric={metric!r} cannot be called. Pass such as output_error.")
    check_failures(_NAME, on_failure, report)
    grids = tuple(
        make_grid(
            _NAME,
            bits=bits,
            group_size=group_size,
            group_axis=axis,
            grid=grid,
            scale_dtype=scale_dtype,
            search=search,
            pad=pad if axis == "input" else None,
        )
        for axis in AXES
    )

    def tried(out_dim: int) -> tuple[Grid, ...]:
        size: Any = group_size
        return grids if pad is None or out_dim % size == 0 else grids[:1]

    def prepare(gram: jax.Array, count: jax.Array) -> Any:
        del count
        if method != "gptq":
            return None
        return prepare_gram(gram, grids[0], act_order=True, damping=damping)

    def candidate(i: int, weight: jax.Array, prepared: Any, mask: jax.Array | None) -> GptqMatrix:
        if prepared is not None:
            static = AXES[i] == "input"
            return round_rows(
                weight,
                prepared,
                GridLevels(grids[i]),
                scattered=True,
                static_groups=static,
                mask=mask,
            )
        codes = round_matrix(weight, grids[i])
        return GptqMatrix(codes, None, jnp.zeros([]), jnp.zeros([]))

    def quantize(
        weight: jax.Array,
        gram: jax.Array,
        count: jax.Array,
        prepared: Any,
        mask: jax.Array | None = None,
    ) -> _Result:
        own = tried(weight.shape[1])
        found = [candidate(i, weight, prepared, mask) for i in range(len(own))]
        errors = []
        for one, grid in zip(found, own, strict=True):
            codes, scale, zero = one.codes
            full_group = grid.full_group(weight.shape[0])
            rounded = Quantized.from_codes(codes, scale, zero, bits=bits, full_group=full_group)
            errors.append(metric(weight, rounded.matrix(), gram))
        packed = tuple(pack(one.codes, g) for one, g in zip(found, own, strict=True))
        inputs = jnp.asarray(weight.shape[0])
        finite = jnp.isfinite(jnp.diagonal(gram)).all()
        return _Result(packed, tuple(errors), jnp.asarray(count), found[0].damping, inputs, finite)

    def choose(result: _Result) -> AxisChoice:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(result)):
            raise ValueError(
                f"{_NAME}: the shape of the scales depends on the data, so this cannot be traced. "
                "Apply it outside jit, or state group_axis in round_to_nearest or gptq."
            )
        sums: dict[GroupAxis, float] = {
            axis: float(np.sum(on_host(error)))
            for axis, error in zip(AXES, result.errors, strict=False)
        }
        turned = "output" in sums and sums["output"] < sums["input"]
        return AxisChoice("output" if turned else "input", sums)

    def wrap(leaf: Any, result: _Result, view: View) -> Any:
        i = AXES.index(choose(result).axis)
        return replace_leaf(leaf, result.codes[i], view, grids[i])

    def check(path: Path, leaf: Any, view: View) -> str | None:
        found = (unfit_leaf(leaf, view, grid) for grid in tried(view.out_dim))
        problem = next((problem for problem in found if problem), None)
        return problem and f"{path!r}: {problem}"

    def verify(path: Path, result: _Result) -> str | None:
        tokens, used = on_host(result.tokens), on_host(result.damping)
        choice = choose(result)
        problem = describe_bad_scales(path, result.codes[AXES.index(choice.axis)])
        if problem is None and on_failure == "error":
            problem = describe_failure(path, tokens, used)
        if problem is None and not np.isfinite([*choice.errors.values()]).all():
            cause = (
                "the metric is not finite, or its weights are so large that their squares are not. "
                "Repair the checkpoint, pass another metric"
                if on_host(result.finite_gram).all()
                else "its Gram matrix is not finite. Calibrate again"
            )
            problem = (
                f"{path!r}: its errors are {choice.errors}: {cause}, or leave this weight out with "
                "`partition`."
            )
        if problem is None:
            if method == "gptq":
                inputs = int(np.max(on_host(result.inputs), initial=0))
                warn_of_few_tokens(_NAME, path, tokens, inputs, used)
            status = status_of("adadim", tokens, used, damping)
            warn_of_fallback(_NAME, path, status, reports=False)
            if report is not None:
                report(path, choice)
        return problem

    return leafwise(
        quantize,
        name=_NAME,
        needs=("gram", "count"),
        prepare=prepare,
        wrap=wrap,
        accepts=(Masked,),
        refusal=REFUSAL,
        masked=True,
        mapping="map",
        check=check,
        verify=verify,
        checks_finite=False,
    )
