"""outlier_tune: OutlierTune, activations that norms write already in steps of their codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxweights.core._context import Context
from jaxweights.core._host import on_host
from jaxweights.core._layout import Layout
from jaxweights.core._paths import Flat, Params, fail, flatten, unflatten
from jaxweights.core._transform import Transform
from jaxweights.quantize._folds import Fold, Site, check_folds, fold_scale
from jaxweights.quantize._grid import check_bits
from jaxweights.quantize._groups import group_targets, scales_groups
from jaxweights.quantize._norms import move_shift, norm_sites, shift_homes
from jaxweights.quantize._settings import check_flags, check_share

_NAME = "quantize.outlier_tune"


class ActivationSteps(NamedTuple):
    """What a norm's output is shifted and divided by, so that its codes are plain roundings.

    Attributes:
      shift: z, `(*stack, in)` float32; 0 where there is no bias to take it.
      scale: s, `(*stack, in)` float32.
    """

    shift: Float[Array, "*stack in"]
    scale: Float[Array, "*stack in"]


def activation_steps(
    low: Float[Array, "*stack in"],
    high: Float[Array, "*stack in"],
    *,
    bits: int = 8,
    alpha: float = 1.0,
    symmetrize: bool = True,
) -> ActivationSteps:
    r"""The shift and the step of every channel of an activation.

    :math:`z_k = (\max_k + \min_k) / 2` and :math:`s_k = r_k^\alpha \max(r)^{1-\alpha} / Q`, with
    :math:`r_k` the largest magnitude of :math:`x_k - z_k` and :math:`Q = 2^{b-1} - 1`.

    Args:
      low: Smallest value of every channel.
      high: Largest value.
      bits: Bits per activation, 2 to 8.
      alpha: 1 gives every channel a step of its own, 0 all channels one.
      symmetrize: Whether channels are shifted.

    Returns:
      Shift and step. A channel that is constant, or was never seen, has step 1.

    Example:
      >>> steps = activation_steps(jnp.array([-1.0, 2.0]), jnp.array([3.0, 2.0]), bits=8)
      >>> steps.shift.tolist(), (127 * steps.scale[0]).round(4).tolist(), float(steps.scale[1])
      ([1.0, 2.0], 2.0, 1.0)

    Source: Wang et al. 2024, arXiv:2406.18832, sections 3.2 and 3.3.
    """
    _check("quantize.activation_steps", bits, alpha, symmetrize)
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    seen = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = (jnp.where(seen, x, 0) for x in (low, high))
    shift = (low + high) / 2 if symmetrize else jnp.zeros_like(low)
    reach = jnp.maximum(high - shift, shift - low)
    widest = jnp.max(reach, axis=-1, keepdims=True)
    scale = reach**alpha * widest ** (1 - alpha) / (2 ** (int(bits) - 1) - 1)
    return ActivationSteps(shift, jnp.where((reach > 0) & jnp.isfinite(scale), scale, 1))


def outlier_tune(
    *, folds: Fold | Sequence[Fold], bits: int = 8, alpha: float = 1.0, symmetrize: bool = True
) -> Transform:
    r"""Makes norms write activations in units of their codes, so that rounding them is all.

    Static steps for every channel would stand inside the integer product. Here they are executed
    before: the norm's gain and bias are divided by them and the readers' rows multiplied, and what
    centres each channel moves into the biases. The function stays what it was, to rounding. Then
    `round(x)`, clipped to :math:`\pm(2^{b-1} - 1)`, are the activation's codes, weights are rounded
    one scale an output, and a layer is one integer product, scaled once:
    `round(x) @ codes * scale + bias`.

    Args:
      folds: Who writes and who reads, such as `llama_folds(config)`. Only norms' outputs are
        treated: folds whose writer is a kernel are left alone.
      bits: Bits per activation, 2 to 8.
      alpha: 1 gives every channel a step of its own; smaller values leave outliers partly in the
        activation, where large ones would make the weights hard to quantize; 0 is one step for all.
      symmetrize: Whether channels are centred, where the norm has a bias and all its readers have.

    Returns:
      A transform; it needs the statistics "min" and "max" of the readers.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, if no fold has a norm, a fold's
        leaves are missing or do not fit, or no token reached a reader.

    Example:
      >>> params = {"norm": jnp.ones(8), "kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> model = lambda params, x: (x * params["norm"]) @ params["kernel"]
      >>> x = jax.random.normal(jax.random.key(1), (16, 8)).at[:, 3].mul(30.0)
      >>> tx = outlier_tune(folds=jw.quantize.Fold("kernel", "norm"))
      >>> stats = jw.calibrate(model, params, [x], needs=tx.needs(params))
      >>> tuned = jw.apply(tx, params, stats=stats)
      >>> round(float(jnp.abs(x * tuned["norm"]).max()), 3)
      127.0

    Source: Wang et al. 2024, arXiv:2406.18832 (symmetrization and pre-executed dequantization).
    Differs: (1) `alpha`, because with steps for every channel all of the outliers' difficulty lies
      in the weights. (2) Norms without a bias keep their channels' centres.
    """
    folds = check_folds(_NAME, folds)
    _check(_NAME, bits, alpha, symmetrize)
    wanted = frozenset({"count", "min", "max"})

    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(params)
        context.require("stats", _NAME)
        sites = norm_sites(_NAME, folds, flat, context.layout, stats=context.stats)
        read = {path: flat[path] for site in sites for path in site.readers}
        targets = group_targets(read, context, _NAME, wanted)
        sites = [site for site in sites if any(path in targets for path in site.readers)]
        stats: Any = context.stats
        chosen = {site: next(p for p in site.readers if p in targets) for site in sites}
        fail(
            _NAME,
            [
                f"{path!r}: no calibration token reached it. Calibrate on more data."
                for path in chosen.values()
                if not isinstance(count := stats.get(path, "count"), Tracer | jax.ShapeDtypeStruct)
                and not on_host(count).all()
            ],
        )
        for site, path in chosen.items():
            low, high = stats.get(path, "min"), stats.get(path, "max")
            centred = symmetrize and can_shift(site)
            steps = activation_steps(low, high, bits=bits, alpha=alpha, symmetrize=centred)
            flat = fold_steps(flat, site, steps, context.layout)
        return unflatten(structure, flat)

    return scales_groups(update, _NAME, wanted)


def _check(asker: str, bits: Any, alpha: Any, symmetrize: Any) -> None:
    check_bits(asker, bits)
    check_share(asker, alpha=alpha)
    check_flags(asker, symmetrize=symmetrize)


def can_shift(site: Site) -> bool:
    """Whether the norm has a bias to shift, and every reader one that takes the shift over."""
    return len(site.shifts) == 1 and all(shift_homes(site).values())


def fold_steps(flat: Flat, site: Site, steps: ActivationSteps, layout: Layout) -> Flat:
    """Moves a shift and a step of the activation into the leaves around it.

    The inverse is the fold of `ActivationSteps(-shift / scale, 1 / scale)`.
    """
    new = dict(flat)
    if can_shift(site):
        new = move_shift(new, site, [steps.shift], shift_homes(site), layout)
        (path,) = site.shifts
        moved = new[path].astype(jnp.float32) - steps.shift.reshape(new[path].shape)
        new[path] = moved.astype(new[path].dtype)
    return fold_scale(new, site, steps.scale, layout)


class RoundingErrors(NamedTuple):
    """Relative errors of a layer's output, of `outlier_tune_errors`; float32.

    Attributes:
      activations: When activations alone are rounded.
      weights: When weights alone are.
      both: When both are.
    """

    activations: Float[Array, ""]
    weights: Float[Array, ""]
    both: Float[Array, ""]


def outlier_tune_errors(
    activations: Float[Array, "tokens in"],
    weight: Float[Array, "in out"],
    *,
    bits: int = 8,
    weight_bits: int = 8,
) -> RoundingErrors:
    r"""What rounding a tuned layer costs, told apart.

    Args:
      activations: What the tuned norm writes, in units of codes, `(tokens, in)`.
      weight: The tuned weight, `(in, out)`, floating.
      bits: Bits per activation.
      weight_bits: Bits per weight, one scale an output.

    Returns:
      :math:`\|Y' - Y\|_F / \|Y\|_F` for the three.

    Example:
      >>> x = 100 * jax.random.normal(jax.random.key(0), (64, 32)) / 4
      >>> errors = outlier_tune_errors(x, jax.random.normal(jax.random.key(1), (32, 8)))
      >>> bool(errors.activations < errors.both), bool(errors.weights < errors.both)
      (True, True)
    """
    top, weight_top = (2 ** (b - 1) - 1 for b in (bits, weight_bits))
    x, w = activations.astype(jnp.float32), weight.astype(jnp.float32)
    rounded_x = jnp.clip(jnp.round(x), -top, top)
    scale = jnp.max(jnp.abs(w), axis=0, keepdims=True) / weight_top
    rounded_w = jnp.round(w / jnp.where(scale > 0, scale, 1)) * scale
    product = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
    truth = product(x, w)
    error = lambda y: jnp.linalg.norm(y - truth) / jnp.linalg.norm(truth)  # noqa: E731
    return RoundingErrors(
        error(product(rounded_x, w)),
        error(product(x, rounded_w)),
        error(product(rounded_x, rounded_w)),
    )
