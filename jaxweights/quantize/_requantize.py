"""requantize: new values on the levels that a quantized weight already has."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxweights.core._map_over_stack import map_over_stack
from jaxweights.quantize._damped_factor import damped_factor, normalize_gram
from jaxweights.quantize._gptq_levels import GridLevels
from jaxweights.quantize._gptq_rows import RowScales, quantize_rows
from jaxweights.quantize._grid import Grid
from jaxweights.quantize._own_levels import FloatsOf, TableOf
from jaxweights.quantize._settings import check_damping, check_flags
from jaxweights.weights._axes import View
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._input_changes import InputChange, Rescaled, Rotated
from jaxweights.weights._masked import Masked
from jaxweights.weights._narrow_float import NarrowFloat
from jaxweights.weights._outliers import Outliers
from jaxweights.weights._packed_codes import pack_codes
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._quantized_product import QuantizedProduct
from jaxweights.weights._rounded_inputs import RoundedInputs
from jaxweights.weights._scaled import combine
from jaxweights.weights._weight import is_weight

_NAME = "quantize.requantize"
_OWNERS = (Quantized, Codebook, NarrowFloat, QuantizedProduct)  # of levels

# What groups are stretched by where that is allowed: finely around 1, and up to twice the range.
_STRETCHES = (1.0, 0.85, 0.9, 0.94, 0.97, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0)


class Requantized(NamedTuple):
    """What `requantize` returns.

    Attributes:
      weight: The weight with new codes.
      clipped: Share of the entries whose value lay beyond the ends of their group's range, float32.
      damping: Damping that made the Gram matrices positive definite, of the shape of the stack,
        float32: 0 where none were given, NaN where no damping did and the matrix was rounded to
        nearest.
    """

    weight: Any
    clipped: Float[Array, ""]
    damping: Array


def requantize(
    weight: Any,
    value: Array,
    gram: Float[Array, "... in in"] | None = None,
    *,
    damping: float = 0.01,
    rescale: bool = False,
) -> Requantized:
    """Gives a quantized weight the codes of another value, on the levels that it has.

    Scales, zero points, tables, groups and bits stay, whatever method or file they come from, so
    that the weight remains what its runtime reads. With Gram matrices rows are rounded one at a
    time and their errors pushed onto the rows to come, as `gptq` does; without, each entry goes to
    the nearest level. Works under `jit`.

    Args:
      weight: `Quantized`, `QuantizedProduct`, `Codebook` or `NarrowFloat`, or a `Masked`,
        `Outliers`, `RoundedInputs`, `Rescaled` or `Rotated` over one: what is masked stays zero,
        outliers are kept as they are, and inputs are rounded and changed as they were.
      value: The value to store, of the shape of the weight, floating.
      gram: Gram matrices of the inputs, `(*stack, in, in)`, or None; of a `Rescaled` or `Rotated`
        those of the changed inputs, as `calibrate` gives them.
      damping: Ridge for them, as in `gptq`.
      rescale: Whether each group's scale may be multiplied by the number from 0.85 to 2 with which
        it errs least; otherwise values beyond its range are clipped. Not for scales that are
        quantized themselves.

    Returns:
      The weight, how many entries were clipped, and how the factorization went.

    Raises:
      TypeError: If the weight is not quantized.
      ValueError: If the value has another shape, or scales cannot be changed that are to be.

    Example:
      >>> from jaxweights.weights import Quantized
      >>> weight = Quantized.from_codes(jnp.array([[1], [-2]], jnp.int8), jnp.ones((1, 1)), bits=4)
      >>> new = requantize(weight, weight.materialize() + jnp.array([[2.2], [9.0]]))
      >>> new.weight.materialize().tolist(), float(new.clipped)
      ([[3.0], [7.0]], 0.0)

    Differs: (1) Nothing of the recipe is read but what the weight itself stores, so that "narrow"
      grids may come to use their lowest code, -128 at 8 bits.
    """
    if reason := why_not_requantizable(weight):
        raise TypeError(f"{_NAME}: {reason}")
    if tuple(value.shape) != tuple(weight.shape):
        raise ValueError(
            f"{_NAME}: value has shape {tuple(value.shape)}, but the weight {tuple(weight.shape)}. "
            "They must be equal."
        )
    check_damping(_NAME, damping)
    check_flags(_NAME, rescale=rescale)
    if rescale and (problem := why_not_rescalable(weight)):
        raise ValueError(f"{_NAME}: {problem}")
    return _requantize(weight, value, gram, damping=float(damping), rescale=rescale)


def why_not_requantizable(weight: Any) -> str | None:
    """Why a weight has no levels to go back to; None if it has some."""
    inner = weight
    while isinstance(inner, Masked | Outliers | RoundedInputs | Rescaled | Rotated):
        inner = inner.base
    if isinstance(inner, _OWNERS):
        return None
    kind = type(inner).__name__ if is_weight(inner) else "dense array"
    return (
        f"is over a {kind}, which has no levels to round to again. Dequantize it, add, and "
        "quantize the sum with a transform."
    )


def why_not_rescalable(weight: Any) -> str | None:
    """Why the scales of a weight that has levels cannot be changed; None if they can."""
    while not isinstance(weight, _OWNERS):
        weight = weight.base
    if not is_weight(weight.scale):
        return None
    return (
        f"rescale=True, but the weight's scales are a {type(weight.scale).__name__}, quantized "
        "themselves. Pass rescale=False, or quantize the sum with a transform."
    )


@functools.partial(jax.jit, static_argnames=("damping", "rescale"))
def _requantize(
    weight: Any,
    value: jax.Array,
    gram: jax.Array | None,
    mask: jax.Array | None = None,
    *,
    damping: float,
    rescale: bool,
) -> Requantized:
    inner = functools.partial(_requantize, gram=gram, damping=damping, rescale=rescale)
    if isinstance(weight, Masked):
        kept = weight.mask if mask is None else weight.mask & mask
        result = inner(weight.base, value, mask=kept)
        return result._replace(weight=Masked(result.weight, weight.mask))
    if isinstance(weight, Outliers):
        result = inner(weight.base, value - weight.sparse_part().astype(value.dtype), mask=mask)
        return result._replace(weight=dataclasses.replace(weight, base=result.weight))
    if isinstance(weight, Rescaled | Rotated):
        kept = None if mask is None else _refuse_mask(weight)
        result = inner(weight.base, before_change(weight, value), mask=kept)
        return result._replace(weight=dataclasses.replace(weight, base=result.weight))
    if isinstance(weight, RoundedInputs):
        kept = None if mask is None else weight.view.to_matrix(mask)
        result = inner(weight.base, weight.view.to_matrix(value), mask=kept)
        return result._replace(weight=dataclasses.replace(weight, base=result.weight))
    if isinstance(weight, QuantizedProduct):
        result = inner(weight.weight_only(), value, mask=mask)
        return result._replace(weight=weight.with_integers(result.weight))
    # The arrays' own lengths: of a shard they are not those of the view.
    view = weight.fitted().view
    matrix = view.to_matrix(value).astype(jnp.float32)
    operands: dict[str, Any] = {
        "value": matrix,
        "scale": weight.scale,
        "gram": gram,
        "mask": None if mask is None else view.to_matrix(mask),
    }
    names = ("zero_point", "offset", "group_index", "table")
    operands |= {name: getattr(weight, name, None) for name in names}
    if not isinstance(weight, Quantized):  # offsets may have blocks of their own
        if weight.offset is not None:
            offset = weight.by_row(weight.offset).astype(jnp.float32)
            operands |= {"value": combine(matrix, offset, jnp.subtract), "offset": None}
        operands["scale"] = weight.scale_matrix()
    stored = None if is_weight(weight.scale) else weight.scale.dtype
    levels_of = functools.partial(_levels_of, weight, stored)
    one = functools.partial(
        _one_matrix,
        levels_of=levels_of,
        group_size=weight.group_size or weight.in_dim,
        damping=damping,
        rescale=rescale,
    )
    codes, scale, clipped, used = map_over_stack(one, operands, matrix.shape[:-2])
    return Requantized(
        _with_codes(weight, codes, scale if rescale else None), jnp.mean(clipped), used
    )


def _with_codes(weight: Any, codes: jax.Array, scale: jax.Array | None) -> Any:
    """The weight with other codes `(*stack, in, out)`, and other scales unless None."""
    kept: Any = weight.scale if scale is None else scale
    if isinstance(weight, NarrowFloat):
        return dataclasses.replace(weight, values=codes, scale=kept)
    if isinstance(weight, Quantized):
        return weight.with_codes(codes, kept)
    packed = pack_codes(codes, weight.codes_per_byte, signed=False)
    return dataclasses.replace(weight, codes=packed, scale=kept)


def _levels_of(weight: Any, scale_dtype: Any, operands: dict[str, Any]) -> Any:
    """Encoder and decoder of one matrix of a weight."""
    if isinstance(weight, NarrowFloat):
        return FloatsOf(weight.values.dtype)
    if isinstance(weight, Codebook):
        return TableOf(operands["table"])
    unsigned = operands["zero_point"] is not None or operands["offset"] is not None
    return GridLevels(Grid("affine" if unsigned else "full", weight.bits, scale_dtype=scale_dtype))


def _one_matrix(
    operands: dict[str, Any], *, levels_of: Any, group_size: int, damping: float, rescale: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes, scales, share of clipped entries and damping of one `(in, out)` matrix."""
    value, scale, zero, offset, gram, mask = (
        operands[name] for name in ("value", "scale", "zero_point", "offset", "gram", "mask")
    )
    in_dim, out_dim = value.shape
    cols = scale.shape[1]
    of_row = operands["group_index"]
    of_row = jnp.arange(in_dim) // group_size if of_row is None else of_row
    levels = levels_of(operands)
    widen = lambda field: jnp.repeat(field, out_dim // cols, axis=1)  # noqa: E731
    if offset is not None:
        value = value - widen(offset)[of_row].astype(jnp.float32)
        zero = jnp.zeros(scale.shape, jnp.uint8) if zero is None else zero
    if mask is not None:
        value = jnp.where(mask, value, 0)
    zero = None if zero is None else widen(zero)  # (rows, out), as the scales that are read
    zeros = None if zero is None else zero[of_row]
    if rescale:
        diagonal = jnp.ones(in_dim) if gram is None else jnp.diagonal(gram)
        scale = _stretched(value, scale, zeros, of_row, diagonal, levels)
    scales = widen(scale)
    clipped = _share_clipped(value, scales[of_row], zeros, levels)
    if gram is None:
        return levels.encode(value, scales[of_row], zeros), scale, clipped, jnp.zeros(())
    factor = damped_factor(normalize_gram(gram), damping)
    codes, _, _ = quantize_rows(
        value, factor, RowScales(scales, zero, of_row), levels, moving=None, mask=mask
    )
    return codes, scale, clipped, factor.damping


def _share_clipped(
    value: jax.Array, scale: jax.Array, zero: jax.Array | None, levels: Any
) -> jax.Array:
    if not isinstance(levels, GridLevels):
        return jnp.mean(levels.beyond(value, scale), dtype=jnp.float32)
    low, high = levels.grid.code_range
    steps = jnp.round(value / scale.astype(jnp.float32))
    steps = steps if zero is None else steps + zero.astype(jnp.float32)
    return jnp.mean((steps < low) | (steps > high), dtype=jnp.float32)


def _stretched(
    value: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    of_row: jax.Array,
    weights: jax.Array,
    levels: Any,
) -> jax.Array:
    """Scales times the number with which each group's weighted squared error is least."""
    rows, cols = scale.shape
    out_dim = value.shape[1]
    stretches = jnp.asarray(_STRETCHES, jnp.float32)

    def error_of(stretch: jax.Array) -> tuple[jax.Array, jax.Array]:
        stored = (scale.astype(jnp.float32) * stretch).astype(scale.dtype)
        spread = jnp.repeat(stored, out_dim // cols, axis=1)[of_row]
        miss = levels.decode(levels.encode(value, spread, zero), spread, zero) - value
        lost = jnp.square(miss) * weights[:, None]
        by_group = jax.ops.segment_sum(lost, of_row, num_segments=rows)
        return jnp.sum(by_group.reshape(rows, cols, -1), axis=-1), stored

    def attempt(best: tuple[jax.Array, jax.Array], stretch: jax.Array) -> tuple[Any, None]:
        error, stored = error_of(stretch)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, stored, best[1])), None

    (_, found), _ = jax.lax.scan(attempt, error_of(stretches[0]), stretches[1:])
    return found


def before_change(weight: InputChange, value: jax.Array) -> jax.Array:
    """What the base of a weight must hold, for the weight to have a value; float32."""
    matrix = weight.view.to_matrix(value).astype(jnp.float32)
    if isinstance(weight, Rescaled):
        scale = weight.scale.astype(jnp.float32)
        base = matrix / jnp.where(scale == 0, 1, scale)
    else:  # an orthogonal map: its transpose is its inverse
        base = jnp.swapaxes(weight.change(jnp.swapaxes(matrix, -1, -2)), -1, -2)
    return weight.view.from_matrix(base)


def _refuse_mask(weight: Any) -> None:
    raise TypeError(
        f"{_NAME}: a Masked over a {type(weight).__name__} has zeros that its quantized base does "
        "not know of. Put the mask under it."
    )


def view_of(weight: Any) -> View:
    """The view of the quantized weight inside."""
    while not isinstance(weight, (*_OWNERS, RoundedInputs)):
        weight = weight.base
    return weight.view
