"""Integer grids: where the levels lie, and rounding one matrix onto them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from jaxweights.quantize._extremes import extremes, largest_magnitude, percentiles
from jaxweights.quantize._search import Search as Search
from jaxweights.quantize._search import check_search, rms_end
from jaxweights.quantize._settings import check_between, check_float_dtype, is_whole, is_word
from jaxweights.quantize._stored_scale import stored_scale
from jaxweights.weights._divide import divide

GridKind = Literal["narrow", "full", "half", "signed_max", "affine", "gptq_sym"]
GroupSize = int | Literal["tensor"] | None
GroupAxis = Literal["input", "output"]
Pad = Literal["zero"]

_FLOAT32 = np.dtype(np.float32)

# Of GPTQ's range search: ranges of 1, 0.99, ... 0.21 times the full one, errors to the power 2.4.
_SHRINKS = 80
_SHRINK_STEP = 0.01
_ERROR_POWER = 2.4


class Codes(NamedTuple):
    """Integers of one matrix and how to read them: `(codes - zero_point) * scale`.

    Attributes:
      codes: `(in, out)`, int8, or uint8 where there are zero points.
      scale: `(rows, cols)` as `Quantized.scale`.
      zero_point: Like `scale`, uint8, or None.
    """

    codes: Integer[Array, "in out"]
    scale: Float[Array, "rows cols"]
    zero_point: Integer[Array, "rows cols"] | None


@dataclasses.dataclass(frozen=True)
class Grid:
    """The settings of an integer grid, checked when built.

    With `amax` the largest magnitude of a group, `lo <= 0 <= hi` its extremes and
    `Q = 2**(bits-1) - 1`:

    | kind         | scale                         | codes           | zero point      |
    |--------------|-------------------------------|-----------------|-----------------|
    | `narrow`     | amax / Q                      | -Q .. Q         |                 |
    | `full`       | amax / Q                      | -Q-1 .. Q       |                 |
    | `half`       | amax / (Q + 1/2)              | -Q-1 .. Q       |                 |
    | `signed_max` | -(largest by magnitude)/(Q+1) | -Q-1 .. Q       |                 |
    | `affine`     | (hi - lo) / (2**bits - 1)     | 0 .. 2**bits-1  | round(-lo/scale)|
    | `gptq_sym`   | 2 amax / (2**bits - 1)        | 0 .. 2**bits-1  | 2**(bits-1)     |

    Every grid holds 0 exactly. At 4 bits and below `narrow` is the worst of the symmetric ones
    and `signed_max` the best; at 8 bits `narrow` is what other runtimes expect.

    Args:
      kind: A row of the table.
      bits: Bits per code, 2 to 8.
      group_size: Rows or columns that share a scale; None for all of an output's (or an input's),
        "tensor" for all of the matrix's.
      scale_dtype: Dtype that scales are stored in, and rounded to before codes are chosen.
      search: Where the range ends: "absmax" at the extremes; "mse" where the sum of |error|^2.4 is
        least among 80 ranges from 1 to 0.21 times that; a number p at the extremes without the
        (100 - p) % largest magnitudes on either side; ("rms", k) at k times the root mean square,
        for all kinds but "affine".
      group_axis: "input" for groups of neighbouring rows of one output; "output" for groups of
        neighbouring columns of one input, so that an input whose weights are large shares its
        scales with no other.
      pad: "zero" where rows of zeros fill up a last group that has fewer rows than `group_size`;
        None where such a matrix is refused.
    """

    kind: GridKind
    bits: int
    group_size: GroupSize = None
    scale_dtype: Any = _FLOAT32
    search: Search = "absmax"
    group_axis: GroupAxis = "input"
    pad: Pad | None = None

    @property
    def unsigned(self) -> bool:
        """Whether codes start at 0 and there are zero points."""
        return self.kind in ("affine", "gptq_sym")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.unsigned:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1) - 1
        return (-top if self.kind == "narrow" else -top - 1), top

    def full_group(self, in_dim: int) -> int:
        """Rows of all groups but a shorter last one, as `Quantized` states it; 0 without one."""
        size = self.group_size
        return size if self.pad and isinstance(size, int) and size < in_dim and in_dim % size else 0


def make_grid(
    asker: str,
    *,
    bits: int,
    group_size: GroupSize = None,
    grid: GridKind | None = None,
    scale_dtype: DTypeLike = jnp.float32,
    search: Search = "absmax",
    group_axis: GroupAxis = "input",
    pad: Pad | None = None,
) -> Grid:
    """Checks the settings of a grid and fills in what is None.

    Args:
      asker: What errors call the caller.
      bits: Bits per code, 2 to 8.
      group_size: As in `Grid`.
      grid: Kind; None gives "narrow" at 8 bits and "signed_max" below.
      scale_dtype: float32, bfloat16 or float16.
      search: As in `Grid`.
      group_axis: As in `Grid`.
      pad: As in `Grid`.

    Returns:
      The grid.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range.
    """
    bits = check_bits(asker, bits)
    if group_size is not None and not is_word(group_size, ["tensor"]):
        if not is_whole(group_size):
            raise TypeError(
                f"{asker}: group_size={group_size!r} must be an integer, None (one scale per "
                "output) or 'tensor' (one scale per matrix)."
            )
        if group_size < 1:
            raise ValueError(
                f"{asker}: group_size={group_size} must be at least 1. None gives one scale per "
                "output."
            )
    if grid is None:
        grid = "narrow" if bits == 8 else "signed_max"
    if not is_word(grid, get_args(GridKind)):
        raise ValueError(f"{asker}: grid={grid!r} is unknown. Choose one of {get_args(GridKind)}.")
    check_float_dtype(asker, scale_dtype=scale_dtype)
    if not is_word(group_axis, get_args(GroupAxis)):
        raise ValueError(
            f"{asker}: group_axis={group_axis!r} is unknown. Choose 'input' (groups of rows of one "
            "output) or 'output' (groups of columns of one input)."
        )
    check_pad(asker, pad, group_size, group_axis)
    # Grids are static under `jit`, and numbers of NumPy no weak types: those of Python are kept.
    size = int(group_size) if is_whole(group_size) else group_size
    end = check_search(asker, search, grid=grid, pad=pad)
    return Grid(grid, bits, size, jnp.dtype(scale_dtype), end, group_axis, pad)


def check_bits(asker: str, bits: Any) -> int:
    """Refuses what is no number of bits from 2 to 8; else gives it as an int."""
    return check_between(asker, "bits", bits, 2, 8)


def check_pad(asker: str, pad: Any, group_size: Any, group_axis: Any = "input") -> None:
    """Refuses what is no way to fill up a group, and one where there are no groups of rows."""
    if pad is None:
        return
    if not is_word(pad, get_args(Pad)):
        raise ValueError(
            f"{asker}: pad={pad!r} is unknown. Choose 'zero' (rows of zeros fill up the last "
            "group) or None (a group_size that does not divide its axis is refused)."
        )
    if not is_whole(group_size) or group_axis != "input":
        raise ValueError(
            f"{asker}: pad={pad!r} fills up groups of rows, but group_size={group_size!r} along "
            f"the {group_axis} axis makes none. Pass an integer group_size along the input axis, "
            "or leave pad out."
        )


def unfit_group(grid: Grid, in_dim: int, out_dim: int, *, pads: bool = True) -> str | None:
    """What is wrong with the group size for a matrix of these lengths, if anything.

    `pads` tells whether the caller has a setting `pad`, to be named as a remedy.
    """
    size = grid.group_size
    length = in_dim if grid.group_axis == "input" else out_dim
    if not isinstance(size, int) or length % size == 0 or grid.pad is not None:
        return None
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    padded = ", fill up the last group by pad='zero'" if pads and grid.group_axis == "input" else ""
    return (
        f"group_size={size} does not divide the {grid.group_axis} axis, which has length {length}. "
        f"Choose one of {', '.join(map(str, divisors))}{padded}, or leave this weight out with "
        "`partition`."
    )


def quantize_matrix(weight: Float[Array, "in out"], grid: Grid) -> Codes:
    """Rounds every entry of a matrix to the nearest level.

    Args:
      weight: `(in, out)`, floating.
      grid: Where the levels lie; its group size divides `in`, or it pads.

    Returns:
      The codes. A group whose scale underflows has scale 1 and codes of 0.0; one that holds NaN
      or infinity, or whose scale overflows its dtype, has a scale that is not finite.

    Example:
      >>> codes = quantize_matrix(jnp.array([[1.0, -2.0], [0.5, 1.0]]), Grid("narrow", 8))
      >>> codes.codes.tolist()
      [[127, -127], [64, 64]]
    """
    codes, scale, zero = round_matrix(weight, grid)
    return Codes(codes.astype(jnp.uint8 if grid.unsigned else jnp.int8), scale, zero)


def round_matrix(weight: jax.Array, grid: Grid) -> Codes:
    """As `quantize_matrix`, with codes in int32, which packs faster."""
    if grid.group_axis == "output":
        # Groups of columns of a row are groups of rows of a column of the transpose.
        turned = dataclasses.replace(grid, group_axis="input")
        codes, scale, zero = round_matrix(weight.T, turned)
        return Codes(codes.T, scale.T, None if zero is None else zero.T)
    groups = split_groups(weight.astype(jnp.float32), grid)  # (rows, group, out)
    scale, zero = find_scale(groups, grid)
    codes = join_groups(encode(groups, scale, zero, grid), weight.shape)
    return Codes(codes, scale[:, 0], None if zero is None else zero[:, 0])


def matrix_scales(weight: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
    """Scales and zero points of a float32 `(in, out)` matrix, `(rows, cols)`."""
    turned = grid.group_axis == "output"
    scale, zero = find_scale(split_groups(weight.T if turned else weight, grid), grid)
    pick = lambda field: field[:, 0].T if turned else field[:, 0]  # noqa: E731
    return pick(scale), None if zero is None else pick(zero)


def split_groups(weight: jax.Array, grid: Grid) -> jax.Array:
    """`(in, out)` as `(rows, group, out)`, one row of scales for each of the first axis.

    Zeros fill up the last group of a grid that pads.
    """
    in_dim, out_dim = weight.shape
    size = grid.group_size if isinstance(grid.group_size, int) else in_dim
    if grid.pad is not None and in_dim % size:
        weight = jnp.pad(weight, ((0, -in_dim % size), (0, 0)))
    return weight.reshape(-(-in_dim // max(size, 1)), size, out_dim)


def join_groups(groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `split_groups`: an `(in, out)` matrix of this shape, without padding."""
    in_dim, out_dim = shape
    if groups.size == in_dim * out_dim:
        return groups.reshape(shape)
    return groups.reshape(-1, out_dim)[:in_dim]


def find_scale(groups: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
    """Scales and zero points for `(rows, group, out)` float32 values.

    Returns:
      The scale, `(rows, 1, out)` (or `(1, 1, 1)` per tensor) in `grid.scale_dtype`; the zero
      point likewise in uint8, or None.
    """
    groups, low, high = range_of(groups, grid)
    if grid.search == "mse":
        return _least_error(groups, low, high, grid)
    return scale_of_range(low, high, grid)


def range_of(groups: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The groups that share a scale, `(rows, group, out)`, and where their ranges end.

    Returns:
      The groups, all in one per tensor, and `low <= 0` and `high >= 0`, `(rows, 1, out)`.
    """
    if grid.group_size == "tensor":
        groups = groups.reshape(1, -1, 1)
    if groups.size == 0:
        low = high = jnp.zeros((groups.shape[0], 1, groups.shape[2]))
    elif isinstance(grid.search, tuple):
        low = high = rms_end(groups, grid.search[1])
    elif not isinstance(grid.search, str):
        low, high = percentiles(groups, float(grid.search))
    elif grid.kind == "affine":
        low, high = extremes(groups)
    else:
        low = high = largest_magnitude(groups)
    # 0 lies on every grid: pruned weights and padding stay exact zeros.
    return groups, jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)


def scale_of_range(
    low: jax.Array, high: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array | None]:
    """Scales and zero points of the ranges from `low <= 0` to `high >= 0`, float32."""
    top = 2 ** (grid.bits - 1) - 1
    amax = jnp.maximum(-low, high)
    if grid.kind in ("narrow", "full"):
        scale = divide(amax, top)
    elif grid.kind == "half":
        scale = divide(amax, top + 0.5)
    elif grid.kind == "signed_max":
        scale = divide(jnp.where(-low < high, high, low), -(top + 1))
    elif grid.kind == "affine":
        scale = divide(high - low, 2**grid.bits - 1)
    else:
        scale = divide(2 * amax, 2**grid.bits - 1)
    stored = stored_scale(scale, grid.scale_dtype)
    if not grid.unsigned:
        return stored, None
    if grid.kind == "affine":
        zero = jnp.clip(jnp.round(divide(-low, stored)), 0, 2**grid.bits - 1)
    else:
        zero = jnp.full_like(low, top + 1)
    return stored, zero.astype(jnp.uint8)


def encode(
    values: jax.Array, scale: jax.Array, zero_point: jax.Array | None, grid: Grid
) -> jax.Array:
    """Codes of the levels nearest to float32 values, halves to even; int32."""
    smallest, largest = grid.code_range
    steps = jnp.round(divide(values, scale))
    if zero_point is not None:
        steps = steps + zero_point.astype(jnp.float32)
    # Clipped as floats: what a conversion makes of too large a number differs between backends.
    return jnp.clip(steps, smallest, largest).astype(jnp.int32)


def decode(
    codes: Integer[Array, "*shape"],
    scale: Float[Array, "*#shape"],
    zero_point: Integer[Array, "*#shape"] | None,
) -> Float[Array, "*shape"]:
    """Computes the values that codes stand for: `(codes - zero_point) * scale`.

    Args:
      codes: Integers, any shape.
      scale: Of a shape that broadcasts to that of the codes.
      zero_point: The code of 0, shaped as `scale`; None where 0 is.

    Returns:
      Float32 values, shaped as the codes.

    Example:
      >>> decode(jnp.array([[0, 3]], jnp.uint8), jnp.array([[0.5]]), jnp.array([[1]], jnp.uint8))
      Array([[-0.5,  1. ]], dtype=float32)
    """
    steps = codes.astype(jnp.float32)
    if zero_point is not None:
        steps = steps - zero_point.astype(jnp.float32)
    return steps * scale.astype(jnp.float32)


def _least_error(
    groups: jax.Array, low: jax.Array, high: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array | None]:
    """Scales of the shrunken range whose rounding errs least."""

    def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, shrink = best
        candidate = 1 - jnp.float32(_SHRINK_STEP) * i.astype(jnp.float32)
        scale, zero = scale_of_range(low * candidate, high * candidate, grid)
        miss = jnp.abs(decode(encode(groups, scale, zero, grid), scale, zero) - groups)
        new = jnp.sum(miss**_ERROR_POWER, axis=1, keepdims=True)
        better = new < error
        return jnp.where(better, new, error), jnp.where(better, candidate, shrink)

    start = jnp.full_like(low, jnp.inf), jnp.ones_like(low)
    _, shrink = jax.lax.fori_loop(0, _SHRINKS, attempt, start)
    return scale_of_range(low * shrink, high * shrink, grid)
