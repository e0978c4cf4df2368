"""NarrowFloat: 8-bit floats and their scales."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._divide import divide
from jaxweights.weights._scaled import Scaled, check_blocks
from jaxweights.weights._weight import static, weight_dataclass


@weight_dataclass
class NarrowFloat(Scaled):
    r"""A matrix of 8-bit floats, in a dtype that accelerators multiply, with scales.

        matrix[..., i, o] = values[..., i, o] * scale[..., r, c]  (+ offset)

    with rows and columns of scales as `Scaled` says; where it `divides`, values are divided by
    scales, as those of NVFP4 are by the one of the matrix. Invariant:

        values.shape == (*stack, in, out)

    FP8 has float32 scales per output, matrix or square block, MXFP8 powers of two in
    `float8_e8m0fnu` per 32 rows. Narrower floats are codes of a `Codebook`.

    Args:
      values: `float8_e4m3fn`, `float8_e5m2` or another 8-bit float.
      scale: Array or `Scaled`, one scale a block.
      offset: Added after scaling, or None.
      divides: Whether values are divided by scales. An inverse would not be the same number.
      dtype: Dtype that it materialises to.
      view: How the matrix relates to the leaf.

    Example:
      >>> values = jnp.array([[448.0, 1.0]]).astype(jnp.float8_e4m3fn)
      >>> NarrowFloat.from_values(values, jnp.full((1, 1), 0.5)).materialize()
      Array([[224. ,   0.5]], dtype=float32)
    """

    stored: ClassVar[str] = "values"

    values: jax.Array
    scale: Any
    offset: jax.Array | None = None
    divides: bool = static(default=False)
    dtype: Any = static(default=np.dtype(np.float32))
    view: View = static(default=None)

    @classmethod
    def from_values(
        cls,
        values: jax.Array,
        scale: Any,
        offset: jax.Array | None = None,
        *,
        divides: bool = False,
        dtype: DTypeLike = jnp.float32,
        view: View | None = None,
    ) -> NarrowFloat:
        """Takes over a `(*stack, in, out)` matrix of 8-bit floats.

        Args:
          values: As in the class.
          scale: As in the class.
          offset: As in the class.
          divides: As in the class.
          dtype: Dtype that it materialises to.
          view: How the matrix relates to the leaf; None means that the leaf is the matrix.

        Returns:
          The weight.

        Raises:
          TypeError: If the values are not 8-bit floats.
          ValueError: If the shapes break an invariant of the class.
        """
        if not jnp.issubdtype(values.dtype, jnp.floating) or values.dtype.itemsize != 1:
            raise TypeError(f"NarrowFloat: values are {values.dtype}, not an 8-bit float.")
        check_blocks("NarrowFloat", "scale", scale.shape, values.shape)
        if offset is not None:
            check_blocks("NarrowFloat", "offset", offset.shape, values.shape)
        view = View.of(values.shape) if view is None else view
        return cls(values, scale, offset, divides=divides, dtype=np.dtype(dtype), view=view)

    @property
    def in_dim(self) -> int:
        """Rows of the matrix."""
        return self.values.shape[-2]

    def units(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The values before scaling, `(*stack, in, out)`."""
        return self.values.astype(dtype)

    def units_fit(self, dtype: DTypeLike) -> bool:
        """Eight-bit floats are numbers of bfloat16 and, but for powers of two, of float16."""
        del dtype
        return self.values.dtype != jnp.float8_e8m0fnu

    def _apply_scale(self, units: jax.Array, scale: jax.Array) -> jax.Array:
        return divide(units, scale) if self.divides else units * scale

    def _scales_outputs(self, dtype: Any) -> bool:
        return not self.divides and super()._scales_outputs(dtype)
