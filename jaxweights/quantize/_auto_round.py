"""auto_round: rounding offsets and clipped ranges, learned by the signs of gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.core._transform import Transform
from jaxweights.quantize._calibrated import OnFailure, ReportLeaf
from jaxweights.quantize._grid import (
    Codes,
    Grid,
    GridKind,
    GroupSize,
    Pad,
    join_groups,
    make_grid,
    range_of,
    scale_of_range,
    split_groups,
)
from jaxweights.quantize._learned import (
    check_steps,
    clip_through,
    learned_codes,
    of_unit_mean,
    output_losses,
    relative,
    round_through,
)
from jaxweights.weights._divide import divide

_NAME = "quantize.auto_round"


class _Offsets(NamedTuple):
    """What is learned of one matrix.

    Attributes:
      shift: Added to each entry in steps of the grid before rounding, `(rows, group, out)`.
      low: What the lower end of each group's range is multiplied by, `(rows, 1, out)`.
      high: Likewise the upper end.
    """

    shift: jax.Array
    low: jax.Array
    high: jax.Array


def auto_round(
    *,
    bits: int,
    group_size: GroupSize = None,
    pad: Pad | None = None,
    grid: GridKind = "affine",
    steps: int = 200,
    learning_rate: float | None = None,
    scale_dtype: DTypeLike = jnp.float32,
    on_failure: OnFailure = "error",
    report: ReportLeaf | None = None,
) -> Transform:
    r"""Learns which way each entry is rounded, and where each group's range ends.

    Codes are :math:`\mathrm{round}(w / s + v) + z` with an offset v in [-1/2, 1/2] for each entry,
    and the ends of each group's range are multiplied by factors in [0, 1] that scale and zero point
    follow. Both go against the sign of the gradient of :math:`\operatorname{tr}(D^\top H D)`, by
    steps that shrink to nothing. Since the layer's squared error is this quadratic form of the
    Gram matrix, no inputs are needed and no batch is drawn. What was best of each output is kept;
    the start is `round_to_nearest`, so no output ever does worse than that.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Input rows sharing one scale; None gives one per output, "tensor" one per matrix.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`; None
        refuses such a matrix.
      grid: As in `Grid`.
      steps: Steps; each costs a product with the Gram matrix and a few passes.
      learning_rate: First step, as a share of a step of the grid (and of a range); None gives
        `1 / steps`, so that every entry may just reach either neighbour.
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      on_failure: What to do with a matrix that no token reached or whose Gram matrix is not finite:
        refuse it by name, or round it to nearest.
      report: As in `gptq`.

    Returns:
      A transform from dense or masked matrices to `Quantized` ones, of the same shape and dtype. It
      needs the statistics "gram" and "count". Feature groups of a convolution are matrices of their
      own.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, as `round_to_nearest`, or if a
        statistic is missing.

    Warns:
      UserWarning: If a matrix was rounded to nearest and no report was asked for.

    Example:
      >>> import jax, jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> tx = jw.quantize.auto_round(bits=3, group_size=32, steps=20)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].bits
      3

    Source: Cheng et al. 2023, arXiv:2309.05516, section 3.
    Differs: (1) The loss is the layer's own, over all tokens at once, not a block's over batches
      of 8. (2) The best is kept for each output, not for all. (3) Any grid of `Grid`; 0 is on it.
    """
    settings = make_grid(
        _NAME, bits=bits, group_size=group_size, pad=pad, grid=grid, scale_dtype=scale_dtype
    )
    steps = check_steps(_NAME, steps)
    rate = 1 / steps if learning_rate is None else learning_rate
    check_steps(_NAME, steps, learning_rate=rate)

    def learn(
        weight: jax.Array, gram: jax.Array, tokens: jax.Array, mask: jax.Array | None
    ) -> tuple[Codes, jax.Array]:
        del tokens
        gram = of_unit_mean(gram)
        codes, losses = auto_round_matrix(weight, gram, mask, settings, steps, float(rate))
        return codes, relative(losses, weight, gram)

    return learned_codes(learn, settings, name=_NAME, on_failure=on_failure, report=report)


def auto_round_matrix(
    weight: jax.Array,
    gram: jax.Array,
    mask: jax.Array | None,
    grid: Grid,
    steps: int,
    learning_rate: float,
) -> tuple[Codes, jax.Array]:
    """Codes of one float32 matrix, and the loss of each output, `(out,)`."""
    groups = split_groups(weight, grid)
    _, low, high = range_of(groups, grid)
    shared = grid.group_size == "tensor"  # then outputs share their range, and the best
    start = _Offsets(jnp.zeros_like(groups), jnp.ones_like(low), jnp.ones_like(high))

    def losses(offsets: _Offsets) -> jax.Array:
        values = join_groups(_soft_values(groups, low, high, offsets, grid), weight.shape)
        values = values if mask is None else jnp.where(mask, values, 0)
        each = output_losses(weight - values, gram)
        return jnp.full_like(each, jnp.sum(each)) if shared else each

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        offsets, best, least = carry
        now, pull = jax.vjp(losses, offsets)
        (gradient,) = pull(jnp.ones_like(now))
        better = now < least
        best = jax.tree.map(lambda new, old: jnp.where(_over(better, new), new, old), offsets, best)
        rate = learning_rate * (1 - i.astype(jnp.float32) / steps)
        moved = jax.tree.map(lambda x, g: x - rate * jnp.sign(g), offsets, gradient)
        moved = _Offsets(
            jnp.clip(moved.shift, -0.5, 0.5), jnp.clip(moved.low, 0, 1), jnp.clip(moved.high, 0, 1)
        )
        return (moved, best, jnp.where(better, now, least)), None

    # The last of the steps only looks where the one before it came to.
    carry = (start, start, losses(start))
    (_, best, least), _ = jax.lax.scan(step, carry, jnp.arange(steps + 1))
    scale, zero = scale_of_range(low * best.low, high * best.high, grid)
    rounded = jnp.round(divide(groups, scale) + best.shift)
    rounded = rounded if zero is None else rounded + zero.astype(jnp.float32)
    codes = jnp.clip(rounded, *grid.code_range).astype(jnp.int32)
    codes = join_groups(codes, weight.shape)
    found = Codes(codes, scale[:, 0], None if zero is None else zero[:, 0])
    return found, least / (weight.shape[1] if shared else 1)


def _over(better: jax.Array, field: jax.Array) -> jax.Array:
    """Which outputs became better, `(out,)`, for a `(rows, group, out)` field."""
    return better[None, None, : field.shape[-1]]


def _soft_values(
    groups: jax.Array, low: jax.Array, high: jax.Array, offsets: _Offsets, grid: Grid
) -> jax.Array:
    """The values that codes stand for; rounding passes derivatives on, clipping stops them."""
    low, high = low * offsets.low, high * offsets.high
    scale, zero = scale_of_range(low, high, grid)
    scale = scale.astype(jnp.float32)
    centre = jnp.zeros_like(scale) if zero is None else zero.astype(jnp.float32)
    if grid.kind == "affine":
        centre = clip_through(round_through(divide(-low, scale)), *grid.code_range)
    steps = round_through(divide(groups, scale) + offsets.shift) + centre
    return (clip_through(steps, *grid.code_range) - centre) * scale
