"""The one step of all inputs of a matrix, which calibration fixes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._host import on_host
from jaxweights.core._paths import Path
from jaxweights.weights._divide import divide


def fixed_step(low: jax.Array, high: jax.Array, top: float) -> jax.Array:
    """The step `(1, 1)` of all inputs of one matrix.

    Args:
      low: Smallest value that was seen of every input, `(in,)`.
      high: Largest.
      top: What the largest magnitude becomes, in steps.

    Returns:
      The step, float32; 1 where all inputs are zero.
    """
    largest = jnp.max(jnp.maximum(jnp.abs(low), jnp.abs(high)), initial=0.0)
    step = divide(largest.astype(jnp.float32), top)
    return jnp.where(step == 0, jnp.ones_like(step), step).reshape(1, 1)


def describe_bad_step(path: Path, step: jax.Array | None, dynamic: str) -> str | None:
    """What is wrong with a step, if there is one; `dynamic` is the transform that needs none."""
    if step is None or np.isfinite(on_host(step)).all():
        return None
    return (
        f"{path!r}: the largest magnitude of its inputs is not finite: no calibration "
        f"token reached it, or they held infinity. Calibrate on more data, choose {dynamic}, or "
        "leave this weight out with `partition`."
    )
