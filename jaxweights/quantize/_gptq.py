"""gptq: rounding that makes up for its own errors."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._gptq_rows import RowScales, quantize_rows
from jaxweights.quantize._grid import (
    Codes,
    GridKind,
    GroupSize,
    Search,
    find_scale,
    make_grid,
    split_groups,
    unfit_group,
)
from jaxweights.quantize._inverse_factor import inverse_factor
from jaxweights.quantize._leaves import (
    REFUSAL,
    describe_bad_scales,
    pack,
    replace_leaf,
    unfit_leaf,
)
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked

_NAME = "quantize.gptq"


class GptqMatrix(NamedTuple):
    r"""What `gptq_matrix` returns.

    Attributes:
      codes: Codes `(in, out)`, scales and zero points.
      group_index: Row of the scales that each input row reads, `(in,)` int32, or None where groups
        are consecutive rows.
      damping: Damping that made the Gram matrix positive definite, float32; NaN where none up
        to 1 did, and the weight was rounded to nearest instead.
      error: :math:`\operatorname{tr}(D^\top \tilde H D)`, float32, with D the change of the weight
        and :math:`\tilde H` the damped Gram matrix over the mean of its diagonal before damping.
    """

    codes: Codes
    group_index: Int[Array, "in"] | None
    damping: Float[Array, ""]
    error: Float[Array, ""]


def gptq_matrix(
    weight: Float[Array, "in out"],
    gram: Float[Array, "in in"],
    *,
    bits: int,
    group_size: GroupSize = None,
    grid: GridKind = "affine",
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    scale_dtype: DTypeLike = jnp.float32,
    search: Search = "absmax",
    mask: Bool[Array, "in out"] | None = None,
    compat: bool = False,
) -> GptqMatrix:
    r"""Rounds a matrix one input row at a time, pushing each row's error onto the rows to come.

    Minimises :math:`\operatorname{tr}(D^\top H D)`, :math:`D = W - \hat W`, greedily. With
    :math:`H^{-1} = U^\top U`, U upper triangular, row i is rounded and its error
    :math:`e_i = (w_i - \hat w_i) / U_{ii}` spread over all rows j > i,
    :math:`w_j \leftarrow w_j - U_{ij} e_i`.

    Args:
      weight: Kernel, `(in, out)`, floating.
      gram: :math:`X^\top X` over calibration tokens, `(in, in)`; its scale does not matter.
      bits: Bits per code, 2 to 8.
      group_size: Input rows sharing one scale; None gives one per output, "tensor" one in all.
      grid: As in `Grid`.
      act_order: Whether rows with large inputs are rounded first.
      static_groups: Whether all scales are those of the weight before any row is changed.
        Otherwise a group's scales are found when its first row is reached, from rows that
        carry the errors so far; under `act_order` its rows are then scattered over the matrix.
      damping: Ridge, as a fraction of the mean diagonal of `gram`; multiplied by ten, up to 1,
        until the Cholesky factor exists.
      block_size: Rows whose errors are spread over the rest in one product. Changes speed only.
      scale_dtype: Dtype that scales are stored in.
      search: As in `Grid`.
      mask: Bool, `(in, out)`: entries where it is False become exactly zero, and what that takes
        away is made up for by later rows, as other errors are.
      compat: Whether to repeat two habits of the authors' code: weights of dead inputs become zero,
        and a moving group's scales are read from rows that lack the errors of their own block.

    Returns:
      Codes, scales, and how the factorization went.

    Raises:
      ValueError: If a setting is out of range or the group size does not divide the input axis.

    Example:
      >>> key_w, key_x = jax.random.split(jax.random.key(0))
      >>> weight = jax.random.normal(key_w, (64, 32))
      >>> x = jax.random.normal(key_x, (256, 64))
      >>> result = gptq_matrix(weight, x.T @ x, bits=4, group_size=32)
      >>> result.codes.scale.shape, round(float(result.damping), 3)
      ((2, 32), 0.01)

    Source: Frantar et al. 2023, arXiv:2210.17323, Algorithm 1; the authors' code for act-order
      and static groups; Frantar and Alistarh 2023, arXiv:2301.00774, section 3.4, for the mask.
    Differs: (1) Dead inputs, whose diagonal is zero, keep their plain rounding. (2) A group's
      scales see the errors of all earlier rows. `compat` undoes both. (3) Damping that does not
      suffice is raised. (4) U comes from one Cholesky factorization and one triangular solve.
    """
    settings = make_grid(
        "quantize.gptq_matrix",
        bits=bits,
        group_size=group_size,
        grid=grid,
        scale_dtype=scale_dtype,
        search=search,
    )
    _check("quantize.gptq_matrix", damping, block_size)
    in_dim = weight.shape[0]
    if problem := unfit_group(settings, in_dim):
        raise ValueError(f"quantize.gptq_matrix: {problem}")
    # Rows of a group whose scales are still to be found when its first row is reached.
    moving = group_size if isinstance(group_size, int) and not static_groups else None

    weight = weight.astype(jnp.float32)
    gram = gram.astype(jnp.float32)
    if mask is not None:
        weight = jnp.where(mask, weight, 0)
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    alive = jnp.where(dead[:, None], 0, weight) if compat else weight
    # One scale per output is found before dead inputs are dropped, in the authors' code too.
    source = alive if static_groups else weight

    live_mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    # Filling with the mean keeps it the mean, whatever the scale; the authors fill with one.
    fill = jnp.where(jnp.all(dead) | compat, 1, live_mean)
    diagonal = jnp.where(dead, fill, diagonal)
    mean = jnp.mean(diagonal)
    gram = jnp.where(jnp.eye(in_dim, dtype=bool), diagonal, gram) / mean

    order = jnp.argsort(-diagonal, stable=True) if act_order else None
    if order is not None:
        alive, gram = alive[order], gram[order][:, order]
        mask = None if mask is None else mask[order]
    factor, used = inverse_factor(gram, damping)

    if moving:
        of_row = jnp.arange(in_dim) // moving
        scales = RowScales.unset(in_dim // moving, weight.shape[1], of_row, settings)
    else:
        scale, zero = find_scale(split_groups(source, settings), settings)
        of_row = jnp.arange(in_dim) // (in_dim // scale.shape[0])
        of_row = of_row if order is None else of_row[order]
        scales = RowScales(scale[:, 0], None if zero is None else zero[:, 0], of_row)
    codes, scales, errors = quantize_rows(
        alive,
        factor,
        scales,
        settings,
        moving=moving,
        stale=compat,
        block_size=block_size,
        mask=mask,
    )

    group_index = None
    if order is not None:
        place = jnp.argsort(order)
        codes = codes[place]
        group_index = (place // moving).astype(jnp.int32) if moving else None
    return GptqMatrix(
        Codes(codes, scales.scale, scales.zero_point), group_index, used, jnp.sum(errors**2)
    )


class _Result(NamedTuple):
    """One leaf's result on its way through `leafwise`; stack axes come first."""

    matrix: GptqMatrix
    tokens: jax.Array
    inputs: jax.Array


def gptq(
    *,
    bits: int,
    group_size: GroupSize = None,
    grid: GridKind = "affine",
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    scale_dtype: DTypeLike = jnp.float32,
    search: Search = "absmax",
    on_failure: Literal["error", "round_to_nearest"] = "error",
) -> Transform:
    r"""Rounds weight matrices so that their layers' outputs change least on calibration data.

    Minimises :math:`\|X W - X \hat W\|_F^2` one input row at a time, pushing each row's rounding
    error onto the rows not yet rounded. Runs in O(in² · out) for each matrix; the matrices of a
    stack one after another, by one compiled program. Pruned weights of a `Masked` leaf stay zero.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Input rows sharing one scale; None gives one per output, "tensor" one per matrix.
      grid: As in `Grid`.
      act_order: Whether rows with large inputs are rounded first. Without `static_groups`, groups
        are then scattered and every input row stores which it belongs to.
      static_groups: Whether all scales are found before any row is changed.
      damping: Ridge, as a fraction of the mean diagonal of the Gram matrix; multiplied by ten, up
        to 1, until the Cholesky factor exists.
      block_size: Rows whose errors are spread over the rest in one product. Changes speed only.
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      search: As in `Grid`.
      on_failure: What to do with a matrix that no token reached, or whose Gram matrix no damping
        makes positive definite: refuse it by name, or round it to nearest.

    Returns:
      A transform from dense or masked matrices to `Quantized` ones, of the same shape and dtype. It
      needs the statistics "gram" and "count".

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, as `round_to_nearest`, or if a
        statistic is missing or a factorization fails.

    Warns:
      UserWarning: If fewer tokens were seen than a matrix has inputs, so that its Gram matrix is
        singular but for the damping.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> tx = jw.quantize.gptq(bits=4, group_size=32)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].shape
      (64, 32)

    Source: Frantar et al. 2023, arXiv:2210.17323, Algorithm 1.
    Differs: As `gptq_matrix`.
    """
    grid_settings = {"group_size": group_size, "grid": grid, "scale_dtype": scale_dtype}
    settings = make_grid(_NAME, bits=bits, search=search, **grid_settings)
    _check(_NAME, damping, block_size)
    if on_failure not in ("error", "round_to_nearest"):
        raise ValueError(
            f"{_NAME}: on_failure={on_failure!r} is unknown. Choose 'error' or 'round_to_nearest'."
        )

    def quantize(
        weight: jax.Array, gram: jax.Array, count: jax.Array, mask: jax.Array | None = None
    ) -> _Result:
        result = gptq_matrix(
            weight,
            gram,
            bits=bits,
            search=search,
            act_order=act_order,
            static_groups=static_groups,
            damping=damping,
            block_size=block_size,
            mask=mask,
            **grid_settings,
        )
        packed = result._replace(codes=pack(result.codes, settings))
        return _Result(packed, jnp.asarray(count), jnp.asarray(weight.shape[0]))

    def wrap(leaf: Any, result: _Result, view: View) -> Any:
        matrix = result.matrix
        return replace_leaf(leaf, matrix.codes, view, settings, matrix.group_index)

    def check(path: Path, leaf: Any, view: View) -> str | None:
        problem = unfit_leaf(leaf, view, settings)
        return problem and f"{path!r}: {problem}"

    def verify(path: Path, result: _Result) -> str | None:
        problem = describe_bad_scales(path, result.matrix.codes)
        if problem is None and on_failure == "error":
            problem = _describe_failure(path, result)
        if problem is None:
            _warn_of_few_tokens(path, result)
        return problem

    return leafwise(
        quantize,
        name=_NAME,
        needs=("gram", "count"),
        wrap=wrap,
        accepts=(Masked,),
        refusal=REFUSAL,
        masked=True,
        mapping="map",
        check=check,
        verify=verify,
        checks_finite=False,
    )


def _check(asker: str, damping: float, block_size: int) -> None:
    if not 0 <= damping <= 1:
        raise ValueError(
            f"{asker}: damping={damping} must lie in [0, 1]: it is a fraction of the mean diagonal."
        )
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"{asker}: block_size={block_size!r} must be a positive integer.")


def _describe_failure(path: Path, result: _Result) -> str | None:
    """Says which matrices of a leaf could not be factored, and why; None if all could."""
    empty = np.asarray(result.tokens) == 0
    failed = np.isnan(np.asarray(result.matrix.damping)) & ~empty
    for bad, reason in (
        (empty, "no calibration token reached it. Calibrate on more data"),
        (failed, "its Gram matrix is not positive definite even with damping=1. Calibrate again"),
    ):
        if bad.any():
            return (
                f"{path!r}: {reason}, pass on_failure='round_to_nearest', or leave this weight out "
                f"with `partition`.{_of_stack(bad)}"
            )
    return None


def _warn_of_few_tokens(path: Path, result: _Result) -> None:
    tokens, inputs = np.asarray(result.tokens), np.asarray(result.inputs)
    few = tokens < inputs
    if few.any():
        warnings.warn(
            f"{_NAME}: {path!r}: {int(tokens[few].min())} tokens were seen, fewer than its "
            f"{int(inputs.flat[0])} inputs: only the damping "
            f"({float(np.max(result.matrix.damping)):.2g} of the mean diagonal) makes its Gram "
            f"matrix invertible. Calibrate on more data.{_of_stack(few)}",
            stacklevel=2,
        )


def _of_stack(bad: np.ndarray) -> str:
    if not bad.ndim:
        return ""
    places = [i[0] if len(i) == 1 else tuple(i) for i in np.argwhere(bad).tolist()]
    return f" This holds for the matrices {places[:8]} of its stack."
