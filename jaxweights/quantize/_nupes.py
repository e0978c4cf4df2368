"""nupes: codes and the exponent of a power grid, learned together."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._blocks import (
    Block,
    block_counts,
    block_max,
    check_block,
    fill_up_group,
    fit_block,
    in_units,
    unfit_block,
)
from jaxweights.quantize._calibrated import OnFailure, ReportLeaf
from jaxweights.quantize._grid import Pad, check_pad, make_grid
from jaxweights.quantize._learned import (
    Learned,
    Moments,
    adam_step,
    check_steps,
    learned_transform,
    of_unit_mean,
    output_losses,
    relative,
    round_through,
)
from jaxweights.quantize._leaves import check_scale_dtype, describe_bad_blocks, unfit_values
from jaxweights.quantize._power import EXPONENTS
from jaxweights.quantize._settings import is_word
from jaxweights.quantize._stored_scale import stored_scale
from jaxweights.weights._axes import View
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._divide import divide
from jaxweights.weights._masked import Masked
from jaxweights.weights._scaled import combine

_NAME = "quantize.nupes"

_LEAST_EXPONENT = 0.1

NupesSearch = Literal["absmax", "mse"]

# Shares of a block's largest magnitude that a search tries for where levels end.
_SHARES = tuple(float(share) for share in np.arange(10, 3, -1) / 10)


class _Latent(NamedTuple):
    """What is learned of one matrix.

    Attributes:
      units: Codes before they are rounded, `(in, out)`.
      exponent: The logit of where the exponent lies between its ends.
    """

    units: jax.Array
    exponent: jax.Array


def nupes(
    *,
    bits: int,
    group_size: Block = None,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    exponent_rate: float = 1e-4,
    scale_dtype: DTypeLike = jnp.float32,
    search: NupesSearch = "absmax",
    pad: Pad | None = None,
    on_failure: OnFailure = "error",
    report: ReportLeaf | None = None,
) -> Transform:
    r"""Learns the codes of a power grid, over their whole range, together with its exponent.

    Levels are :math:`\mathrm{sign}(q)\, amax\, (|q| / Q)^{1/a}` with :math:`Q = 2^{bits-1} - 1`. A
    number before rounding is learned for each code, and a for each matrix, by Adam from
    :math:`\operatorname{tr}(D^\top H D)`, which is the layer's squared error on the calibration
    tokens; rounding passes gradients on. Where `adaround` chooses between two neighbours, codes
    here may go anywhere. It starts at the best of twenty exponents, 1 among them, and keeps the
    best that it meets: so it never does worse than the "narrow" grid of `round_to_nearest`, if
    `search` is "absmax". At 2 bits, of three levels, only "mse" gives good ones.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Input rows of one output sharing a scale; None for all of an output's, "tensor"
        for all of the matrix's, a pair for tiles of (rows, columns).
      steps: Steps; each costs a product with the Gram matrix and a few passes.
      learning_rate: Of Adam, for codes.
      exponent_rate: Of Adam, for the exponent.
      scale_dtype: Dtype that scales are stored in.
      search: "absmax" ends the levels of each block at its largest magnitude amax, and "mse" where
        its squared error is least, between 0.4 and 1 of that, for each of the exponents.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`; None
        where such a leaf is refused.
      on_failure: As in `auto_round`.
      report: As in `gptq`.

    Returns:
      A transform from dense or masked matrices to `Codebook` ones, of the same shape and dtype;
      each matrix of a stack has its own table. It needs the statistics "gram" and "count".

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, as `nf4`, or if a statistic is
        missing.

    Warns:
      UserWarning: If a matrix was rounded to nearest and no report was asked for.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> tx = jw.quantize.nupes(bits=3, steps=20)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].table.shape
      (7,)

    Source: Yvinec et al. 2023, arXiv:2308.05600, sections 3.2 and 3.3.
    Differs: (1) Layers are learned from Gram matrices, not batches. (2) Exponents lie in (0.1, 1);
      their gradient skips codes of 0. (3) The best is kept. (4) Activations stay as they are. (5)
      Levels end at amax there.
    """
    # Of the integer grids only the bounds of the settings matter here.
    bits = make_grid(_NAME, bits=bits, scale_dtype=scale_dtype).bits
    check_block(_NAME, group_size)
    check_pad(_NAME, pad, group_size)
    check_scale_dtype(_NAME, scale_dtype)
    if not is_word(search, get_args(NupesSearch)):
        raise ValueError(f"{_NAME}: search={search!r} is unknown. Choose 'absmax' or 'mse'.")
    steps = check_steps(_NAME, steps, learning_rate=learning_rate, exponent_rate=exponent_rate)

    def learn(
        weight: jax.Array, gram: jax.Array, tokens: jax.Array, mask: jax.Array | None
    ) -> Learned:
        del tokens
        gram = of_unit_mean(gram)
        matrix, loss = nupes_matrix(
            weight,
            gram,
            mask,
            bits=bits,
            group_size=group_size,
            steps=steps,
            rates=(learning_rate, exponent_rate),
            scale_dtype=scale_dtype,
            search=search,
            pad=pad,
        )
        return Learned(matrix, relative(loss, weight, gram))

    def put(leaf: Any, matrix: Codebook, view: View) -> Any:
        matrix = dataclasses.replace(matrix, view=view, dtype=np.dtype(leaf.dtype))
        return Masked(matrix, leaf.mask) if isinstance(leaf, Masked) else matrix

    def bad_scales(path: Path, matrix: Codebook) -> str | None:
        return describe_bad_blocks(path, matrix)

    return learned_transform(
        learn,
        name=_NAME,
        put=put,
        check=lambda leaf, view: (
            unfit_values(leaf)
            or unfit_block(None if pad else group_size, view.in_dim, view.out_dim, pads=True)
        ),
        bad_scales=bad_scales,
        on_failure=on_failure,
        report=report,
    )


def nupes_matrix(
    weight: jax.Array,
    gram: jax.Array,
    mask: jax.Array | None,
    *,
    bits: int,
    group_size: Block,
    steps: int,
    rates: tuple[float, float],
    scale_dtype: DTypeLike,
    search: NupesSearch = "absmax",
    pad: Pad | None = None,
) -> tuple[Codebook, jax.Array]:
    """One float32 matrix on its power grid, and its loss."""
    top, in_dim = 2 ** (bits - 1) - 1, len(weight)
    block, full_group = fit_block(f"{_NAME}_matrix", group_size, pad, weight.shape)
    if full_group:  # rows of zeros, which no token reads
        weight = fill_up_group(weight, full_group)
        gram = jnp.pad(gram, (0, len(weight) - in_dim))
        mask = None if mask is None else fill_up_group(mask, full_group)
    amax = block_max(weight, block_counts(block, *weight.shape))

    def ends(exponent: jax.Array) -> jax.Array:
        """The stored scale of each block: the magnitude of its outermost levels."""
        if search == "absmax" or weight.size == 0:
            return stored_scale(amax, scale_dtype)
        return _least_error(weight, amax, exponent, top, scale_dtype)

    def loss(latent: _Latent, scale: jax.Array) -> jax.Array:
        codes = round_through(jnp.clip(latent.units, -top, top))
        values = _values(codes, scale, _exponent(latent.exponent), top)
        values = values if mask is None else jnp.where(mask, values, 0)
        return jnp.sum(output_losses(weight - values, gram))

    def begin(exponent: jax.Array, scale: jax.Array) -> _Latent:
        return _Latent(_power(in_units(weight, scale), exponent) * top, _logit(exponent))

    speeds = _Latent(*(jnp.float32(rate) for rate in rates))

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        latent, best, least, moments = carry
        now, gradient = jax.value_and_grad(loss)(latent, scale)
        better = now < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), latent, best)
        moved, moments = adam_step(latent, gradient, moments, i, speeds)
        return (moved, best, jnp.where(better, now, least), moments), None

    def attempt(exponent: jax.Array) -> jax.Array:
        scale = ends(exponent)
        return loss(begin(exponent, scale), scale)

    exponents = jnp.asarray(EXPONENTS, jnp.float32)  # where learning may start; 1 is plain rounding
    tried = jax.lax.map(attempt, exponents)
    # NaN is never least: then the last, plain rounding, is where it stays.
    chosen = jnp.argmin(jnp.where(jnp.isfinite(tried), tried, jnp.inf)[::-1])
    scale = ends(exponents[::-1][chosen])
    start = begin(exponents[::-1][chosen], scale)
    moments = Moments(*(jax.tree.map(jnp.zeros_like, start) for _ in range(2)))
    carry = (start, start, loss(start, scale), moments)
    (_, best, least, _), _ = jax.lax.scan(step, carry, jnp.arange(steps + 1))

    codes = jnp.round(jnp.clip(best.units, -top, top)).astype(jnp.int32) + top
    codes = codes if mask is None else jnp.where(mask, codes, jnp.int32(top))
    table = _level(jnp.arange(-top, top + 1, dtype=jnp.float32), _exponent(best.exponent), top)
    return (
        Codebook.from_codes(codes[:in_dim], table, scale, bits=bits, full_group=full_group),
        least,
    )


def _least_error(
    weight: jax.Array, amax: jax.Array, exponent: jax.Array, top: int, scale_dtype: DTypeLike
) -> jax.Array:
    """Scales, of the shape of `amax`, for which each block's squared error is least."""

    def error(scale: jax.Array) -> jax.Array:
        units = _power(in_units(weight, scale), exponent) * top
        codes = jnp.round(jnp.clip(units, -top, top))
        missed = jnp.square(weight - _values(codes, scale, exponent, top))
        (rows, columns), (in_dim, out_dim) = amax.shape, weight.shape
        return missed.reshape(rows, in_dim // rows, columns, out_dim // columns).sum((1, 3))

    def attempt(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[Any, None]:
        scale = stored_scale(amax * share, scale_dtype)
        new = error(scale)
        return (jnp.minimum(new, best[0]), jnp.where(new < best[0], scale, best[1])), None

    whole = stored_scale(amax, scale_dtype)
    (_, scale), _ = jax.lax.scan(attempt, (error(whole), whole), jnp.asarray(_SHARES[1:]))
    return scale


def _values(codes: jax.Array, scale: jax.Array, exponent: jax.Array, top: int) -> jax.Array:
    """What codes between -top and top stand for."""
    return combine(_level(codes, exponent, top), scale.astype(jnp.float32), jnp.multiply)


def _power(shares: jax.Array, exponent: jax.Array) -> jax.Array:
    """sign(x) |x|^a; x itself for a = 1."""
    size = jnp.abs(shares)
    curved = jnp.exp(exponent * jnp.log(jnp.where(size == 0, 1.0, size)))
    curved = jnp.where(size == 0, 0.0, jnp.where(exponent == 1, size, curved))
    return jnp.sign(shares) * curved


def _level(codes: jax.Array, exponent: jax.Array, top: int) -> jax.Array:
    """sign(q) (|q| / Q)^(1/a); the derivative by a is 0 for q = 0, where there is none."""
    return _power(divide(codes, top), 1 / exponent)


def _exponent(logit: jax.Array) -> jax.Array:
    return _LEAST_EXPONENT + (1 - _LEAST_EXPONENT) * jax.nn.sigmoid(logit)


def _logit(exponent: jax.Array) -> jax.Array:
    """The inverse; infinite for 1, where sigmoid is exactly 1 and has no derivative."""
    share = (exponent - _LEAST_EXPONENT) / (1 - _LEAST_EXPONENT)
    return jnp.log(share / (1 - share))
