"""gptq_matrix: rounding of one matrix that makes up for its own errors."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxweights.core._compiled import compiled
from jaxweights.quantize._asymmetric import asymmetric_factor, carried
from jaxweights.quantize._damped_factor import Factor, damped_factor, normalize_gram, over_mean
from jaxweights.quantize._gptq_levels import (
    Levels,
    Table,
    TableLevels,
    make_levels,
)
from jaxweights.quantize._gptq_rows import RowScales, quantize_rows
from jaxweights.quantize._grid import (
    Codes,
    Grid,
    GridKind,
    GroupAxis,
    GroupSize,
    Pad,
    Search,
    unfit_group,
)
from jaxweights.quantize._settings import check_count, check_damping, check_flags, is_word

_NAME = "quantize.gptq_matrix"

ActOrder = bool | Literal["groups"]


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


class PreparedGram(NamedTuple):
    """What GPTQ needs of a Gram matrix, whatever the weight.

    Attributes:
      factor: Of the damped matrix, in the order in which rows are visited.
      order: That order, `(in,)`, or None for the rows' own.
      dead: Inputs that never came, `(in,)` bool, in the rows' own order.
      carry: As in `Asymmetric`, in the order of visits, or None.
    """

    factor: Factor
    order: Int[Array, "in"] | None
    dead: Bool[Array, "in"]
    carry: Float[Array, "in in"] | None = None


@compiled
def gptq_matrix(
    weight: Float[Array, "in out"],
    gram: Float[Array, "in in"],
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
    mask: Bool[Array, "in out"] | None = None,
    compat: bool = False,
) -> GptqMatrix:
    r"""Rounds a matrix one input row at a time, pushing each row's error onto the rows to come.

    Minimises :math:`\operatorname{tr}(D^\top H D)`, :math:`D = W - \hat W`, greedily. With
    :math:`H = R R^\top`, R upper triangular, row i of :math:`R^\top D` depends on no row after i,
    and is least where row i becomes the level nearest to
    :math:`w_i + \sum_{j<i} (R_{ji} / R_{ii}) D_j`.

    Args:
      weight: Kernel, `(in, out)`, floating.
      gram: :math:`X^\top X` over calibration tokens, `(in, in)`; its scale does not matter.
      bits: Bits per code, 2 to 8.
      group_size: Rows (or columns) sharing one scale; None gives one per output (or per input),
        "tensor" one in all.
      group_axis: "input" for groups of rows of one output, "output" for groups of columns of one
        input.
      pad: "zero" where the last group, the last to be visited where groups are scattered, may have
        fewer rows than `group_size`.
      grid: As in `Grid`; or "nf4" or "fp4", the tables of `nf4` and `fp4`, with bits=4.
      act_order: Whether rows with large inputs are rounded first. "groups" orders rows within
        their groups, and groups by their largest input, so that groups stay together.
      static_groups: Whether all scales are those of the weight before any row is changed.
        Otherwise a group's scales are found when its first row is reached, from rows that
        carry the errors so far; under `act_order=True` its rows are then scattered over the matrix.
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
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range or the group size does not divide its axis.

    Example:
      >>> key_w, key_x = jax.random.split(jax.random.key(0))
      >>> weight = jax.random.normal(key_w, (64, 32))
      >>> x = jax.random.normal(key_x, (256, 64))
      >>> result = gptq_matrix(weight, x.T @ x, bits=4, group_size=32)
      >>> result.codes.scale.shape, round(float(result.damping), 3)
      ((2, 32), 0.01)

    Source: Frantar et al. 2023, arXiv:2210.17323, Algorithm 1; the authors' code for act-order
      and static groups; Frantar and Alistarh 2023, arXiv:2301.00774, section 3.4, for the mask;
      Kim et al. 2023, arXiv:2309.15531, for groups of columns; arXiv:2505.14638 for ordered groups.
    Differs: (1) Dead inputs, whose diagonal is zero, keep their plain rounding. (2) A group's
      scales see the errors of all earlier rows. `compat` undoes both. (3) Damping that does not
      suffice is raised. (4) Nothing is inverted: with U the triangular factor of the inverse, the
      paper pushes :math:`U_{ji} D_i / U_{ii}`; the sums over all rows are the same, because U is
      the inverse of R.
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
    pads = act_order != "groups"
    if problem := unfit_group(levels.grid, *weight.shape, pads=pads):
        raise ValueError(f"{_NAME}: {problem}")
    prepared = prepare_gram(
        gram, levels.grid, act_order=act_order, damping=damping, fill=1.0 if compat else None
    )
    return round_rows(
        weight,
        prepared,
        levels,
        scattered=act_order is True,
        static_groups=static_groups,
        block_size=block_size,
        mask=mask,
        compat=compat,
    )


def check_gptq(
    asker: str,
    damping: float,
    block_size: int,
    act_order: ActOrder,
    static_groups: bool,
    levels: Levels,
) -> None:
    """Refuses settings of GPTQ that are none.

    Raises:
      TypeError: If one is of the wrong kind.
      ValueError: If one is out of range, naming it.
    """
    check_damping(asker, damping)
    check_count(asker, "block_size", block_size)
    check_flags(asker, static_groups=static_groups)
    if not isinstance(act_order, bool) and not is_word(act_order, ["groups"]):
        raise ValueError(f"{asker}: act_order={act_order!r} must be False, True or 'groups'.")
    grid = levels.grid
    scatters = act_order is True and isinstance(grid.group_size, int) and not static_groups
    if scatters and isinstance(levels, TableLevels):
        raise ValueError(
            f"{asker}: act_order=True scatters groups that are found on the way, and weights with "
            "a table of levels do not store which row belongs to which. Pass static_groups=True, "
            "or act_order='groups'."
        )
    if act_order == "groups" and not (
        isinstance(grid.group_size, int) and grid.group_axis == "input"
    ):
        raise ValueError(
            f"{asker}: act_order='groups' orders groups of rows, but group_size="
            f"{grid.group_size!r} along the {grid.group_axis} axis makes none. Pass "
            "act_order=True, or a group_size along the input axis."
        )
    if act_order == "groups" and grid.pad is not None:
        raise ValueError(
            f"{asker}: act_order='groups' visits whole groups in another order, so that a shorter "
            f"one may not come last. Pass act_order=True or False, or leave pad={grid.pad!r} out."
        )


def prepare_gram(
    gram: Float[Array, "in in"],
    grid: Grid,
    *,
    act_order: ActOrder,
    damping: float,
    fill: float | None = None,
    cross_gram: Float[Array, "in in"] | None = None,
    asymmetric: float = 0.0,
) -> PreparedGram:
    r"""Orders and factors a Gram matrix, once for all weights that read the same input.

    Args:
      gram: As in `gptq_matrix`.
      grid: Whose groups stay together under `act_order="groups"`.
      act_order: As in `gptq_matrix`.
      damping: As in `gptq_matrix`.
      fill: As in `normalize_gram`.
      cross_gram: :math:`X^\top X_f` of the quantized and the original model's inputs, or None.
      asymmetric: `share` of `asymmetric_factor`, where there is a `cross_gram`.

    Returns:
      The factor, the order of rows, and which inputs are dead.
    """
    dead = jnp.diagonal(gram) == 0
    change = None
    if cross_gram is not None and asymmetric:
        change = over_mean(cross_gram.astype(jnp.float32) - gram.astype(jnp.float32), gram)
    gram = normalize_gram(gram, fill=fill)
    order = None
    if act_order:
        order = _visiting_order(jnp.diagonal(gram), grid if act_order == "groups" else None)
        gram = gram[order][:, order]
    factor = damped_factor(gram, damping)
    if change is None:
        return PreparedGram(factor, order, dead)
    change = change if order is None else change[order][:, order]
    factor, carry = asymmetric_factor(factor, change, asymmetric)
    return PreparedGram(factor, order, dead, carry)


def _visiting_order(diagonal: jax.Array, grouped: Grid | None) -> jax.Array:
    """Rows by descending diagonal; within groups, and groups by their largest, if `grouped`."""
    if grouped is None:
        return jnp.argsort(-diagonal, stable=True)
    assert isinstance(grouped.group_size, int)
    groups = diagonal.reshape(-1, grouped.group_size)
    within = jnp.argsort(-groups, axis=1, stable=True)
    between = jnp.argsort(-jnp.max(groups, axis=1), stable=True)
    first = jnp.arange(groups.shape[0])[:, None] * grouped.group_size
    return (first + within)[between].reshape(-1)


def round_rows(
    weight: Float[Array, "in out"],
    prepared: PreparedGram,
    levels: Levels,
    *,
    scattered: bool,
    static_groups: bool,
    block_size: int = 128,
    mask: Bool[Array, "in out"] | None = None,
    compat: bool = False,
) -> GptqMatrix:
    """GPTQ of one matrix, given what was prepared of its Gram matrix.

    Args:
      weight: As in `gptq_matrix`.
      prepared: From `prepare_gram` with the same grid.
      levels: What is rounded to.
      scattered: Whether moving groups are made of rows that are visited one after another, not of
        neighbours; only where the order is not the rows' own.
      static_groups: As in `gptq_matrix`.
      block_size: As in `gptq_matrix`.
      mask: As in `gptq_matrix`.
      compat: As in `gptq_matrix`.

    Returns:
      As `gptq_matrix`.
    """
    in_dim, out_dim = weight.shape
    factor, order, dead, carry = prepared
    if weight.size == 0:
        codes = Codes(weight.astype(levels.code_dtype), *levels.scales(weight.astype(jnp.float32)))
        return GptqMatrix(codes, None, factor.damping, jnp.zeros([], jnp.float32))
    grid = levels.grid
    weight = weight.astype(jnp.float32)
    if mask is not None:
        weight = jnp.where(mask, weight, 0)
    alive = jnp.where(dead[:, None], 0, weight) if compat else weight
    # One scale per output is found before dead inputs are dropped, in the authors' code too.
    source = alive if static_groups else weight
    visited = jnp.arange(in_dim) if order is None else order

    def in_order(rows: Any) -> Any:
        return rows if rows is None or order is None else rows[order]

    size = grid.group_size
    per_row = grid.group_axis == "output" and size != "tensor" and not static_groups
    moving = size if isinstance(size, int) and not (static_groups or per_row) else None
    # A single group has its scales before any row is changed, whenever they are found.
    moving = None if moving is not None and moving >= in_dim else moving
    group_index = None
    if per_row:
        cols = 1 if size is None else out_dim // int(size)
        scales = RowScales.unset(in_dim, cols, visited, levels)
    elif moving is not None:
        of_row = (jnp.arange(in_dim) if scattered else visited) // moving
        scales = RowScales.unset(-(-in_dim // moving), out_dim, of_row, levels)
        if scattered and order is not None:
            group_index = (jnp.argsort(order) // moving).astype(jnp.int32)
    else:
        scale, zero = levels.scales(source)
        each = in_dim // scale.shape[0]
        if isinstance(size, int) and grid.group_axis == "input":
            each = size
        scales = RowScales(scale, zero, visited // each)
    codes, scales, loss = quantize_rows(
        carried(in_order(alive), carry),
        factor,
        scales,
        levels,
        moving=moving,
        per_row=per_row,
        stale=compat,
        block_size=block_size,
        mask=in_order(mask),
    )
    if order is not None:
        codes = codes[jnp.argsort(order)]
    return GptqMatrix(
        Codes(codes, scales.scale, scales.zero_point), group_index, factor.damping, jnp.sum(loss)
    )
