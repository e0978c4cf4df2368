"""How slices of results are cast and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._rank_search import magnitude_bits
from jaxweights.stream._jobs import Operand

_BFLOAT16 = np.dtype(jnp.bfloat16)
_NAN, _INFINITE = 0x7FC0, 0x7F80  # patterns of bfloat16
_OVERFLOWS = 0x7F7F8000  # the first pattern of float32 that bfloat16 rounds to infinity


def stored(values: jax.Array, dtype: Any, *looked_at: jax.Array) -> jax.Array:
    """Values in the dtype that is written, with NaN where they or what is looked at is not finite.

    bfloat16 is rounded to nearest, ties to even, by integers: the same values as the compiler's own
    cast, faster on a CPU. Numbers that are too large for it become NaN, too.

    Args:
      values: What is written.
      dtype: Its dtype.
      *looked_at: Arrays of the same shape whose values must be finite, too.

    Returns:
      The cast values.
    """
    narrow = np.dtype(dtype) == _BFLOAT16 and values.dtype == jnp.float32
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) if narrow else jnp.uint32(0)
    good = magnitude_bits(values) < _OVERFLOWS if narrow else jnp.isfinite(values)
    for array in looked_at:
        good = good & jnp.isfinite(array)
    if not narrow:
        return jnp.where(good, values.astype(dtype), jnp.nan)
    half = jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1))
    top = jnp.where(good, (bits + half) >> 16, jnp.uint32(_NAN)).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(top, jnp.bfloat16)


def checked(
    name: str, operands: Sequence[Operand], arrays: Sequence[Any], result: jax.Array
) -> np.ndarray:
    """A slice that `stored` made, if all of it is finite.

    Args:
      name: Of the tensor that is written.
      operands: What it was made of.
      arrays: Their slices.
      result: The slice of the result.

    Returns:
      The result in NumPy.

    Raises:
      ValueError: If a value is not finite; it names the operands that hold such values.
    """
    found = np.asarray(result)
    if not _all_finite(found):
        refuse_nonfinite(name, operands, arrays)
    return found


def _all_finite(array: np.ndarray) -> bool:
    if array.dtype != _BFLOAT16:
        return bool(np.isfinite(array).all())
    # What `stored` refuses is a positive NaN, the largest of the signed integers.
    return bool(np.max(array.view(np.int16), initial=0) < _INFINITE)


def refuse_nonfinite(name: str, operands: Sequence[Operand], arrays: Sequence[Any]) -> None:
    """Says which operands of a slice hold values that are not finite."""
    bad = [
        f"{operand.label} ({int(np.sum(~np.isfinite(np.asarray(array, np.float32))))} values)"
        for operand, array in zip(operands, arrays, strict=True)
        if not np.isfinite(np.asarray(array, np.float32)).all()
    ]
    raise ValueError(
        f"{name!r}: "
        + (
            f"values of {', '.join(bad)} are not finite. Repair the checkpoint, or leave it out."
            if bad
            else "the merged values overflow the dtype that is written. Choose float32 or smaller "
            "weights."
        )
    )
