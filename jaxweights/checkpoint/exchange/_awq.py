"""The tensors of AWQ checkpoints of the GEMM version, as AutoAWQ, transformers and vLLM read."""

from __future__ import annotations

import math

import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._gptq import unfit_groups, written_zero_point
from jaxweights.checkpoint.exchange._module import (
    FLOAT,
    INT32,
    Parts,
    check_parts,
    float16_scale,
    host_weight,
    lazy,
    per_output,
    unfit_float16,
    unsigned_codes,
)
from jaxweights.checkpoint.exchange._words import pack_words, unpack_words
from jaxweights.weights._quantized import Quantized

# Nibble i of a word holds this one of eight consecutive outputs.
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_INVERSE = np.argsort(_ORDER)


def unpack_awq(parts: Parts) -> Quantized:
    """Reads one module of an AWQ checkpoint.

    Args:
      parts: `qweight` int32 `(in, out / 8)`, `qzeros` int32 `(groups, out / 8)` and `scales`
        `(groups, out)`.

    Returns:
      A 4-bit weight of shape `(out, in)`, as torch has it, with zero points.

    Raises:
      ValueError: If a part is missing or of another dtype or shape.

    Source: AutoAWQ's `WQLinear_GEMM.from_linear`.
    """
    qweight = parts.get("qweight")
    in_dim, words = qweight.shape if qweight and len(qweight.shape) == 2 else (0, 0)
    groups = parts["scales"].shape[0] if "scales" in parts and parts["scales"].shape else 0
    check_parts(
        parts,
        {
            "qweight": (INT32, (in_dim, words)),
            "qzeros": (INT32, (groups, words)),
            "scales": (FLOAT, (groups, words * 8)),
        },
    )
    if not groups or in_dim % groups:
        raise ValueError(f"has {in_dim} inputs in {groups} groups. The file is damaged")
    scale = parts["scales"].read()
    return host_weight(
        _ordered(unpack_words(parts["qweight"].read(), bits=4, count=words * 8, axis=1), _INVERSE),
        scale,
        bits=4,
        dtype=scale.dtype,
        zero_point=_ordered(
            unpack_words(parts["qzeros"].read(), bits=4, count=words * 8, axis=1), _INVERSE
        ),
    )


def pack_awq(weight: Quantized) -> dict[str, LazyTensor]:
    """The tensors of one module of an AWQ checkpoint: the inverse of `unpack_awq`.

    Args:
      weight: One matrix, for which `unfit_awq` has nothing to say. Without zero points it gets
        the zero point 8.

    Returns:
      `qweight`, `qzeros` and `scales` in float16, made when they are written.
    """
    in_dim, words, groups = weight.in_dim, weight.out_dim // 8, weight.scale.shape[-2]

    def qzeros() -> np.ndarray:
        return pack_words(_ordered(written_zero_point(weight), _ORDER), bits=4, axis=1)

    def qweight() -> np.ndarray:
        return pack_words(_ordered(unsigned_codes(weight), _ORDER), bits=4, axis=1)

    return {
        "qweight": lazy((in_dim, words), np.int32, qweight),
        "qzeros": lazy((groups, words), np.int32, qzeros),
        "scales": lazy(
            (groups, words * 8), np.float16, lambda: float16_scale(per_output(weight.scale, weight))
        ),
    }


def _ordered(matrix: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Permutes every eight consecutive columns."""
    rows, columns = matrix.shape
    return matrix.reshape(rows, columns // 8, 8)[:, :, order].reshape(rows, columns)


def unfit_awq(weight: Quantized) -> list[str]:
    """Why a weight cannot be written as AWQ, if it cannot."""
    problems = unfit_groups(weight)
    if weight.bits != 4:
        problems.append(
            f"has {weight.bits} bits, but AWQ has 4. Quantize to 4 bits, or write GPTQ or "
            "compressed-tensors"
        )
    if weight.out_dim % 8:
        problems.append(
            f"has {weight.out_dim} outputs, which 8 does not divide, as the packing needs. Leave "
            "it out with `partition`, or write compressed-tensors"
        )
    if weight.full_group:
        problems.append(
            f"has groups of {weight.full_group} inputs of which the last is shorter, but AWQ has "
            f"one size for all groups. Quantize with a group_size that divides the {weight.in_dim} "
            f"inputs, such as {math.gcd(weight.full_group, weight.in_dim)}, or write GPTQ"
        )
    if weight.group_index is not None:
        problems.append(
            "has groups in another order than its inputs, which AWQ cannot say. Quantize without "
            "act-order, or write GPTQ"
        )
    if lost := unfit_float16(weight.scale):
        problems.append(lost)
    return problems
