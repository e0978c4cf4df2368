"""Sums over slices that lose nothing, and what is wrong with a slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.stream._jobs import Operand

_RUN = 1024  # entries of a partial sum; it divides all pieces but the last


def partial_sums(x: jax.Array) -> jax.Array:
    """Sums of every 1024 entries: short ones lose nothing, and products add fastest on a CPU."""
    rows = x.reshape(-1, min(_RUN, x.size))
    return jnp.matmul(rows, jnp.ones(rows.shape[1], x.dtype), precision="highest")


class PartialSums:
    """Sums of a tensor that do not depend on how it is cut, from partial sums of its slices."""

    def __init__(self) -> None:
        """Nothing is summed yet."""
        self._parts: np.ndarray | None = None

    def add(self, start: int, entries: int, parts: np.ndarray) -> None:
        """Takes in a slice's partial sums.

        Args:
          start: First entry of the slice.
          entries: Number of the tensor's entries.
          parts: `(sums, runs)`, of several sums at once; runs beyond the tensor's end are zero.
        """
        if self._parts is None:
            self._parts = np.zeros((len(parts), -(-entries // _RUN)), parts.dtype)
        inside = self._parts[:, start // _RUN :][:, : parts.shape[1]]
        inside[:] = parts[:, : inside.shape[1]]

    def total(self) -> np.ndarray:
        """`(sums,)` float64."""
        assert self._parts is not None
        return self._parts.sum(axis=1, dtype=np.float64)


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
