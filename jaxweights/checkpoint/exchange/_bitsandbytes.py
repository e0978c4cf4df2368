"""The tensors of 4-bit bitsandbytes checkpoints, as transformers writes and reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.checkpoint._json import parse_json
from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._module import (
    TORCH_LINEAR,
    Parts,
    check_parts,
    lazy,
    share_bytes,
    unpacked_codes,
)
from jaxweights.weights._axes import View
from jaxweights.weights._codebook import Codebook
from jaxweights.weights._packed_codes import codes_per_byte

_STATE = "weight.quant_state.bitsandbytes__"
SUFFIXES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    f"{_STATE}nf4",
    f"{_STATE}fp4",
)
_NESTED_BLOCK = 256
_MAX_STATE_BYTES = 1 << 16
_U8, _F32 = (np.dtype(np.uint8),), (np.dtype(np.float32),)
_DTYPES = ("float32", "bfloat16", "float16")


def unpack_bitsandbytes(parts: Parts) -> Codebook | np.ndarray:
    """Reads one module of a 4-bit bitsandbytes checkpoint.

    Args:
      parts: `weight` uint8 `(n, 1)`, `weight.absmax`, `weight.quant_map` float32 `(16,)`, and the
        state, JSON in uint8; `weight.nested_absmax` and `weight.nested_quant_map` where absmax is
        quantized itself.

    Returns:
      A weight of shape `(out, in)` whose table is the file's. Where blocks straddle outputs so
      that they tile no matrix, the dense array, in the dtype that the state names.

    Raises:
      ValueError: If a part is missing or contradicts the state.

    Source: bitsandbytes 0.50, `functional.QuantState.from_dict`.
    """
    state = _state(parts)
    out_dim, in_dim = state["shape"]
    block = state["blocksize"]
    blocks = -(-out_dim * in_dim // block)
    check_parts(
        parts,
        {
            "weight": (_U8, (-(-out_dim * in_dim // 2), 1)),
            "weight.quant_map": (_F32, (16,)),
            "weight.absmax": (_U8 if "nested_blocksize" in state else _F32, (blocks,)),
        },
    )
    packed = parts["weight"].read().reshape(-1)
    codes = np.stack([packed >> 4, packed & 0x0F], axis=1).reshape(-1)[: out_dim * in_dim]
    table = parts["weight.quant_map"].read()
    scale = _scales(parts, state, blocks)
    if (grid := tiles(out_dim, in_dim, block)) is None:
        flat = table[codes] * np.repeat(_absmax(scale), block)[: codes.size]
        return flat.reshape(out_dim, in_dim).astype(_numpy(state["dtype"]))
    per_byte = codes_per_byte(4, in_dim)
    return Codebook(
        codes=share_bytes(codes.reshape(out_dim, in_dim).T, per_byte, signed=False),  # type: ignore
        table=table,  # type: ignore[arg-type]
        scale=_scale_weight(scale, grid),
        bits=4,
        codes_per_byte=per_byte,
        dtype=_numpy(state["dtype"]),
        view=View.of((out_dim, in_dim), TORCH_LINEAR),
    )


def dense_shape(parts: Parts) -> tuple[int, int]:
    """Shape of a module's dense weight, which the state tells."""
    return _state(parts)["shape"]


def tiles(out_dim: int, in_dim: int, block: int) -> tuple[int, int] | None:
    """Rows and columns of blocks over a matrix's columns one after another, if they tile it."""
    if in_dim % block == 0:
        return in_dim // block, out_dim
    if block % in_dim == 0 and out_dim % (block // in_dim) == 0:
        return 1, out_dim * in_dim // block
    return (1, 1) if block >= out_dim * in_dim else None


def _state(parts: Parts) -> dict[str, Any]:
    kinds = [kind for kind in ("nf4", "fp4") if f"{_STATE}{kind}" in parts]
    if len(kinds) != 1:
        raise ValueError("holds no single 'quant_state' of nf4 or fp4. The file is damaged")
    part = parts[_STATE + kinds[0]]
    if part.dtype != np.uint8 or len(part.shape) != 1 or part.shape[0] > _MAX_STATE_BYTES:
        raise ValueError(f"'quant_state' is {part.dtype} {part.shape}, expected some text in uint8")
    state = parse_json(part.read().tobytes(), where="'quant_state'")
    shape = state.get("shape") if isinstance(state, dict) else None
    wanted = ("blocksize", "nested_blocksize")[: 1 + ("weight.nested_absmax" in parts)]
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or any(type(n) is not int or not 0 < n < 2**31 for n in shape)
        or any(type(state.get(key)) is not int or not 0 < state[key] < 2**31 for key in wanted)
        or state.get("dtype") not in _DTYPES
        or ("nested_blocksize" in state) != ("weight.nested_absmax" in parts)
    ):
        raise ValueError(f"'quant_state' is {state!s:.200}, which describes no matrix")
    return {**state, "shape": (shape[0], shape[1]), "quant_type": kinds[0]}


def _scales(parts: Parts, state: dict[str, Any], blocks: int) -> Any:
    """Scales of blocks in order: an array, or codes, table, absmax, offset and block size."""
    absmax = parts["weight.absmax"].read()
    if "nested_blocksize" not in state:
        return absmax
    size = state["nested_blocksize"]
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise ValueError(f"'nested_offset' is {offset!r:.80}, not a number")
    check_parts(
        parts,
        {
            "weight.nested_absmax": (_F32, (-(-blocks // size),)),
            "weight.nested_quant_map": (_F32, (256,)),
        },
    )
    table, nested = (parts[f"weight.nested_{n}"].read() for n in ("quant_map", "absmax"))
    return absmax, table, nested, np.float32(offset), size


def _absmax(scale: Any) -> np.ndarray:
    if isinstance(scale, np.ndarray):
        return scale
    codes, table, nested, offset, size = scale
    return table[codes] * np.repeat(nested, size)[: codes.size] + offset


def _scale_weight(scale: Any, grid: tuple[int, int]) -> Any:
    """Scales as `(rows, cols)`; quantized ones where their own blocks tile that."""
    rows, cols = grid
    by_column = lambda x, rows=rows, cols=cols: np.ascontiguousarray(x.reshape(cols, rows).T)  # noqa: E731
    if isinstance(scale, np.ndarray):
        return by_column(scale)
    codes, table, nested, offset, size = scale
    outer = tiles(cols, rows, size)
    if outer is None:
        return by_column(_absmax(scale))
    return Codebook(
        codes=by_column(codes),  # type: ignore[arg-type]
        table=table,
        scale=by_column(nested, *outer),
        offset=np.full((1, 1), offset, np.float32),  # type: ignore[arg-type]
        bits=8,
        codes_per_byte=1,
        dtype=np.dtype(np.float32),
        view=View.of((rows, cols)),
    )


def pack_bitsandbytes(weight: Codebook) -> dict[str, LazyTensor]:
    """The tensors of one module: the inverse of `unpack_bitsandbytes`.

    Args:
      weight: One matrix, for which `unfit_bitsandbytes` has nothing to say.

    Returns:
      The parts by their suffix, made when they are written.
    """
    out_dim, in_dim = weight.out_dim, weight.in_dim
    rows, cols = weight.scale.shape[-2:]
    state = {
        "quant_type": quant_type(weight),
        "blocksize": out_dim * in_dim // (rows * cols),
        "dtype": np.dtype(weight.dtype).name,
        "shape": [out_dim, in_dim],
    }
    flat = lambda x: np.ascontiguousarray(np.asarray(x).T).reshape(-1)  # noqa: E731

    def packed() -> np.ndarray:
        codes = flat(unpacked_codes(weight))
        codes = np.concatenate([codes, np.zeros(codes.size % 2, np.uint8)]).reshape(-1, 2)
        return (codes[:, :1] << 4 | codes[:, 1:]).astype(np.uint8)

    parts = {
        "weight": lazy((-(-out_dim * in_dim // 2), 1), np.uint8, packed),
        "weight.quant_map": lazy((16,), np.float32, lambda: np.asarray(weight.table)),
    }
    nested = weight.scale
    if isinstance(nested, Codebook):
        outer = nested.scale.shape[-2:]
        state |= {
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(np.asarray(nested.offset).reshape(())),
        }
        parts |= {
            "weight.absmax": lazy((rows * cols,), np.uint8, lambda: flat(unpacked_codes(nested))),
            "weight.nested_absmax": lazy(
                (math.prod(outer),), np.float32, lambda: flat(nested.scale)
            ),
            "weight.nested_quant_map": lazy((256,), np.float32, lambda: np.asarray(nested.table)),
        }
    else:
        parts["weight.absmax"] = lazy((rows * cols,), np.float32, lambda: flat(nested))
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    parts[f"{_STATE}{state['quant_type']}"] = lazy(text.shape, np.uint8, lambda: text)
    return parts


def quant_type(weight: Codebook) -> str:
    """`nf4`, whose table ascends, or `fp4`, whose codes have a bit for the sign."""
    return "nf4" if np.all(np.diff(np.asarray(weight.table)) > 0) else "fp4"


def unfit_bitsandbytes(weight: Any) -> list[str]:
    """Why a weight cannot be written as bitsandbytes has it, if it cannot."""
    if not isinstance(weight, Codebook):
        return [
            f"is a {type(weight).__name__}, but bitsandbytes holds levels of a table. Quantize "
            "with quantize.nf4 or quantize.fp4"
        ]
    from jaxweights.quantize._nf4 import FP4_LEVELS, NF4_LEVELS

    table = np.asarray(weight.table)
    if weight.bits != 4 or not any(np.array_equal(table, t) for t in (NF4_LEVELS, FP4_LEVELS)):
        return ["has other levels than nf4 and fp4. Quantize with quantize.nf4 or quantize.fp4"]
    if weight.full_group:
        return [
            f"has groups of {weight.full_group} inputs of which the last is shorter, but blocks of "
            "bitsandbytes are of one size. Quantize with a power of two from 32 on that divides "
            f"the {weight.in_dim} inputs"
        ]
    rows, cols = weight.scale.shape[-2:]
    block = weight.out_dim * weight.in_dim // (rows * cols)
    problems = []
    if weight.offset is not None:
        problems.append("has offsets, which bitsandbytes has not")
    if tiles(weight.out_dim, weight.in_dim, block) != (rows, cols):
        problems.append(
            f"has scales {(rows, cols)} of a matrix {(weight.in_dim, weight.out_dim)}, but blocks "
            "of bitsandbytes run along the inputs. Quantize with an integer group_size"
        )
    elif block & (block - 1) or not 32 <= block <= 4096:
        problems.append(
            f"has groups of {block}, but bitsandbytes takes powers of two from 32 to 4096. "
            "Quantize with group_size=64"
        )
    nested = weight.scale
    if isinstance(nested, Codebook):
        outer = nested.scale.shape[-2:]
        size = rows * cols // math.prod(outer)
        fits = outer == (1, 1) and rows * cols <= _NESTED_BLOCK
        fits |= size == _NESTED_BLOCK and tiles(cols, rows, size) == outer
        if not fits or nested.offset is None or nested.offset.size != 1:
            problems.append(
                f"has scales in blocks of {size}, but bitsandbytes quantizes them in blocks of "
                f"{_NESTED_BLOCK}. Quantize with double_quantization=False"
            )
    elif not isinstance(nested, Codebook) and np.dtype(nested.dtype) != np.float32:
        problems.append(f"has scales in {nested.dtype}. Quantize with scale_dtype=jnp.float32")
    return problems


def settings(weights: Mapping[str, Any], dense: list[str]) -> dict[str, Any]:
    """`quantization_config` as transformers writes it."""
    first = next(iter(weights.values()))
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type(first),
        "bnb_4bit_use_double_quant": isinstance(first.scale, Codebook),
        "bnb_4bit_compute_dtype": np.dtype(first.dtype).name,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense or None,
    }


def _numpy(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
