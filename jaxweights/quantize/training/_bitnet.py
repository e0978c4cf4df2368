"""ternary and binary: the weights of BitNet."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._leafwise import leafwise
from jaxweights.core._transform import Transform
from jaxweights.quantize._grid import Codes, Grid
from jaxweights.quantize._leaves import (
    REFUSAL,
    describe_bad_scales,
    finite_scales,
    pack,
    replace_leaf,
)
from jaxweights.quantize._ordered_sum import ordered_sum
from jaxweights.quantize._settings import is_whole, is_word
from jaxweights.weights._axes import View
from jaxweights.weights._divide import divide
from jaxweights.weights._trits import Trits, pack_trits

Share = Literal["tensor", "output"]
TernaryScale = Literal["absmean", "least_squares"]

_EPSILON = 1e-5  # of the report: keeps a matrix of zeros from dividing by zero
_GRID = Grid("narrow", 2)  # how codes of -1, 0, 1 are stored, four to a byte


def ternary(
    *, share: Share = "tensor", scale: TernaryScale = "absmean", per_byte: Literal[4, 5] = 4
) -> Transform:
    r"""Replaces weights by -1, 0 or 1 times one number, the mean magnitude.

    :math:`t = \mathrm{clip}(\mathrm{round}(w / (\gamma + \epsilon)), -1, 1)` with :math:`\gamma`
    the mean of :math:`|w|` and :math:`\epsilon = 10^{-5}`; the weight becomes :math:`\gamma t`.
    Meant for training, inside `fake_quant`: weights that were not trained for it lose most of what
    they know.

    Args:
      share: Whose weights share a scale: those of a whole matrix ("tensor"), or of one "output".
      scale: "absmean" multiplies by the same mean; "least_squares" by the number that brings the
        result closest to the weights, which loses a fifth less of normally distributed ones.
      per_byte: Weights that share a byte: 4, of two bits each, or 5, as digits of base 3, which is
        1.6 bits a weight. The values are the same; other formats know the first only.

    Returns:
      A transform from dense matrices to `Quantized` ones of 2 bits, or, with five weights in a
      byte, to `Trits`.

    Raises:
      ValueError: If a setting is unknown; when it sees a tree, if a leaf is already represented or
        holds values that are not finite.

    Example:
      >>> tx = jw.quantize.ternary()
      >>> jw.materialize(jw.apply(tx, {"kernel": jnp.array([[0.1, -3.0], [0.9, 2.0]])}))["kernel"]
      Array([[ 0. , -1.5],
             [ 1.5,  1.5]], dtype=float32)

    Source: Ma et al. 2024, arXiv:2402.17764, equations 1 to 3.
    Differs: the scale may belong to single outputs, and may be fitted.
    """
    name = "quantize.ternary"
    _check(name, share=(share, get_args(Share)), scale=(scale, get_args(TernaryScale)))
    if not is_whole(per_byte) or per_byte not in (4, 5):
        raise ValueError(
            f"{name}: per_byte={per_byte!r} must be 4 (two bits a weight) or 5 (digits of base 3)."
        )

    def quantize(weight: jax.Array) -> Codes:
        dense = weight.astype(jnp.float32)
        mean = _mean(jnp.abs(dense), share)
        codes = jnp.clip(jnp.round(divide(dense, mean + jnp.float32(_EPSILON))), -1, 1)
        if scale == "least_squares":
            hits = _total(jnp.abs(codes), share)
            mean = divide(_total(codes * dense, share), jnp.maximum(hits, 1))
        return _finish(codes, mean, packed=per_byte == 4)

    return _transform(name, quantize, trits=per_byte == 5)


def binary(*, share: Share = "tensor") -> Transform:
    r"""Replaces weights by 1 or -1 times their mean magnitude, as they lie above their mean or not.

    :math:`\hat w = \beta\, \mathrm{sign}(w - \mathrm{mean}(w))` with the mean magnitude
    :math:`\beta`; the sign of 0 is -1. Meant for training, inside `fake_quant`, with
    `clipped="pass"`: its two levels are stored on a grid that has a 0 between them, next to which
    "zero" would stop gradients.

    Args:
      share: Whose weights share the two means: those of a whole matrix ("tensor"), or of one
        "output".

    Returns:
      A transform from dense matrices to `Quantized` ones; codes take 2 bits each.

    Raises:
      ValueError: If a setting is unknown; when it sees a tree, if a leaf is already represented or
        holds values that are not finite.

    Example:
      >>> tx = jw.quantize.binary()
      >>> jw.materialize(jw.apply(tx, {"kernel": jnp.array([[0.1, -3.0], [0.9, 2.0]])}))["kernel"]
      Array([[ 1.5, -1.5],
             [ 1.5,  1.5]], dtype=float32)

    Source: Wang et al. 2023, arXiv:2310.11453, equations 1 to 3 and 12.
    """
    name = "quantize.binary"
    _check(name, share=(share, get_args(Share)))

    def quantize(weight: jax.Array) -> Codes:
        dense = weight.astype(jnp.float32)
        codes = jnp.where(dense > _mean(dense, share), 1.0, -1.0)
        return _finish(codes, _mean(jnp.abs(dense), share))

    return _transform(name, quantize)


def _check(name: str, **settings: tuple[Any, tuple[Any, ...]]) -> None:
    for setting, (value, known) in settings.items():
        if not is_word(value, known):
            raise ValueError(f"{name}: {setting}={value!r} is unknown. Choose one of {known}.")


def _total(values: jax.Array, share: Share) -> jax.Array:
    """`(1, 1)` for a whole matrix, `(1, out)` for each output."""
    return ordered_sum(values if share == "output" else values.reshape(-1, 1))


def _mean(values: jax.Array, share: Share) -> jax.Array:
    count = values.shape[0] if share == "output" else values.size
    return divide(_total(values, share), max(count, 1))


def _finish(codes: jax.Array, scale: jax.Array, *, packed: bool = True) -> Codes:
    stored = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    codes = jnp.where(scale == 0, jnp.zeros_like(codes), codes)
    if not packed:
        return Codes(pack_trits(codes.astype(jnp.int32)), stored, None)
    return pack(Codes(codes.astype(jnp.int32), stored, None), _GRID)


def _transform(name: str, quantize: Any, *, trits: bool = False) -> Transform:
    def wrap(leaf: Any, codes: Codes, view: View) -> Any:
        if trits:
            spare = codes.codes.shape[-2] * 5 - view.in_dim
            return Trits(codes.codes, codes.scale, None, spare, np.dtype(leaf.dtype), view)
        return replace_leaf(leaf, codes, view, _GRID)

    return leafwise(
        quantize,
        name=name,
        wrap=wrap,
        refusal=REFUSAL,
        verify=describe_bad_scales,
        sound=finite_scales,
    )
