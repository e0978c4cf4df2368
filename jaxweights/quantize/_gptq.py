"""gptq: rounding that makes up for its own errors, over a tree."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core._host import on_host
from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._calibrated import (
    LeafReport,
    OnFailure,
    ReportLeaf,
    check_failures,
    describe_failure,
    status_of,
    warn_of_fallback,
    warn_of_few_tokens,
)
from jaxweights.quantize._error_propagation import make_up, propagation_matrix
from jaxweights.quantize._gptq_levels import GridLevels, Table, make_levels
from jaxweights.quantize._gptq_matrix import (
    ActOrder,
    PreparedGram,
    check_gptq,
    prepare_gram,
    round_rows,
)
from jaxweights.quantize._grid import Codes, GridKind, GroupAxis, GroupSize, Pad, Search
from jaxweights.quantize._leaves import REFUSAL, describe_bad_scales, unfit_leaf
from jaxweights.quantize._output_error import output_error
from jaxweights.quantize._settings import check_flags, check_share
from jaxweights.weights._axes import View
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._masked import Masked
from jaxweights.weights._quantized import Quantized

_NAME = "quantize.gptq"


class _Result(NamedTuple):
    """One leaf's result on its way through `leafwise`; stack axes come first."""

    weight: Quantized | Codebook
    damping: jax.Array
    tokens: jax.Array
    inputs: jax.Array
    error: jax.Array | None  # relative, where a report was asked for


def gptq(
    *,
    bits: int,
    group_size: GroupSize = None,
    group_axis: GroupAxis = "input",
    pad: Pad | None = None,
    grid: GridKind | Table = "affine",
    act_order: ActOrder = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    scale_dtype: DTypeLike = jnp.float32,
    search: Search = "absmax",
    compat: bool = False,
    error_propagation: float = 0.0,
    asymmetric_calibration: float = 0.0,
    on_failure: OnFailure = "error",
    report: ReportLeaf | None = None,
) -> Transform:
    r"""Rounds weight matrices so that their layers' outputs change least on calibration data.

    Minimises :math:`\|X W - X \hat W\|_F^2` one input row at a time, pushing each row's rounding
    error onto the rows not yet rounded. Runs in O(in² · out) for each matrix; the matrices of a
    stack one after another, by one compiled program. Weights that read the same input (queries,
    keys and values; gate and up) share one factorization of its Gram matrix. Pruned weights of a
    `Masked` leaf stay zero. Feature groups of a convolution, which read inputs of their own, are
    matrices of their own, too; not with tables, nor with groups that `act_order` scatters.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Rows (or columns) sharing one scale; None gives one per output (or per input),
        "tensor" one per matrix.
      group_axis: "input" for groups of rows of one output, which runtimes read; "output" for groups
        of columns of one input, which keep an outlying input to itself.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`, as in the
        authors' code; None refuses such a matrix.
      grid: As in `Grid`; or "nf4" or "fp4", the tables of `nf4` and `fp4`, with bits=4.
      act_order: Whether rows with large inputs are rounded first. Without `static_groups`, groups
        are then scattered and every input row stores which it belongs to. "groups" orders rows
        within their groups, and groups by their largest input, which scatters nothing.
      static_groups: Whether all scales are found before any row is changed.
      damping: Ridge, as a fraction of the mean diagonal of the Gram matrix; multiplied by ten, up
        to 1, until the Cholesky factor exists.
      block_size: Rows whose errors are spread over the rest in one product. Changes speed only.
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      search: As in `Grid`.
      compat: As in `gptq_matrix`: the authors' dead inputs and moving groups, for results like
        those of their code.
      error_propagation: Share, 0 to 1, of the errors of its inputs, which the layers before made,
        that a weight is changed to make up for before it is rounded. 0.5 as published; the nearer
        to 1, the more calibration tokens it takes, which it otherwise follows too far. Goes through
        the layers by `pipeline(block_by_block=True)`, or takes the statistics of
        `calibrate(reference=...)`.
      asymmetric_calibration: Share, 0 to 1, of the errors of each row's input that the rows rounded
        after it make up for, as they do for its rounding; 0.25 in the authors' code. Another answer
        to what `error_propagation` answers, from the same statistics, one of which may be given.
      on_failure: What to do with a matrix that no token reached, or whose Gram matrix no damping
        makes positive definite: refuse it by name, or round it to nearest.
      report: Called on the host with each leaf's path and `LeafReport`, which tells which matrices
        were rounded to nearest or damped, and their errors; such as the `__setitem__` of a dict.
        Costs one product more for each matrix. Not called under `jit`. With `error_propagation`
        the error is that of rounding the changed weight; with `asymmetric_calibration` what makes
        up for errors of inputs counts as one.

    Returns:
      A transform from dense or masked matrices to `Quantized` ones (for tables `Codebook` ones), of
      the same shape and dtype. It needs the statistics "gram" and "count", and "cross_gram" for
      `error_propagation` and `asymmetric_calibration`.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, as `round_to_nearest`, or if a
        statistic is missing or a factorization fails.

    Warns:
      UserWarning: If fewer tokens were seen than a matrix has inputs, so that its Gram matrix is
        singular but for the damping; or if a matrix was rounded to nearest and no report was
        asked for.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> report = {}
      >>> tx = jw.quantize.gptq(bits=4, group_size=32, report=report.__setitem__)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].shape
      (64, 32)
      >>> str(report["kernel"].status), float(report["kernel"].error) < 0.01
      ('gptq', True)

    Source: Frantar et al. 2023, arXiv:2210.17323, Algorithm 1; `error_propagation`: Arai and
      Ichikawa 2025, arXiv:2504.09629; `asymmetric_calibration`: Li et al. 2025, arXiv:2504.02692
      (GPTAQ), Algorithm 1.
    Differs: As `gptq_matrix`. Of asymmetric calibration: (1) Later blocks, too, are handed what was
      rounded in a row; the authors' code hands them the level it became. (2) A moving group's
      scales also see what its rows hand each other for the errors of their inputs.
    """
    levels = make_levels(
        _NAME,
        bits=bits,
        group_size=group_size,
        group_axis=group_axis,
        pad=pad,
        grid=grid,
        scale_dtype=scale_dtype,
        search=search,
    )
    check_gptq(_NAME, damping, block_size, act_order, static_groups, levels)
    check_flags(_NAME, compat=compat)
    check_share(_NAME, error_propagation=error_propagation)
    check_share(_NAME, asymmetric_calibration=asymmetric_calibration)
    share, asymmetric = float(error_propagation), float(asymmetric_calibration)
    _check_answers(share, asymmetric, compat)
    check_failures(_NAME, on_failure, report)

    pads = act_order != "groups"
    # Tables, and which rows share a scale, are a whole matrix's, not of its columns.
    scattered = act_order is True and isinstance(group_size, int) and not static_groups
    joins = isinstance(levels, GridLevels) and not scattered

    def prepare(
        gram: jax.Array, count: jax.Array, cross_gram: jax.Array | None = None
    ) -> tuple[PreparedGram, jax.Array | None]:
        del count
        fill = 1.0 if compat else None
        ready = prepare_gram(
            gram,
            levels.grid,
            act_order=act_order,
            damping=damping,
            fill=fill,
            cross_gram=cross_gram,
            asymmetric=asymmetric,
        )
        if cross_gram is None or not share:
            return ready, None
        return ready, propagation_matrix(gram, cross_gram, ready.factor.damping)

    def quantize(
        weight: jax.Array,
        gram: jax.Array,
        count: jax.Array,
        prepared: tuple[PreparedGram, jax.Array | None],
        mask: jax.Array | None = None,
        cross_gram: jax.Array | None = None,
    ) -> _Result:
        del cross_gram  # what is to know of it was prepared
        ready, propagation = prepared
        if propagation is not None:
            weight = make_up(weight, propagation, share)
        result = round_rows(
            weight,
            ready,
            levels,
            scattered=act_order is True,
            static_groups=static_groups,
            block_size=block_size,
            mask=mask,
            compat=compat,
        )
        rounded = levels.represent(result.codes, result.group_index)
        error = None
        if report is not None:
            error = output_error(weight, rounded.matrix(), gram, relative=True)
        inputs = jnp.asarray(weight.shape[0])
        return _Result(rounded, result.damping, jnp.asarray(count), inputs, error)

    def wrap(leaf: Any, result: _Result, view: View) -> Any:
        weight = dataclasses.replace(result.weight, view=view, dtype=np.dtype(leaf.dtype))
        return Masked(weight, leaf.mask) if isinstance(leaf, Masked) else weight

    def check(path: Path, leaf: Any, view: View) -> str | None:
        problem = unfit_leaf(leaf, view, levels.grid, pads=pads)
        return problem and f"{path!r}: {problem}"

    def verify(path: Path, result: _Result) -> str | None:
        tokens, used = on_host(result.tokens), on_host(result.damping)
        problem = describe_bad_scales(path, Codes(result.weight.codes, result.weight.scale, None))
        if problem is None and on_failure == "error":
            problem = describe_failure(path, tokens, used)
        if problem is None:
            inputs = int(np.max(on_host(result.inputs), initial=0))
            warn_of_few_tokens(_NAME, path, tokens, inputs, used)
            status = status_of("gptq", tokens, used, damping)
            if report is None:
                warn_of_fallback(_NAME, path, status)
            else:
                report(path, LeafReport(status, on_host(result.error), tokens))
        return problem

    return leafwise(
        quantize,
        name=_NAME,
        needs=("gram", "count", *(["cross_gram"] if share or asymmetric else [])),
        prepare=prepare,
        wrap=wrap,
        accepts=(Masked,),
        refusal=REFUSAL,
        masked=True,
        mapping="map",
        check=check,
        verify=verify,
        checks_finite=False,
        grouped="split" if joins else "refuse",
    )


def _check_answers(share: float, asymmetric: float, compat: bool) -> None:
    """Refuses two answers to the same errors, and habits of code that knows none of them."""
    if share and asymmetric:
        raise ValueError(
            f"{_NAME}: error_propagation={share} and asymmetric_calibration={asymmetric} both make "
            "up for the errors of the inputs, which would be twice. Set one of them to 0."
        )
    if asymmetric and compat:
        raise ValueError(
            f"{_NAME}: compat=True repeats code that knows no asymmetric_calibration={asymmetric}. "
            "Leave one of them out."
        )
