"""Microscaling: the scales of small blocks of narrow floats, and inputs rounded to such blocks."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.weights._divide import divide
from jaxweights.weights._minifloat import ELEMENTS, Minifloat, nearest_minifloat

ScaleRule = Literal["floor", "ceil", "rceil", "even", "oas"]
InputForm = Literal["mxfp4", "mxfp6", "mxfp8", "nvfp4"]

MX_BLOCK = 32
NVFP4_BLOCK = 16

_ELEMENTS = {"mxfp4": "e2m1", "mxfp6": "e2m3", "mxfp8": "e4m3", "nvfp4": "e2m1"}


def shared_exponent(largest: Float[Array, "rows cols"], kind: Minifloat, rule: ScaleRule) -> Array:
    """Exponents of the scales of blocks with these largest magnitudes; int32.

    They are -126 at least, of which XLA makes no 0, and -127 of blocks of zeros.
    """
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    of_largest = jax.lax.bitcast_convert_type(jnp.float32(kind.largest), jnp.int32)
    mantissa = bits & 0x7FFFFF
    up = {
        "floor": jnp.zeros_like(bits),
        "ceil": mantissa > 0,
        "rceil": mantissa > (of_largest & 0x7FFFFF),
        # Half of the element's last place carries the mantissa over.
        "even": mantissa + (1 << (22 - kind.mantissa_bits)) >= 1 << 23,
        "oas": mantissa >= _outlier_mantissa(kind),
    }[rule]
    exponent = (bits >> 23) - 127 + up.astype(jnp.int32) - kind.largest_exponent
    return jnp.clip(exponent, jnp.where(largest == 0, -127, -126), 126)


def _outlier_mantissa(kind: Minifloat) -> int:
    """Mantissa from which "oas" goes one power up, as qwix has it: 12/7 of e2m1, 60/31 of e4m3.

    That is half a step beyond the largest number with all mantissa bits set, in units of which
    there are 2**(m + 2) - 1, times the element's largest.
    """
    steps = 2 ** (kind.mantissa_bits + 2) - 1
    threshold = kind.largest * steps / (steps - 1) / 2**kind.largest_exponent
    return math.ceil((threshold - 1) * 2**23)


def overall_scale(largest: jax.Array) -> jax.Array:
    """NVFP4's G, 448 * 6 over the largest magnitude, float32; 1 where that is 0."""
    top = jnp.full_like(largest, ELEMENTS["e4m3"].largest * ELEMENTS["e2m1"].largest)
    outer = divide(top, jnp.maximum(largest, jnp.finfo(jnp.float32).tiny))
    most = jnp.where(largest == 0, 1, jnp.float32(2.0**126))  # whose inverse is no 0 to XLA
    return jnp.where(jnp.isinf(outer), most, outer)


def input_block(form: InputForm) -> int:
    """Inputs of a token that share a scale."""
    return NVFP4_BLOCK if form == "nvfp4" else MX_BLOCK


def round_to_blocks(
    x: jax.Array, form: InputForm, *, rule: ScaleRule = "floor", overall: jax.Array | None = None
) -> jax.Array:
    """Rounds activations to a microscaling format; the gradient passes straight through.

    Args:
      x: Activations, `(..., in)`, floating; the format's block divides `in`.
      form: The format.
      rule: How powers of two are found, as in `mx`; not read by "nvfp4".
      overall: G of "nvfp4", broadcasting against `x`, with 1 in the last place.

    Returns:
      The numbers that blocks and scales stand for, float32. A block that holds infinity is NaN.
    """
    kind = ELEMENTS[_ELEMENTS[form]]
    size = input_block(form)
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True, initial=0.0)
    if form == "nvfp4":
        assert overall is not None
        scale = _nvfp4_scale(largest, overall[..., None])
        rounded = nearest_minifloat(divide(wide, jax.lax.stop_gradient(scale)), kind)
    else:
        exponent = jax.lax.stop_gradient(shared_exponent(largest, kind, rule))
        power = lambda e: jax.lax.bitcast_convert_type((e + 127) << 23, jnp.float32)  # noqa: E731
        scale = power(exponent)
        rounded = nearest_minifloat(wide * power(-exponent), kind)
    values = rounded * jax.lax.stop_gradient(scale)
    return jnp.where(jnp.isinf(largest), jnp.nan, values).reshape(x.shape)


def _nvfp4_scale(largest: jax.Array, overall: jax.Array) -> jax.Array:
    """Scales of blocks: an e4m3 over G, as the weights have; where it vanishes, 1 over G."""
    of_scale = ELEMENTS["e4m3"]
    steps = jnp.minimum(divide(largest, ELEMENTS["e2m1"].largest) * overall, of_scale.largest)
    steps = nearest_minifloat(steps, of_scale)
    return divide(jnp.where(steps == 0, jnp.ones_like(steps), steps), overall)
