"""fp8_kv: keys and values of attention in 8-bit floats."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxweights.quantize._fp8 import Fp8Element
from jaxweights.quantize._levels import ELEMENTS
from jaxweights.quantize._settings import is_whole, is_word
from jaxweights.weights._divide import divide

_NAME = "quantize.fp8_kv"

Fp8KVScope = Literal["head", "token"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8KV:
    """Keys and values of `fp8_kv`: `keys * key_scale` and `values * value_scale`.

    Args:
      keys: `(..., tokens, head_dim)`, `float8_e4m3fn` or `float8_e5m2`.
      values: Likewise.
      key_scale: Float32 that broadcasts against `keys`: `(..., 1, 1)`, or `(..., tokens, 1)` where
        every token has its own.
      value_scale: Likewise, of `values`.
      scope: "head" or "token", as in `fp8_kv`.
    """

    keys: jax.Array
    values: jax.Array
    key_scale: jax.Array
    value_scale: jax.Array
    scope: Fp8KVScope = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))


def fp8_kv(
    keys: Float[Array, "*batch tokens head_dim"],
    values: Float[Array, "*batch tokens head_dim"],
    *,
    element: Fp8Element = "e4m3",
    scope: Fp8KVScope = "head",
    key_scale: Float[Array, "*scale"] | None = None,
    value_scale: Float[Array, "*scale"] | None = None,
) -> Fp8KV:
    r"""Rounds keys and values to 8-bit floats with a scale for each head, or for each token.

    A scale brings the largest finite magnitude that shares it to the largest 8-bit float; what lies
    beyond, infinity too, becomes the largest, and NaN stays NaN. A scale of a whole head leaves
    products as they are: scores are :math:`(q \cdot k_8) s_k`, outputs :math:`(p \cdot v_8) s_v`.
    It has to be known before the first token comes: calibrate on other texts, keep the scales, and
    let `update_fp8_kv` write token after token. Scales of tokens need no calibration.

    Args:
      keys: After rotation, if the model rotates them.
      values: With as many tokens; `head_dim` may differ.
      element: "e4m3" (`float8_e4m3fn`, up to 448) or "e5m2" (up to 57344, one bit less precise).
      scope: Who shares a scale: "head" for all tokens of one index of the leading axes, "token" for
        the channels of one token of one head.
      key_scale: Scales of "head" that are known, positive, of a shape such as `(heads, 1, 1)` that
        broadcasts against `keys`, with 1 in both last places; None finds them.
      value_scale: Likewise, of values.

    Returns:
      The 8-bit floats with their scales: half the bytes of bfloat16. Where all is zero the scale
      is 1.

    Raises:
      ValueError: If a setting is unknown, shapes differ, or a scale fits no head.

    Example:
      >>> import jaxweights as jw
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 64, 32))  # texts, heads, tokens, channels
      >>> seen = jw.quantize.fp8_kv(x, x)
      >>> scale = seen.key_scale.max(axis=0)  # (8, 1, 1): of all texts
      >>> empty = jnp.zeros((1, 8, 128, 32))
      >>> cache = jw.quantize.fp8_kv(empty, empty, key_scale=scale, value_scale=scale)
      >>> cache = jw.quantize.update_fp8_kv(cache, x[:1], x[:1], start=0)
      >>> keys, _ = jw.quantize.dequantize_kv(cache)
      >>> bool(jnp.abs(keys[:, :, :64] - x[:1]).max() < 0.25)
      True

    Source: Micikevicius et al. 2022, arXiv:2209.05433, for the formats; scales of heads as in
      vLLM's FP8 caches.
    """
    if not is_word(element, get_args(Fp8Element)):
        raise ValueError(f"{_NAME}: element={element!r} is unknown. Choose 'e4m3' or 'e5m2'.")
    if not is_word(scope, get_args(Fp8KVScope)):
        raise ValueError(f"{_NAME}: scope={scope!r} is unknown. Choose 'head' or 'token'.")
    if keys.ndim < 2 or keys.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"{_NAME}: keys have shape {keys.shape} and values {values.shape}. Both are (..., "
            "tokens, head_dim), and all but the last axis must be equal."
        )
    for name, given, x in (("key_scale", key_scale, keys), ("value_scale", value_scale, values)):
        _check_scale(name, given, x, scope)
    dtype = ELEMENTS[element].dtype
    rounded = [
        _round(x, _find_scale(x, dtype, scope) if scale is None else scale, dtype)
        for x, scale in ((keys, key_scale), (values, value_scale))
    ]
    (k, k_scale), (v, v_scale) = rounded
    return Fp8KV(k, v, k_scale, v_scale, scope)


def update_fp8_kv(
    cache: Fp8KV,
    keys: Float[Array, "*batch tokens head_dim"],
    values: Float[Array, "*batch tokens head_dim"],
    start: int | jax.Array,
) -> Fp8KV:
    """Rounds new tokens and writes them into a cache.

    Scales of heads stay those of the cache, by which the tokens before were rounded; scales of
    tokens are found. Jitted with the cache donated, it is changed in place.

    Args:
      cache: Of `fp8_kv`, for as many tokens as there will be.
      keys: New tokens, floating; the other axes are those of the cache.
      values: Likewise.
      start: Token to begin at, maybe traced; `start + tokens` is at most the cache's length. Of a
        traced one that is not checked, and the last place that fits is overwritten.

    Returns:
      The cache, overwritten from `start` on.

    Raises:
      ValueError: If the tokens do not fit into the cache.

    Example:
      >>> import jaxweights as jw
      >>> cache = jw.quantize.fp8_kv(jnp.zeros((4, 2)), jnp.zeros((4, 2)), scope="token")
      >>> write = jax.jit(jw.quantize.update_fp8_kv, donate_argnums=0)
      >>> cache = write(cache, jnp.ones((1, 2)), 5 * jnp.ones((1, 2)), 2)
      >>> jw.quantize.dequantize_kv(cache)[1][:, 0].tolist()
      [0.0, 0.0, 5.0, 0.0]
    """
    asker, tokens = "quantize.update_fp8_kv", keys.shape[-2]
    for name, whole, part in (("keys", cache.keys, keys), ("values", cache.values, values)):
        *lead, length, width = whole.shape
        if part.shape != (*lead, tokens, width) or tokens > length:
            raise ValueError(
                f"{asker}: {name} have shape {part.shape} and those of the cache {whole.shape}. "
                "All but the tokens, axis -2, must be equal, and keys, values and the cache agree "
                "in how many there are."
            )
    most = cache.keys.shape[-2] - tokens
    if is_whole(start) and not 0 <= start <= most:
        raise ValueError(
            f"{asker}: start={start}: {tokens} tokens do not fit into the {most + tokens} of the "
            f"cache from there on. Begin between 0 and {most}, or make the cache longer."
        )
    dtype, own = cache.keys.dtype, cache.scope == "token"

    def write(x: jax.Array, whole: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, found = _round(x, _find_scale(x, dtype, "token") if own else scale, dtype)
        return _put(whole, codes, start), _put(scale, found, start) if own else scale

    k, k_scale = write(keys, cache.keys, cache.key_scale)
    v, v_scale = write(values, cache.values, cache.value_scale)
    return Fp8KV(k, v, k_scale, v_scale, cache.scope)


def dequantize_fp8_kv(cache: Fp8KV, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """The keys and values that 8-bit floats stand for."""
    wide = [
        (codes.astype(jnp.float32) * scale).astype(dtype)
        for codes, scale in ((cache.keys, cache.key_scale), (cache.values, cache.value_scale))
    ]
    return wide[0], wide[1]


def _check_scale(name: str, scale: Any, x: jax.Array, scope: Fp8KVScope) -> None:
    """Refuses a scale that is not that of a head."""
    if scale is None:
        return
    if scope != "head":
        raise ValueError(
            f"{_NAME}: {name} is given, but scope={scope!r} finds scales token by token. Leave it "
            "out, or pass scope='head'."
        )
    shape = jnp.shape(scale)
    fits = len(shape) <= x.ndim and shape[-2:] == (1, 1)
    if not fits or any(n not in (1, m) for n, m in zip(shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(
            f"{_NAME}: {name} has shape {shape}, which is no scale for heads of {x.shape}. It "
            f"broadcasts against that and ends with (1, 1), such as {(*x.shape[-3:-2], 1, 1)}."
        )


def _find_scale(x: jax.Array, dtype: Any, scope: Fp8KVScope) -> jax.Array:
    """Scales that bring the largest finite magnitudes to the largest number of a dtype."""
    sizes = jnp.abs(x.astype(jnp.float32))
    sizes = jnp.where(jnp.isfinite(sizes), sizes, 0)
    axes = (-2, -1) if scope == "head" else (-1,)
    scale = divide(jnp.max(sizes, axis=axes, keepdims=True, initial=0.0), _largest(dtype))
    return jnp.where(scale < np.finfo(np.float32).tiny, jnp.ones_like(scale), scale)


def _round(x: jax.Array, scale: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The nearest numbers of a dtype in units of the scale, and the scale."""
    scale = jnp.asarray(scale, jnp.float32)
    scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    units = divide(x.astype(jnp.float32), scale)
    # Clipped first: a conversion alone makes NaN of what is beyond e4m3, infinity of e5m2.
    return jnp.clip(units, -_largest(dtype), _largest(dtype)).astype(dtype), scale


def _largest(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max)


def _put(whole: jax.Array, part: jax.Array, start: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, jnp.asarray(start, jnp.int32), axis=-2)
