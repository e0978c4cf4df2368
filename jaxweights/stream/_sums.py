"""Sums over slices that lose nothing, and what is wrong with a slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.stream._jobs import Operand


def partial_sums(x: jax.Array) -> jax.Array:
    """Sums of every 1024 entries: short ones lose nothing, and products add fastest on a CPU."""
    rows = x.reshape(-1, min(1024, x.size))
    return jnp.matmul(rows, jnp.ones(rows.shape[1], x.dtype), precision="highest")


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
