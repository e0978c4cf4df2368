"""Trits: weights of -1, 0 and 1, five to a byte."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._matrix_weight import matrix_parts
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._scaled import Scaled, check_blocks
from jaxweights.weights._weight import static, weight_dataclass

_PER_BYTE = 5
_WEIGHTS = tuple(3 ** (_PER_BYTE - 1 - i) for i in range(_PER_BYTE))  # the first digit is highest
_STATES = 3**_PER_BYTE


@weight_dataclass
class Trits(Scaled):
    r"""A matrix of -1, 0 and 1 with scales, in 1.6 bits a weight.

    Five consecutive rows are the digits, plus one, of a number of base 3 from 0 to 242; a byte
    holds that number times 256/243, rounded up, so that each digit is what a product by a power of
    three carries over. With `t` the `(*stack, in, out)` digits that `codes_matrix()` unpacks:

        matrix[..., i, o] = t[..., i, o] * scale[..., r, c]

    with rows and columns of scales as `Scaled` says. Invariants:

        codes.shape == (*stack, (in + spare) / 5, out), uint8;  0 <= spare < 5

    Args:
      codes: Stored bytes.
      scale: Array, one scale a block.
      offset: None: what has one needs no zero.
      spare: Digits of the last row of bytes that stand for nothing.
      dtype: Dtype that it materialises to.
      view: How the matrix relates to the leaf.

    Example:
      >>> weight = Trits.from_codes(jnp.array([[1, -1], [0, 1]]), jnp.full((1, 1), 0.5))
      >>> weight.materialize()
      Array([[ 0.5, -0.5],
             [ 0. ,  0.5]], dtype=float32)

    Source: Ma et al. 2024, arXiv:2402.17764, for the weights; the bytes are those of llama.cpp's
      TQ1_0 blocks, whose rows lie in another order.
    """

    stored: ClassVar[str] = "codes"

    codes: jax.Array
    scale: Any
    offset: jax.Array | None = None
    spare: int = static(default=0)
    dtype: Any = static(default=np.dtype(np.float32))
    view: View = static(default=None)

    @classmethod
    def from_codes(
        cls,
        codes: jax.Array,
        scale: jax.Array,
        *,
        dtype: DTypeLike = jnp.float32,
        view: View | None = None,
    ) -> Trits:
        """Packs a `(*stack, in, out)` matrix of -1, 0 and 1.

        Args:
          codes: Integers from -1 to 1, any signed dtype.
          scale: As in the class.
          dtype: Dtype that it materialises to.
          view: How the matrix relates to the leaf; None means that the leaf is the matrix.

        Returns:
          The weight.

        Raises:
          ValueError: If the shapes break an invariant of the class.
        """
        check_blocks("Trits", "scale", scale.shape, codes.shape)
        spare = -codes.shape[-2] % _PER_BYTE
        view = View.of(codes.shape) if view is None else view
        return cls(pack_trits(codes), scale, None, spare, np.dtype(dtype), view)

    @property
    def in_dim(self) -> int:
        """Rows of the matrix."""
        return self.codes.shape[-2] * _PER_BYTE - self.spare

    def codes_matrix(self) -> jax.Array:
        """The digits, `(*stack, in, out)`, int8."""
        return unpack_trits(self.codes)[..., : self.in_dim, :]

    def units(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The digits in another dtype."""
        return self.codes_matrix().astype(dtype)

    def units_fit(self, dtype: DTypeLike) -> bool:
        """Every dtype holds -1, 0 and 1."""
        del dtype
        return True

    def quantized(self) -> Quantized:
        """The same numbers in two bits each, which more of the library and of others reads."""
        return Quantized.from_codes(
            self.codes_matrix(), self.scale, bits=2, dtype=self.dtype, view=self.fitted().view
        )

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Bytes are split with the inputs, where none of their digits is spare."""
        parts = matrix_parts(self.fitted().view, self.ndim, spec)
        if self.spare and (parts is None or parts[-2] is not None):
            return None
        return super().partition(spec, mesh)


def pack_trits(codes: jax.Array) -> jax.Array:
    """Puts five rows of -1, 0 and 1 into each byte; rows that are missing count as 0.

    Example:
      >>> pack_trits(jnp.array([[1], [1], [1], [1], [1]])).tolist()
      [[255]]
    """
    *stack, in_dim, out_dim = codes.shape
    rows = -(-in_dim // _PER_BYTE)
    fill = [(0, 0)] * len(stack) + [(0, rows * _PER_BYTE - in_dim), (0, 0)]
    digits = jnp.pad(codes.astype(jnp.int32), fill) + 1
    digits = digits.reshape(*stack, rows, _PER_BYTE, out_dim)
    number = jnp.zeros([], jnp.int32)
    for i, weight in enumerate(_WEIGHTS):
        number = number + digits[..., i, :] * weight
    return ((number * 256 + _STATES - 1) // _STATES).astype(jnp.uint8)


def unpack_trits(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_trits`: `(*stack, 5 rows, out)`, int8.

    Example:
      >>> unpack_trits(jnp.array([[0]], jnp.uint8)).ravel().tolist()
      [-1, -1, -1, -1, -1]
    """
    *stack, rows, out_dim = packed.shape
    powers = np.array([3**i for i in range(_PER_BYTE)], np.uint8)
    powers = powers.reshape((1,) * (len(stack) + 1) + (-1, 1))
    # Modulo 256 a power of three moves the digits before it out; the next is what three carries.
    moved = packed[..., :, None, :] * powers
    digits = (moved.astype(jnp.uint16) * jnp.uint16(3)) >> jnp.uint16(8)
    return (digits.astype(jnp.int8) - jnp.int8(1)).reshape(*stack, rows * _PER_BYTE, out_dim)
