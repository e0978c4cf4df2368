"""oscillation_monitor: which weights swing between two levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core._apply import LayoutLike
from jaxweights.core._paths import Flat, Params, Path
from jaxweights.quantize._settings import check_numbers
from jaxweights.quantize.training._thresholds import (
    Quantizer,
    grid_of,
    levels_of,
    quantizer_of,
)

if TYPE_CHECKING:
    import optax

_NAME = "quantize.oscillation_monitor"


class OscillationState(NamedTuple):
    """State of `oscillation_monitor`: dicts from path to `(*stack, in, out)` arrays, and a count.

    Attributes:
      count: Updates so far, int32 scalar.
      level: Level of every weight, in units of its scale, float32.
      direction: Sign of the last change of level, int8; 0 where there was none yet.
      changes: How often the level changed, int32.
      flips: How often it changed back: against the last change's direction, int32.
      frequency: Moving average of the flips of one step, float32.
    """

    count: jax.Array
    level: dict[Path, jax.Array]
    direction: dict[Path, jax.Array]
    changes: dict[Path, jax.Array]
    flips: dict[Path, jax.Array]
    frequency: dict[Path, jax.Array]

    def oscillating(self, threshold: float = 0.005) -> dict[Path, jax.Array]:
        """The share of each leaf's weights whose frequency exceeds a threshold."""
        return {p: jnp.mean(f > threshold) for p, f in self.frequency.items()}


def oscillation_monitor(
    quantizer: Quantizer, *, momentum: float = 0.01, layout: LayoutLike = None
) -> optax.GradientTransformation:
    """Counts how often weights change their level and change back, and alters nothing.

    Put it last in an `optax.chain`; its state, which `optax.tree_utils.tree_get` finds by the name
    of a field, tells what the weights did. It costs six numbers a weight.

    Args:
      quantizer: As in `confidence_annealing`.
      momentum: Weight of the newest step in the moving average, above 0, up to 1.
      layout: As in `apply`, for a transform.

    Returns:
      The optax transformation. Its `update` must be given `params`.

    Raises:
      TypeError: If `quantizer` is neither a transform nor a function.
      ValueError: If `momentum` is out of range; at `init`, if nothing is quantized; at an update,
        without `params`.

    Example:
      >>> import optax
      >>> tx = jw.quantize.round_to_nearest(bits=2, grid="narrow")
      >>> optimizer = optax.chain(optax.sgd(1.0), jw.quantize.oscillation_monitor(tx))
      >>> params = {"kernel": jnp.array([[1.0], [0.45], [0.2]])}  # levels -1, 0, 1
      >>> state = optimizer.init(params)
      >>> for gradient in (-0.1, 0.1, -0.1):
      ...     grads = {"kernel": jnp.array([[0.0], [gradient], [gradient]])}
      ...     updates, state = optimizer.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> state[1].changes["kernel"].ravel().tolist(), state[1].flips["kernel"].ravel().tolist()
      ([0, 3, 0], [0, 2, 0])

    Source: Nagel et al. 2022, arXiv:2203.11086, equations 4 and 5, which the code of
      arXiv:2302.02210 uses.
    """
    import optax

    check_numbers(_NAME, momentum=momentum)
    if not 0 < momentum <= 1:
        raise ValueError(f"{_NAME}: momentum={momentum} must lie above 0, up to 1.")
    leaves = quantizer_of(_NAME, quantizer, layout)

    def levels(params: Params) -> Flat:
        grids = {path: grid_of(leaf) for path, leaf in leaves(params).items()}
        return {path: levels_of(grid) for path, grid in grids.items() if grid is not None}

    def init(params: Params) -> OscillationState:
        level = levels(params)
        if not level:
            raise ValueError(
                f"{_NAME}: the quantizer quantizes nothing. Pass the one that the loss uses."
            )
        zeros = lambda dtype: {p: jnp.zeros(x.shape, dtype) for p, x in level.items()}  # noqa: E731
        return OscillationState(
            count=jnp.zeros([], jnp.int32),
            level=level,
            direction=zeros(jnp.int8),
            changes=zeros(jnp.int32),
            flips=zeros(jnp.int32),
            frequency=zeros(jnp.float32),
        )

    def update(
        updates: Params, state: Any, params: Params | None = None
    ) -> tuple[Params, OscillationState]:
        if params is None:
            raise ValueError(
                f"{_NAME}: params is missing: call optimizer.update(grads, state, params)."
            )
        level = levels(optax.apply_updates(params, updates))
        new: dict[str, dict[Path, jax.Array]] = {name: {} for name in state._fields[2:]}
        for path, now in level.items():
            turned = jnp.sign(now - state.level[path]).astype(jnp.int8)
            last = state.direction[path]
            changed, flipped = turned != 0, turned * last < 0
            new["direction"][path] = jnp.where(changed, turned, last)
            new["changes"][path] = state.changes[path] + changed.astype(jnp.int32)
            new["flips"][path] = state.flips[path] + flipped.astype(jnp.int32)
            average = state.frequency[path]
            new["frequency"][path] = average + momentum * (flipped.astype(jnp.float32) - average)
        return updates, OscillationState(state.count + 1, level, **new)

    return optax.GradientTransformation(init, update)
