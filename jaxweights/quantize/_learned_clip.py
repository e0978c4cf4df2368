"""learned_clip: where each group's range ends, learned by gradients."""

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
    encode,
    join_groups,
    make_grid,
    range_of,
    scale_of_range,
    split_groups,
)
from jaxweights.quantize._learned import (
    Moments,
    adam_step,
    check_steps,
    clip_through,
    learned_codes,
    of_unit_mean,
    output_losses,
    relative,
    round_through,
)

_NAME = "quantize.learned_clip"
_START = 4.0  # of the authors: sigmoid(4) = 0.982 of the range


class _Ends(NamedTuple):
    """Logits of what the ends of each group's range are multiplied by, `(rows, 1, out)`."""

    low: jax.Array
    high: jax.Array


def learned_clip(
    *,
    bits: int,
    group_size: GroupSize = None,
    pad: Pad | None = None,
    grid: GridKind = "affine",
    steps: int = 400,
    learning_rate: float = 0.02,
    scale_dtype: DTypeLike = jnp.float32,
    on_failure: OnFailure = "error",
    report: ReportLeaf | None = None,
) -> Transform:
    r"""Learns where each group's range ends, and rounds every entry to the nearest level.

    The ends of a range become :math:`\sigma(\beta) \min(w)` and :math:`\sigma(\gamma) \max(w)`,
    which scale and zero point follow, and both logits go down the gradient of
    :math:`\operatorname{tr}(D^\top H D)`, D being the change of the weight and H the Gram matrix of
    its inputs, by Adam; rounding passes gradients on. It pays at 2 and 3 bits, where a step that is
    finer for most entries is worth clipping a few. What was best of each output is kept; the whole
    range is tried first, so no output ever does worse than by `round_to_nearest`. `auto_round`
    learns which way entries are rounded, too.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Input rows sharing one scale; None gives one per output, "tensor" one per matrix.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`; None
        refuses such a matrix.
      grid: As in `Grid`. On symmetric grids only the end of larger magnitude counts.
      steps: Steps; each costs a product with the Gram matrix and a few passes.
      learning_rate: Of Adam, for the logits, which start at 4: sigmoid(4) is 0.982.
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      on_failure: As in `auto_round`.
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
      >>> tx = jw.quantize.learned_clip(bits=2, group_size=32, steps=20, learning_rate=0.5)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].bits
      2

    Source: Shao et al. 2023, arXiv:2308.13137 (OmniQuant), section 3.2, equation 2.
    Differs: (1) The loss is the layer's own, over all tokens at once, not a block's over single
      samples. (2) The best is kept for each output, the whole range among what is tried; the
      authors keep the last. (3) Any grid of `Grid`; 0 is on it.
    """
    settings = make_grid(
        _NAME, bits=bits, group_size=group_size, pad=pad, grid=grid, scale_dtype=scale_dtype
    )
    steps = check_steps(_NAME, steps, learning_rate=learning_rate)

    def learn(
        weight: jax.Array, gram: jax.Array, tokens: jax.Array, mask: jax.Array | None
    ) -> tuple[Codes, jax.Array]:
        del tokens
        gram = of_unit_mean(gram)
        codes, losses = learned_clip_matrix(
            weight, gram, mask, settings, steps, float(learning_rate)
        )
        return codes, relative(losses, weight, gram)

    return learned_codes(learn, settings, name=_NAME, on_failure=on_failure, report=report)


def learned_clip_matrix(
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

    def losses(ends: _Ends) -> jax.Array:
        scale, zero = _soft_grid(low * ends.low, high * ends.high, grid)
        codes = clip_through(round_through(groups / scale) + zero, *grid.code_range)
        values = join_groups((codes - zero) * scale, weight.shape)
        values = values if mask is None else jnp.where(mask, values, 0)
        each = output_losses(weight - values, gram)
        return jnp.full_like(each, jnp.sum(each)) if shared else each

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        logits, moments, best, least = carry
        factors = jax.tree.map(jax.nn.sigmoid, logits)
        now, pull = jax.vjp(lambda logits: losses(jax.tree.map(jax.nn.sigmoid, logits)), logits)
        (gradient,) = pull(jnp.ones_like(now))
        better = now < least
        over = better[None, None, : low.shape[-1]]
        best = jax.tree.map(lambda new, old: jnp.where(over, new, old), factors, best)
        rates = jax.tree.map(lambda _: learning_rate, logits)
        logits, moments = adam_step(logits, gradient, moments, i, rates)
        return (logits, moments, best, jnp.where(better, now, least)), None

    whole = _Ends(jnp.ones_like(low), jnp.ones_like(high))
    logits = jax.tree.map(lambda one: _START * one, whole)
    still = jax.tree.map(jnp.zeros_like, logits)
    carry = (logits, Moments(still, still), whole, losses(whole))
    # The last of the steps only looks where the one before it came to.
    (_, _, best, least), _ = jax.lax.scan(step, carry, jnp.arange(steps + 1))
    scale, zero = scale_of_range(low * best.low, high * best.high, grid)
    codes = join_groups(encode(groups, scale, zero, grid), weight.shape)
    found = Codes(codes, scale[:, 0], None if zero is None else zero[:, 0])
    return found, least / (weight.shape[1] if shared else 1)


def _soft_grid(low: jax.Array, high: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points of ranges in float32; rounding passes derivatives on."""
    scale, zero = scale_of_range(low, high, grid)
    scale = scale.astype(jnp.float32)
    if zero is None:
        return scale, jnp.zeros_like(scale)
    if grid.kind != "affine":
        return scale, zero.astype(jnp.float32)
    return scale, clip_through(round_through(-low / scale), *grid.code_range)
