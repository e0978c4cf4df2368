"""power: levels spaced by a power of their number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxweights.core._compiled import compiled
from jaxweights.core._context import Context
from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Flat
from jaxweights.core._targets import inner_weight
from jaxweights.core._transform import Transform
from jaxweights.quantize._blocks import (
    Block,
    add_up,
    block_counts,
    block_max,
    check_block,
    fill_up_group,
    fit_block,
    in_units,
)
from jaxweights.quantize._grid import Pad, check_bits, check_pad
from jaxweights.quantize._leaves import check_scale_dtype, represented
from jaxweights.quantize._levels import pick, rank_bits
from jaxweights.quantize._settings import check_numbers, is_word
from jaxweights.quantize._stored_scale import stored_scale
from jaxweights.quantize._unit import unit_of
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._divide import divide
from jaxweights.weights._masked import Masked

_NAME = "quantize.power"

PowerScope = Literal["tree", "leaf"]

_BISECTED_LEVELS = 15

# Twenty, as the objective is flat about its minimum: 0.24, 0.28, ... 1.
EXPONENTS = tuple(float(a) for a in np.round(np.linspace(0.24, 1, 20), 2))


def power(
    *,
    bits: int,
    group_size: Block = None,
    exponents: Sequence[float] = EXPONENTS,
    scope: PowerScope = "tree",
    scale_dtype: DTypeLike = jnp.float32,
    pad: Pad | None = None,
) -> Transform:
    r"""Rounds weights in the power domain, where small ones have finer levels; needs no data.

    With :math:`Q = 2^{bits-1} - 1` and the largest magnitude of each group, the codes are
    :math:`q = \mathrm{round}(Q\, \mathrm{sign}(w) (|w| / amax)^a)` and stand for
    :math:`\mathrm{sign}(q)\, amax\, (|q| / Q)^{1/a}`. The exponent a is the one of `exponents` for
    which the norms of all matrices' errors have the least sum. At a = 1 it is the "narrow" grid of
    `round_to_nearest`. On normal weights, one scale per output, 4 bits, it has three quarters of
    the squared error of "narrow"; with groups of 128 "signed_max" errs less.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Input rows of one output sharing a scale; None for all of an output's, "tensor"
        for all of the matrix's, a pair for tiles of (rows, columns).
      exponents: Values of a to choose from, above 0, at most 1. Each costs a pass over the weights
        unless there is only one.
      scope: Who shares an exponent: all matrices that it acts on ("tree"), or nobody ("leaf"):
        every leaf has its own then, and every matrix of a stack.
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`; None
        where such a leaf is refused.

    Returns:
      A transform from dense or masked matrices to `Codebook` ones, of the same shape and dtype.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, if the group size does not
        divide an axis and `pad` is None, a leaf is already quantized, or one holds values that are
        not finite.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"dense": {"kernel": jnp.array([[1.0, -9.0], [4.0, 4.0], [9.0, 1.0]])}}
      >>> small = jw.apply(jw.quantize.power(bits=3, exponents=[0.5]), params)
      >>> small["dense"]["kernel"].materialize().round(3).tolist()
      [[1.0, -9.0], [4.0, 4.0], [9.0, 1.0]]

    Source: Yvinec et al. 2023, arXiv:2301.09858, equations 5 to 8.
    Differs: (1) The exponent is the best of a list instead of the end of a Nelder-Mead search. (2)
      Weights may have scales for groups. (3) Activations are not quantized.
    """
    exponents = _check(_NAME, bits, group_size, exponents, scale_dtype, pad)
    if not is_word(scope, get_args(PowerScope)):
        raise ValueError(f"{_NAME}: scope={scope!r} is unknown. Choose 'tree' or 'leaf'.")
    grid = {"bits": int(bits), "group_size": group_size, "scale_dtype": scale_dtype, "pad": pad}
    put = functools.partial(
        represented, name=_NAME, group_size=None if pad else group_size, pads=True
    )
    if len(exponents) == 1 or scope == "leaf":
        matrix = functools.partial(power_matrix, exponents=exponents, **grid)
        return put(matrix)

    def roots(weight: jax.Array) -> jax.Array:
        unit = unit_of(weight.astype(jnp.float32))
        found = power_errors(weight.astype(jnp.float32) / unit, exponents=exponents, **grid)
        return jnp.sqrt(found) * unit

    errors = leafwise(
        roots,
        name=_NAME,
        wrap=lambda leaf, result, view: result,
        accepts=(Masked,),
        checks_finite=False,
    )

    def choose(context: Context, params: Flat) -> dict[str, jax.Array]:
        quiet = dataclasses.replace(context, progress=None)
        measured, _ = errors.update(params, (), quiet)
        totals = [
            inner_weight(found).reshape(-1, len(exponents)).sum(axis=0)
            for path, found in measured.items()
            if found is not params[path]
        ]
        return {"exponent": jnp.asarray(exponents)[jnp.argmin(sum(totals))]}

    def matrix(weight: jax.Array, exponent: jax.Array) -> Codebook:
        return _encode(weight, exponent, **grid)

    return dataclasses.replace(put(matrix, shared=choose), scope="tree")


@compiled
def power_matrix(
    weight: Float[Array, "in out"],
    *,
    bits: int,
    group_size: Block = None,
    exponents: Sequence[float] = EXPONENTS,
    scale_dtype: DTypeLike = jnp.float32,
    pad: Pad | None = None,
) -> Codebook:
    """One matrix with the exponent that errs least on it.

    Args:
      weight: `(in, out)`, floating.
      bits: As in `power`.
      group_size: As in `power`.
      exponents: As in `power`.
      scale_dtype: As in `power`.
      pad: As in `power`.

    Returns:
      The matrix.

    Example:
      >>> matrix = power_matrix(jnp.array([[9.0], [-1.0]]), bits=3, exponents=[1.0, 0.5])
      >>> matrix.codes_matrix().tolist(), matrix.materialize().round(3).tolist()
      ([[6], [2]], [[9.0], [-1.0]])
    """
    exponents = _check(f"{_NAME}_matrix", bits, group_size, exponents, scale_dtype, pad)
    grid: Any = {"bits": int(bits), "group_size": group_size, "scale_dtype": scale_dtype}
    grid |= {"pad": pad}
    exponent = jnp.float32(exponents[0])
    if len(exponents) > 1:
        wide = weight.astype(jnp.float32)
        errors = power_errors(wide / unit_of(wide), exponents=exponents, **grid)
        exponent = jnp.asarray(exponents, jnp.float32)[jnp.argmin(errors)]
    return _encode(weight, exponent, **grid)


@compiled
def power_errors(
    weight: Float[Array, "in out"],
    *,
    bits: int,
    group_size: Block = None,
    exponents: Sequence[float] = EXPONENTS,
    scale_dtype: DTypeLike = jnp.float32,
    pad: Pad | None = None,
) -> Float[Array, " exponents"]:
    """Squared error of one matrix for every exponent, summed over entries.

    Args:
      weight: `(in, out)`, floating.
      bits: As in `power`.
      group_size: As in `power`.
      exponents: As in `power`.
      scale_dtype: As in `power`.
      pad: As in `power`.

    Returns:
      Float32 errors.

    Example:
      >>> power_errors(jnp.array([[9.0], [-1.0]]), bits=3, exponents=[1.0, 0.5]).round(3).tolist()
      [1.0, 0.0]
    """
    exponents = _check(f"{_NAME}_errors", bits, group_size, exponents, scale_dtype, pad)
    block, full_group = fit_block(f"{_NAME}_errors", group_size, pad, weight.shape)
    wide = fill_up_group(weight.astype(jnp.float32), full_group)
    top = 2 ** (int(bits) - 1) - 1
    step = _step(wide, bits, block, scale_dtype).astype(jnp.float32)
    if weight.size == 0:
        return jnp.zeros(len(exponents))
    step = jnp.repeat(step, weight.shape[1] // step.shape[1], axis=1)[:, None]

    def errors(values: jax.Array) -> jax.Array:
        size = jnp.abs(values) / step

        def error(exponent: jax.Array) -> jax.Array:
            missed = (_rounded(size, exponent, top) - size) * step
            return jnp.sum(missed * missed)

        return jax.lax.map(error, jnp.asarray(exponents, jnp.float32))

    return add_up(wide.reshape(len(step), -1, weight.shape[1]), errors)


def _check(
    asker: str, bits: Any, group_size: Any, exponents: Any, scale_dtype: Any, pad: Any
) -> tuple[float, ...]:
    """The exponents as numbers, when every setting was found to be one."""
    check_bits(asker, bits)
    check_block(asker, group_size)
    check_pad(asker, pad, group_size)
    check_scale_dtype(asker, scale_dtype)
    if isinstance(exponents, str | bytes) or not isinstance(
        exponents, Sequence | np.ndarray | jax.Array
    ):
        raise TypeError(
            f"{asker}: exponents={exponents!r} must be a sequence of numbers, such as [0.7]."
        )
    if not len(exponents):
        raise ValueError(f"{asker}: exponents is empty. Give at least one, such as [0.7].")
    for i, exponent in enumerate(exponents):
        check_numbers(asker, **{f"exponents[{i}]": exponent})
        if not 0 < exponent <= 1:
            raise ValueError(f"{asker}: exponent {exponent:g} must lie in (0, 1].")
    return tuple(float(exponent) for exponent in exponents)


def _encode(
    weight: jax.Array,
    exponent: jax.Array,
    *,
    bits: int,
    group_size: Block,
    scale_dtype: DTypeLike,
    pad: Pad | None,
) -> Codebook:
    block, full_group = fit_block(f"{_NAME}_matrix", group_size, pad, weight.shape)
    top = 2 ** (bits - 1) - 1
    wide = fill_up_group(weight.astype(jnp.float32), full_group)
    scale = _step(wide, bits, block, scale_dtype)
    size = _size_of_codes(in_units(jnp.abs(wide), scale), exponent, top)
    codes = jnp.where(wide < 0, -size, size)[: len(weight)].astype(jnp.int32) + top
    levels = _level(jnp.arange(1, top + 1, dtype=jnp.float32), exponent, top)
    table = jnp.concatenate([-levels[::-1], jnp.zeros(1), levels])
    return Codebook.from_codes(codes, table, scale, bits=bits, full_group=full_group)


def _step(wide: jax.Array, bits: int, group_size: Block, scale_dtype: DTypeLike) -> jax.Array:
    """The step of a uniform grid: `narrow` divides by just these."""
    largest = block_max(wide, block_counts(group_size, *wide.shape))
    return stored_scale(divide(largest, 2 ** (bits - 1) - 1), scale_dtype)


def _rounded(size: jax.Array, exponent: jax.Array, top: int) -> jax.Array:
    """The levels of magnitudes, in steps; as codes and levels below, without powers."""
    if top > _BISECTED_LEVELS:
        return _level(_size_of_codes(size, exponent, top), exponent, top)
    levels = _level(jnp.arange(top + 1, dtype=jnp.float32), exponent, top)
    middles = _level(jnp.arange(top, dtype=jnp.float32) + 0.5, exponent, top)
    return pick(list(levels), rank_bits(size, list(middles)))


def _size_of_codes(size: jax.Array, exponent: jax.Array, top: int) -> jax.Array:
    """Magnitudes of the codes of entries of a magnitude, in steps."""
    # Q (v / Q)^a; without the power, which rounds, where there is none.
    curved = top * jnp.exp(exponent * jnp.log(divide(size, top)))
    return jnp.clip(jnp.round(jnp.where(exponent == 1, size, curved)), 0, top)


def _level(size: jax.Array, exponent: jax.Array, top: int) -> jax.Array:
    """What codes of a magnitude stand for, in steps: q (q / Q)^(1/a - 1), q itself for a = 1."""
    bend = jnp.exp((1 / exponent - 1) * jnp.log(jnp.maximum(size, 0.5) / top))
    return size * bend
