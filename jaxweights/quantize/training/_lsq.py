"""lsq: step sizes that are learned with the weights."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Params, Path, flatten, unflatten
from jaxweights.core._transform import Transform
from jaxweights.quantize._grid import GroupSize, Pad, make_grid, unfit_group
from jaxweights.quantize._leaves import REFUSAL
from jaxweights.quantize._ordered_sum import ordered_sum
from jaxweights.quantize._settings import check_between, check_flags
from jaxweights.quantize._unit import unit_of
from jaxweights.weights._axes import View
from jaxweights.weights._divide import divide
from jaxweights.weights._learned_step import LearnedStep, learned_round

_NAME = "quantize.lsq"


def lsq(*, bits: int, group_size: GroupSize = "tensor", pad: Pad | None = None) -> Transform:
    r"""Makes weights trainable on an integer grid, together with the grid's steps.

    Every matrix becomes a `LearnedStep`, which holds the weights and the steps that they are
    rounded to, at first :math:`s = 2\,\mathrm{mean}|w| / \sqrt{2^{b-1} - 1}`. Train the tree
    through `lift(model)` or `materialize`, all of it or what `split` selects, and turn it into
    integers with `settle`, which changes no value.

    Args:
      bits: Bits per code, 2 to 8.
      group_size: Input rows sharing one step; None gives one per output channel, "tensor" one per
        matrix, as published.
      pad: "zero" where the last group of an output may have fewer rows than `group_size`; None
        refuses such a matrix.

    Returns:
      A transform from dense matrices to `LearnedStep` ones, of the same shape and dtype.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, if the group size does not
        divide an input axis and `pad` is None, a leaf is already represented, or one holds values
        that are not finite.

    Example:
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> latent = jw.apply(jw.quantize.lsq(bits=4), params)
      >>> loss = lambda p, x: jnp.sum(jw.lift(lambda p, x: x @ p["kernel"])(p, x) ** 2)
      >>> grads = jax.grad(loss)(latent, jnp.ones((2, 8)))
      >>> grads["kernel"].latent.shape, grads["kernel"].step.shape
      ((8, 4), (1, 1))
      >>> type(jw.quantize.settle(latent)["kernel"]).__name__
      'Quantized'

    Source: Esser et al. 2020, arXiv:1902.08153, equations 1 to 4 and section 2.2.
    Differs: (1) steps may belong to outputs or groups; the gradient's scale then counts the weights
      of one step, as the code of arXiv:2302.02210 does. (2) A matrix of zeros starts with step 1.
      (3) Steps have no absolute floor; one that an optimizer moved to 0 or below stands for the
      smallest positive number.
    """
    settings = make_grid(_NAME, bits=bits, group_size=group_size, grid="full", pad=pad)

    def start(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        magnitude = jnp.abs(weight.astype(jnp.float32))
        largest, size = 2 ** (settings.bits - 1) - 1, settings.full_group(weight.shape[0])
        if not size:
            return weight, _first_step(magnitude, settings.group_size, largest)
        full = weight.shape[0] // size * size
        parts = (
            _first_step(magnitude[:full], size, largest),
            _first_step(magnitude[full:], None, largest),
        )
        return weight, jnp.concatenate(parts)

    def wrap(leaf: Any, parts: tuple[jax.Array, jax.Array], view: View) -> LearnedStep:
        latent, step = parts
        full_group = settings.full_group(view.in_dim)
        return LearnedStep(latent, step, settings.bits, np.dtype(leaf.dtype), view, full_group)

    def check(path: Path, leaf: Any, view: View) -> str | None:
        del leaf
        problem = unfit_group(settings, view.in_dim, view.out_dim)
        return problem and f"{path!r}: {problem}"

    return leafwise(start, name=_NAME, wrap=wrap, refusal=REFUSAL, check=check)


def _first_step(magnitude: jax.Array, group_size: GroupSize, largest: int) -> jax.Array:
    in_dim, out_dim = magnitude.shape
    if group_size == "tensor":
        size, rows, cols = magnitude.size, 1, 1
        groups = magnitude.reshape(size, 1)
    else:
        size = in_dim if group_size is None else min(group_size, in_dim)
        rows, cols = 1 if group_size is None else in_dim // max(size, 1), out_dim
        # A group's rows first, so that one sum over the first axis serves all groups.
        groups = magnitude.reshape(rows, size, cols).swapaxes(0, 1).reshape(size, rows * cols)
    unit = unit_of(groups)
    total = ordered_sum(groups / unit).reshape(rows, cols)
    step = unit * divide(total, max(size, 1) * math.sqrt(largest) / 2)
    return jnp.where(step == 0, jnp.ones_like(step), step)


def settle(params: Params) -> Params:
    """Ends training on a grid: learned grids become integers, and no value changes.

    Args:
      params: A tree with `LearnedStep` leaves, concrete or traced.

    Returns:
      The tree with `Quantized` leaves in their place.

    Example:
      >>> latent = jw.apply(jw.quantize.lsq(bits=2), {"kernel": jnp.array([[0.4], [-2.0]])})
      >>> stored = jw.quantize.settle(latent)
      >>> bool(jnp.all(stored["kernel"].materialize() == latent["kernel"].materialize()))
      True
    """
    flat, structure = flatten(params)
    settled = {
        path: leaf.quantized() if isinstance(leaf, LearnedStep) else leaf
        for path, leaf in flat.items()
    }
    return unflatten(structure, settled)


def lsq_round(x: jax.Array, step: ArrayLike, *, bits: int, signed: bool = True) -> jax.Array:
    r"""Rounds activations to multiples of a learned step, with the gradients of learned steps.

    Args:
      x: Activations, floating.
      step: Positive, of a shape that broadcasts to that of `x`: a scalar, or one number for each
        token position or channel. A good start is :func:`lsq_step` of the first batch.
      bits: Bits per code, 1 to 8, or 2 to 8 if signed.
      signed: Whether codes run from :math:`-2^{b-1}` to :math:`2^{b-1} - 1`, or from 0 to
        :math:`2^b - 1` (after a ReLU or a softmax).

    Returns:
      The rounded activations, in the dtype of `x`. The gradient of `x` is zero where it was
      clipped; that of a step is divided by the root of (values that share it) times (largest code).

    Raises:
      TypeError: If `bits` is no integer.
      ValueError: If `bits` is out of range.

    Example:
      >>> lsq_round(jnp.array([0.2, 0.7, 9.0]), jnp.array(0.5), bits=2, signed=False)
      Array([0. , 0.5, 1.5], dtype=float32)

    Source: Esser et al. 2020, arXiv:1902.08153, equations 1 to 4 and section 2.2.
    """
    smallest, largest = _code_range("quantize.lsq_round", bits, signed)
    step = jnp.asarray(step)
    shared = max(x.size // max(step.size, 1), 1)
    wide = jnp.broadcast_to(step.astype(jnp.float32), x.shape)
    scale = 1 / math.sqrt(shared * largest)
    rounded = learned_round(x.astype(jnp.float32), wide, smallest, largest, scale)
    return rounded.astype(x.dtype)


def lsq_step(
    x: jax.Array, *, bits: int, signed: bool = True, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    r"""The step to start training from: :math:`2\,\mathrm{mean}|x| / \sqrt{q_{max}}`.

    Args:
      x: Activations of one batch.
      bits: As in `lsq_round`.
      signed: As in `lsq_round`.
      axis: Axes whose values share a step; None for all.

    Returns:
      The steps, float32, shaped like `x` with length 1 along `axis`; a scalar for None.

    Example:
      >>> float(lsq_step(jnp.array([-1.0, 1.0]), bits=2))
      2.0

    Source: Esser et al. 2020, arXiv:1902.08153, section 2.1.
    """
    _, largest = _code_range("quantize.lsq_step", bits, signed)
    mean = jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=axis, keepdims=axis is not None)
    step = 2 * mean / math.sqrt(largest)
    return jnp.where(step == 0, jnp.ones_like(step), step)


def _code_range(asker: str, bits: int, signed: bool) -> tuple[int, int]:
    check_flags(asker, signed=signed)
    fewest = 2 if signed else 1
    bits = check_between(asker, "bits", bits, fewest, 8)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
