"""adaround: whether each entry is rounded up or down, learned by gradients."""

from __future__ import annotations

from typing import Any

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
    Search,
    find_scale,
    join_groups,
    make_grid,
    split_groups,
)
from jaxweights.quantize._learned import (
    Moments,
    adam_step,
    check_steps,
    clip_through,
    learned_codes,
    output_losses,
    relative,
)
from jaxweights.weights._divide import divide

_NAME = "quantize.adaround"

# h = clip(1.2 sigmoid(V) - 0.1, 0, 1): the stretched sigmoid of equation 23, which reaches 0 and 1.
_STRETCH, _SHIFT = 1.2, -0.1
_WARM_UP = 0.2  # share of the steps before entries are driven to 0 or 1
_STEEPEST, _FLATTEST = 20.0, 2.0  # exponents of the regulariser, from first to last


def adaround(
    *,
    bits: int,
    group_size: GroupSize = None,
    pad: Pad | None = None,
    grid: GridKind = "affine",
    steps: int = 1000,
    learning_rate: float = 0.01,
    regularization: float = 0.01,
    scale_dtype: DTypeLike = jnp.float32,
    search: Search = "mse",
    on_failure: OnFailure = "error",
    report: ReportLeaf | None = None,
) -> Transform:
    r"""Learns for each entry which of the two levels around it leaves the outputs most alike.

    The grid stays. Each entry becomes :math:`s (\lfloor w / s \rfloor + h(V))` with h between 0 and
    1, and V is learned by Adam from
    :math:`\operatorname{tr}(D^\top H D) / T + \lambda \sum (1 - |2 h(V) - 1|^\beta)` for T tokens,
    whose last part drives h to 0 or 1. Since the layer's squared error is this quadratic form of
    the Gram matrix, no inputs are needed. An output that plain rounding serves better keeps that.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Input rows sharing one scale; None gives one per output, "tensor" one per matrix.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`; None
        refuses such a matrix.
      grid: As in `Grid`.
      steps: Steps; each costs a product with the Gram matrix and a few passes.
      learning_rate: Of Adam, for V.
      regularization: The weight of the last part.
      scale_dtype: Dtype that scales are stored in; codes are chosen for the stored scale.
      search: As in `Grid`.
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
      >>> tx = jw.quantize.adaround(bits=3, steps=20)
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(fn, params, [x], needs=tx.needs(params))
      >>> jw.apply(tx, params, stats=stats)["kernel"].bits
      3

    Source: Nagel et al. 2020, arXiv:2004.10568, equations 21 to 24.
    Differs: (1) The loss is over all tokens at once, not batches. (2) 1,000 steps, not 10,000, with
      the same shares of warm-up and annealing. (3) Outputs that plain rounding serves better keep
      it.
    """
    settings = make_grid(
        _NAME,
        bits=bits,
        group_size=group_size,
        pad=pad,
        grid=grid,
        scale_dtype=scale_dtype,
        search=search,
    )
    steps = check_steps(_NAME, steps, learning_rate=learning_rate, regularization=regularization)

    def learn(
        weight: jax.Array, gram: jax.Array, tokens: jax.Array, mask: jax.Array | None
    ) -> tuple[Codes, jax.Array]:
        mean_gram = gram / jnp.maximum(tokens, 1)
        codes, losses = adaround_matrix(
            weight, mean_gram, mask, settings, steps, learning_rate, regularization
        )
        return codes, relative(losses, weight, mean_gram)

    return learned_codes(learn, settings, name=_NAME, on_failure=on_failure, report=report)


def adaround_matrix(
    weight: jax.Array,
    gram: jax.Array,
    mask: jax.Array | None,
    grid: Grid,
    steps: int,
    learning_rate: float,
    regularization: float,
) -> tuple[Codes, jax.Array]:
    """Codes of one float32 matrix, and the loss of each output, `(out,)`.

    Args:
      weight: `(in, out)`, zero where masked.
      gram: Mean over tokens of the inputs' outer products.
      mask: False where codes stand for zero, or None.
      grid: Where the levels lie.
      steps: As in `adaround`.
      learning_rate: As in `adaround`.
      regularization: As in `adaround`.
    """
    groups = split_groups(weight, grid)
    scale, zero = find_scale(groups, grid)
    step_size = scale.astype(jnp.float32)
    centre = jnp.float32(0) if zero is None else zero.astype(jnp.float32)
    units = divide(groups, step_size)
    below = jnp.floor(units)

    def values_of(up: jax.Array) -> jax.Array:
        levels = clip_through(below + up + centre, *grid.code_range) - centre
        values = join_groups(levels * step_size, weight.shape)
        return values if mask is None else jnp.where(mask, values, 0)

    def loss(latent: jax.Array, sharpness: jax.Array, share: jax.Array) -> jax.Array:
        up = _rectified(latent)
        undecided = jnp.sum(1 - _power(jnp.abs(2 * up - 1), sharpness))
        missed = jnp.sum(output_losses(weight - values_of(up), gram))
        return missed + share * regularization * undecided

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        latent, moments = carry
        done = i.astype(jnp.float32) / steps
        annealed = jnp.clip((done - _WARM_UP) / (1 - _WARM_UP), 0, 1)
        sharpness = _STEEPEST + (_FLATTEST - _STEEPEST) * annealed
        share = jnp.where(done < _WARM_UP, 0.0, 1.0)
        gradient = jax.grad(loss)(latent, sharpness, share)
        return adam_step(latent, gradient, moments, i, learning_rate), None

    fraction = (units - below - _SHIFT) / _STRETCH  # between 0 and 1, ends excluded
    latent = jnp.log(fraction / (1 - fraction))
    carry = (latent, Moments(jnp.zeros_like(latent), jnp.zeros_like(latent)))
    (latent, _), _ = jax.lax.scan(step, carry, jnp.arange(steps))

    learned, plain = below + jnp.where(latent > 0, 1.0, 0.0), jnp.round(units)
    lost = [
        output_losses(weight - values_of(rounded - below), gram) for rounded in (learned, plain)
    ]
    better = lost[0] < lost[1]
    rounded = jnp.where(better[None, None], learned, plain) + centre
    codes = jnp.clip(rounded, *grid.code_range).astype(jnp.int32)
    codes = join_groups(codes, weight.shape)
    if mask is not None:
        at_zero = join_groups(jnp.broadcast_to(centre, groups.shape), weight.shape)
        codes = jnp.where(mask, codes, at_zero.astype(jnp.int32))
    found = Codes(codes, scale[:, 0], None if zero is None else zero[:, 0])
    return found, jnp.where(better, lost[0], lost[1])


def _rectified(latent: jax.Array) -> jax.Array:
    return clip_through(_STRETCH * jax.nn.sigmoid(latent) + _SHIFT, 0, 1)


def _power(base: jax.Array, exponent: jax.Array) -> jax.Array:
    """Of numbers between 0 and 1; on CPUs a third of the time of XLA's own power."""
    return jnp.exp(exponent * jnp.log(jnp.maximum(base, jnp.finfo(base.dtype).tiny)))
