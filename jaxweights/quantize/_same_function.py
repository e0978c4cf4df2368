"""check_same_function: proof, on data, that a change of the weights left the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core._paths import Params
from jaxweights.lift import lift
from jaxweights.quantize._settings import check_numbers

_NAME = "quantize.check_same_function"


def check_same_function(
    fn: Callable[..., Any],
    before: Params,
    after: Params,
    inputs: Sequence[Any],
    *,
    tolerance: float = 1e-5,
) -> float:
    """Refuses a tree that makes a model compute something else.

    Folding, smoothing, rotating and padding change weights and leave the function as it is, up to
    rounding. Check it before you quantize: afterwards a wrong fold looks like a poor quantizer.

    Args:
      fn: The model, called as `fn(params, *inputs)`.
      before: Parameters.
      after: Parameters, changed; both may hold represented weights.
      inputs: Arguments behind the parameters.
      tolerance: Largest difference of any output, as a fraction of the largest magnitude in its
        array. float32 models keep 1e-5, bfloat16 models about 0.03.

    Returns:
      The largest such fraction.

    Raises:
      ValueError: If it is above the tolerance, or outputs differ in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> model = lambda params, x: (x * params["gain"]) @ params["kernel"]
      >>> before = {"gain": jnp.array([4.0, 1.0]), "kernel": jnp.ones((2, 2))}
      >>> after = {"gain": jnp.ones(2), "kernel": jnp.array([[4.0, 4.0], [1.0, 1.0]])}
      >>> check_same_function(model, before, after, [jnp.ones((3, 2))])
      0.0
    """
    check_numbers(_NAME, tolerance=tolerance)
    run = jax.jit(lift(lambda params: [x for x in jax.tree.leaves(fn(params, *inputs))]))
    worst = 0.0
    for i, (old, new) in enumerate(zip(run(before), run(after), strict=True)):
        if old.shape != new.shape:
            raise ValueError(f"{_NAME}: output {i}: has shape {new.shape}, but had {old.shape}.")
        old, new = (np.asarray(x.astype(jnp.float32), np.float64) for x in (old, new))
        if not old.size:
            continue
        size = np.abs(old).max()
        difference = np.abs(new - old).max()
        fraction = float(difference / size) if size else float(difference)
        if not fraction <= tolerance:  # NaN is refused too
            at = tuple(int(n) for n in np.unravel_index(np.abs(new - old).argmax(), old.shape))
            raise ValueError(
                f"{_NAME}: output {i}: differs by {fraction:.2g} of its largest magnitude, at "
                f"{at}: {new[at]:.6g} is not {old[at]:.6g}. At most tolerance={tolerance:g} was "
                "expected: a fold misses a reader, or names the wrong writer."
            )
        worst = max(worst, fraction)
    return worst
