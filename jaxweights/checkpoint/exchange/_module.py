"""What the formats share: a module's tensors in a file, and its codes on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.weights._axes import Axes, View
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._masked import Masked
from jaxweights.weights._narrow_float import NarrowFloat
from jaxweights.weights._packed_codes import codes_per_byte
from jaxweights.weights._quantized import Quantized

TORCH_LINEAR = Axes(inputs=(-1,), outputs=(-2,))  # torch keeps (out, in)
_FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))
FLOAT: tuple[np.dtype, ...] = _FLOATS
INT32 = (np.dtype(np.int32),)


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of a module in a file.

    Args:
      shape: Its shape.
      dtype: Its dtype.
      read: Reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: Any) -> Part:
        """A part that is at hand already."""
        array = np.asarray(array)
        return cls(array.shape, array.dtype, lambda: array)


Parts = Mapping[str, Part]
Represented = Quantized | Codebook | NarrowFloat
Weights = Mapping[str, Any]  # represented ones by module


@dataclasses.dataclass(frozen=True)
class LazyWeight:
    """A tensor that is read or made when it is looked at, and forgotten afterwards.

    Args:
      read: Gives the represented weight or the array; the same at every call. It is called once
        for the checks, and once when the tensor is written.
    """

    read: Callable[[], Any]


def without_values(weight: Any) -> Any:
    """A weight with shapes in place of all arrays but the small ones that say what it is."""
    shapes = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree
    )
    fields = ("codes", "values", "scale", "zero_point", "offset")
    held = {f: shapes(getattr(weight, f)) for f in fields if hasattr(weight, f)}
    return dataclasses.replace(weight, **held)


def unsigned_codes(weight: Quantized) -> np.ndarray:
    """Codes of an unstacked weight from 0 to `2**bits - 1`, `(in, out)` uint8.

    Signed codes become unsigned ones with the zero point `2**(bits - 1)`.
    """
    codes = unpacked_codes(weight)
    if not weight.signed:
        return codes
    return (codes.astype(np.int16) + 2 ** (weight.bits - 1)).astype(np.uint8)


def per_output(field: Any, weight: Quantized) -> np.ndarray:
    """Scales or zero points of an unstacked weight for every output, `(groups, out)`."""
    field = np.asarray(field)
    return np.repeat(field, weight.out_dim // field.shape[1], axis=1)


def host_weight(
    codes: np.ndarray,
    scale: np.ndarray,
    *,
    bits: int,
    dtype: Any,
    zero_point: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    group_index: np.ndarray | None = None,
    full_group: int = 0,
    axes: Axes = TORCH_LINEAR,
) -> Quantized:
    """A `Quantized` of NumPy arrays for an `(out, in)` tensor, from its `(in, out)` codes.

    Args:
      codes: `(in, out)`; unsigned where there are zero points or offsets, else signed.
      scale: As in `Quantized`, as are the others.
      bits: Bits per code.
      dtype: Dtype that it materialises to.
      zero_point: Zero points, or None.
      offset: Offsets, or None.
      group_index: Row of `scale` of every input, or None.
      full_group: As in `Quantized`.
      axes: How the tensor relates to its matrix.
    """
    in_dim, out_dim = codes.shape
    per_byte = codes_per_byte(bits, in_dim)
    signed = zero_point is None and offset is None
    weight = Quantized(
        codes=share_bytes(codes, per_byte, signed=signed),  # type: ignore[arg-type]
        scale=np.ascontiguousarray(scale),  # type: ignore[arg-type]
        zero_point=None if zero_point is None else zero_point.astype(np.uint8),  # type: ignore
        group_index=group_index,  # type: ignore[arg-type]
        offset=offset,  # type: ignore[arg-type]
        bits=bits,
        codes_per_byte=per_byte,
        full_group=full_group,
        dtype=np.dtype(dtype),
        view=View.of((out_dim, in_dim), axes),
    )
    return weight


def share_bytes(codes: np.ndarray, per_byte: int, *, signed: bool) -> np.ndarray:
    """`weights._packed_codes.pack_codes`, on the host."""
    if per_byte == 1:
        return np.ascontiguousarray(codes, np.int8 if signed else np.uint8)
    share = 8 // per_byte
    mask = np.uint8(2**share - 1)
    rows = codes.astype(np.uint8).reshape(-1, per_byte, codes.shape[1]) & mask
    packed = rows[:, 0]
    for i in range(1, per_byte):
        packed = packed | rows[:, i] << np.uint8(share * i)
    return packed


def unpacked_codes(weight: Any) -> np.ndarray:
    """`codes_matrix()` of one matrix, on the host: `(in, out)`, int8 where signed, else uint8."""
    packed, per_byte = np.asarray(weight.codes), weight.codes_per_byte
    if per_byte == 1:
        return packed
    share = 8 // per_byte
    codes = np.empty((packed.shape[0] * per_byte, packed.shape[1]), np.uint8)
    for i in range(per_byte):
        codes[i::per_byte] = packed >> np.uint8(share * i) & np.uint8(2**share - 1)
    if not getattr(weight, "signed", False):
        return codes
    sign = 2 ** (share - 1)  # flipping the sign bit and subtracting it extends it
    return (codes ^ np.uint8(sign)).view(np.int8) - np.int8(sign)


def read_groups(
    index: np.ndarray | None, in_dim: int, rows: int, *, name: str
) -> tuple[np.ndarray | None, int]:
    """What `Quantized` needs of a file's index: the index, or None where groups are consecutive.

    Args:
      index: Row of the scales of every input, integers; None where the file has none.
      in_dim: Inputs.
      rows: Rows of the scales.
      name: What the file calls the index.

    Returns:
      The index as int32, or None; and `full_group` as in `Quantized`.

    Raises:
      ValueError: If it points beyond the scales, or is needed and not there.
    """
    if index is None:
        if in_dim % rows:
            raise ValueError(
                f"{in_dim} inputs are no {rows} equal groups, and no {name!r} is there"
            )
        return None, 0
    group_index = index.astype(np.int32, copy=False)
    if group_index.min() < 0 or group_index.max() >= rows:
        raise ValueError(
            f"{name!r} holds {group_index.min()} to {group_index.max()}, but there are {rows} "
            "groups. The file is damaged"
        )
    counts = np.bincount(group_index, minlength=rows)
    full = int(counts[0])
    shorter = 0 < counts[-1] < full and bool(np.all(counts[:-1] == full))
    size = full if shorter else in_dim // rows
    plain = (shorter or in_dim % rows == 0) and np.array_equal(
        group_index, np.arange(in_dim, dtype=group_index.dtype) // size
    )
    return None if plain else group_index, full if shorter else 0


def in_equal_groups(weight: Any) -> Any:
    """The same numbers in groups of one size, for formats that know no shorter last group.

    Scales are repeated for the largest size that divides the inputs and the groups.
    """
    if not (isinstance(weight, Quantized) and weight.full_group and weight.group_index is None):
        return weight
    size = math.gcd(weight.full_group, weight.in_dim)
    repeats, rows = weight.full_group // size, weight.in_dim // size
    given = {name: getattr(weight, name) for name in ("scale", "zero_point", "offset")}
    fields = {
        name: np.repeat(np.asarray(field), repeats, axis=0)[:rows]
        for name, field in given.items()
        if field is not None
    }
    return dataclasses.replace(weight, **fields, full_group=0)


def largest_group(weight: Quantized) -> int:
    """Inputs of a group: of the fullest one where the last is not full."""
    if weight.group_index is None:
        return weight.group_size or weight.in_dim
    return int(np.bincount(np.asarray(weight.group_index)).max())


def written_group_index(weight: Quantized) -> np.ndarray:
    """Row of the scales of every input, int32, also where groups are consecutive."""
    if weight.group_index is not None:
        return np.asarray(weight.group_index, np.int32)
    return np.arange(weight.in_dim, dtype=np.int32) // np.int32(largest_group(weight))


def check_parts(parts: Parts, expected: Mapping[str, tuple[tuple[np.dtype, ...], Any]]) -> None:
    """Refuses parts that are missing or of another dtype or shape, before any is read.

    Args:
      parts: What the file holds.
      expected: Allowed dtypes and the shape of every part; None in a shape stands for any length.
    """
    wrong = []
    for suffix, (dtypes, shape) in expected.items():
        part = parts.get(suffix)
        if part is None:
            wrong.append(f"{suffix!r} is missing")
            continue
        fits = len(part.shape) == len(shape) and all(
            want is None or have == want for have, want in zip(part.shape, shape, strict=True)
        )
        if part.dtype not in dtypes or not fits:
            names = " or ".join(dtype.name for dtype in dtypes)
            lengths = ", ".join("any" if n is None else str(n) for n in shape)
            wrong.append(
                f"{suffix!r} is {part.dtype.name} {part.shape}, expected {names} ({lengths})"
            )
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}. The file is damaged, or its config is another's")


def float16_scale(scale: np.ndarray) -> np.ndarray:
    """Scales rounded to float16, in which GPTQ and AWQ files hold them."""
    with np.errstate(over="ignore"):
        return scale.astype(np.float32).astype(np.float16)


def unfit_float16(scale: Any) -> str | None:
    """Why scales cannot be float16, if they cannot."""
    lost = beyond_float16(scale)
    return lost and (
        f"{lost}, in which this format keeps scales. Write compressed-tensors, which keeps float32"
    )


def beyond_float16(numbers: Any, *, word: str = "scales", may_vanish: bool = False) -> str | None:
    """Which numbers float16 makes infinite, or 0 unless they `may_vanish`; None if it makes none.

    What vanishes is less than 3e-8.
    """
    numbers = np.asarray(numbers, np.float32)
    narrow = float16_scale(numbers)
    lost = ~np.isfinite(narrow)
    if not may_vanish:
        lost |= (narrow == 0) & (numbers != 0)
    if not lost.any():
        return None
    example = float(numbers[lost][0])
    return f"{int(lost.sum())} of {numbers.size} {word}, such as {example:g}, lie beyond float16"


def without_mask(weight: Any) -> Any:
    """A quantized weight whose masked entries have the code of 0, if there is such a code."""
    if not (isinstance(weight, Masked) and isinstance(weight.base, Quantized)):
        return weight
    base = weight.base
    if base.offset is not None:
        return weight
    mask = base.view.to_matrix(jnp.asarray(weight.mask))
    zero = jnp.zeros_like(base.codes_matrix())
    if base.zero_point is not None:
        if np.max(np.asarray(base.zero_point)) >= 2**base.bits:
            return weight
        centred = dataclasses.replace(base, scale=jnp.ones_like(base.scale), dtype=np.float32)
        zero = (base.codes_matrix().astype(jnp.float32) - centred.matrix()).astype(zero.dtype)
    codes = jnp.where(mask, base.codes_matrix(), zero)
    return Quantized.from_codes(
        codes,
        base.scale,
        base.zero_point,
        base.group_index,
        bits=base.bits,
        full_group=base.full_group,
        dtype=base.dtype,
        view=base.view,
    )


def lazy(shape: tuple[int, ...], dtype: Any, make: Callable[[], np.ndarray]) -> LazyTensor:
    """A tensor to be written, made when it is written."""
    return LazyTensor(shape, np.dtype(dtype), make)
