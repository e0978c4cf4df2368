"""The tensors of GPTQ checkpoints, as AutoGPTQ, GPTQModel, transformers and vLLM read them."""

from __future__ import annotations

import numpy as np

from jaxweights.checkpoint._write_safetensors import LazyTensor
from jaxweights.checkpoint.exchange._module import (
    FLOAT,
    INT32,
    Parts,
    check_parts,
    float16_scale,
    host_weight,
    largest_group,
    lazy,
    per_output,
    read_groups,
    unfit_float16,
    unsigned_codes,
    written_group_index,
)
from jaxweights.checkpoint.exchange._words import pack_words, unpack_words
from jaxweights.weights._quantized import Quantized

BITS = (2, 3, 4, 8)


def unpack_gptq(parts: Parts, *, bits: int, version: int = 1, symmetric: bool = False) -> Quantized:
    """Reads one module of a GPTQ checkpoint.

    Args:
      parts: `qweight` int32 `(in * bits / 32, out)`, `qzeros` int32 `(groups, out * bits / 32)`,
        `scales` `(groups, out)`, and perhaps `g_idx` int32 `(in,)`.
      bits: Bits per code: 2, 3, 4 or 8.
      version: 1 where the file stores zero points less one (modulo `2**bits`), else 2.
      symmetric: Whether zero points may be left out where all of them are `2**(bits - 1)`.

    Returns:
      A weight of shape `(out, in)`, as torch has it. Groups that are consecutive need no index,
      also where the last is shorter.

    Raises:
      ValueError: If a part is missing, of another dtype or shape, or has an index out of range.

    Source: AutoGPTQ's `qlinear_cuda.QuantLinear.pack`.
    """
    qweight = parts.get("qweight")
    words, out_dim = qweight.shape if qweight and len(qweight.shape) == 2 else (0, 0)
    in_dim = words * 32 // bits
    groups = parts["scales"].shape[0] if "scales" in parts and parts["scales"].shape else 0
    expected = {
        "qweight": (INT32, (in_dim * bits // 32, out_dim)),
        "qzeros": (INT32, (groups, -(-out_dim * bits // 32))),
        "scales": (FLOAT, (groups, out_dim)),
    }
    if "g_idx" in parts:
        expected["g_idx"] = ((*INT32, np.dtype(np.int64)), (in_dim,))
    check_parts(parts, expected)
    if not in_dim or not groups or groups > in_dim:
        raise ValueError(f"has {in_dim} inputs in {groups} groups. The file is damaged")
    codes = unpack_words(parts["qweight"].read(), bits=bits, count=in_dim, axis=0)
    zero = unpack_words(parts["qzeros"].read(), bits=bits, count=out_dim, axis=1)
    if version == 1:
        zero = (zero + np.uint8(1)) & np.uint8(2**bits - 1)
    index = parts["g_idx"].read() if "g_idx" in parts else None
    index, full_group = read_groups(index, in_dim, groups, name="g_idx")
    scale = parts["scales"].read()
    middle = 2 ** (bits - 1)
    if symmetric and np.all(zero == middle):
        codes, zero = (codes.astype(np.int16) - middle).astype(np.int8), None
    return host_weight(
        codes,
        scale,
        bits=bits,
        dtype=scale.dtype,
        zero_point=zero,
        group_index=index,
        full_group=full_group,
    )


def pack_gptq(weight: Quantized, *, version: int = 1) -> dict[str, LazyTensor]:
    """The tensors of one module of a GPTQ checkpoint: the inverse of `unpack_gptq`.

    Args:
      weight: One matrix, for which `unfit_gptq` has nothing to say.
      version: 1 to store zero points less one, 2 to store them as they are.

    Returns:
      `qweight`, `qzeros`, `scales` in float16 and `g_idx`, made when they are written.

    Example:
      >>> import jax.numpy as jnp
      >>> weight = Quantized.from_codes(jnp.full((32, 32), 3), jnp.ones((1, 32)), bits=4)
      >>> parts = pack_gptq(weight)
      >>> parts["qweight"].shape, hex(int(parts["qweight"]()[0, 0]) & 0xFFFFFFFF)
      ((4, 32), '0xbbbbbbbb')
    """
    bits, in_dim, out_dim = weight.bits, weight.in_dim, weight.out_dim
    groups = weight.scale.shape[-2]

    def qzeros() -> np.ndarray:
        zero = written_zero_point(weight)
        stored = zero - np.uint8(1) if version == 1 else zero
        return pack_words(stored & np.uint8(2**bits - 1), bits=bits, axis=1)

    return {
        "qweight": lazy(
            (in_dim * bits // 32, out_dim),
            np.int32,
            lambda: pack_words(unsigned_codes(weight), bits=bits, axis=0),
        ),
        "qzeros": lazy((groups, out_dim * bits // 32), np.int32, qzeros),
        "scales": lazy(
            (groups, out_dim), np.float16, lambda: float16_scale(per_output(weight.scale, weight))
        ),
        "g_idx": lazy((in_dim,), np.int32, lambda: written_group_index(weight)),
    }


def written_zero_point(weight: Quantized) -> np.ndarray:
    """Zero points as GPTQ and AWQ files hold them, also where codes are signed."""
    if weight.zero_point is None:
        shape = (weight.scale.shape[-2], weight.out_dim)
        return np.full(shape, 2 ** (weight.bits - 1), np.uint8)
    return per_output(weight.zero_point, weight).astype(np.uint8)


def unfit_gptq(weight: Quantized, *, version: int = 1) -> list[str]:
    """Why a weight cannot be written as GPTQ, if it cannot."""
    problems = unfit_groups(weight)
    if weight.bits not in BITS:
        problems.append(
            f"has {weight.bits} bits, but GPTQ has 2, 3, 4 or 8. Quantize to one of these, or "
            "write compressed-tensors, which has 2 to 8"
        )
    for name, length in (("inputs", weight.in_dim), ("outputs", weight.out_dim)):
        if length % 32:
            problems.append(
                f"has {length} {name}, which 32 does not divide, as the packing needs. Leave it "
                "out with `partition`, or write compressed-tensors"
            )
    if version == 1 and weight.zero_point is not None and np.any(np.asarray(weight.zero_point) < 1):
        problems.append(
            "has zero points of 0, which version 1 cannot hold: it stores them less one. Write "
            "version 2 (checkpoint_format 'gptq_v2')"
        )
    if lost := unfit_float16(weight.scale):
        problems.append(lost)
    return problems


def unfit_groups(weight: Quantized) -> list[str]:
    """Why the groups or the zero points of a weight fit none of the integer formats."""
    problems = []
    if weight.offset is not None:
        problems.append(
            "has offsets, which are no integer zero points. Quantize with an integer zero point, "
            "or write GGUF, whose Q4_1 and Q5_1 have offsets"
        )
    if 1 < weight.scale.shape[-1] < weight.out_dim:
        problems.append(
            f"has groups that span {weight.out_dim // weight.scale.shape[-1]} outputs of an input "
            "channel. Group along the inputs instead (group_size)"
        )
    elif weight.scale.shape[-2] == weight.in_dim > 1:
        problems.append("has a scale for every input. Group along the inputs (group_size >= 32)")
    zero = weight.zero_point
    if zero is not None and np.max(np.asarray(zero), initial=0) >= 2**weight.bits:
        problems.append(
            f"has zero points up to {int(np.max(np.asarray(zero)))}, but {weight.bits} bits hold "
            f"0 to {2**weight.bits - 1}"
        )
    return problems


def group_setting(weight: Quantized) -> int:
    """`group_size` as configs state it: -1 where one scale serves all of an output's inputs."""
    return -1 if weight.scale.shape[-2] == 1 else largest_group(weight)
