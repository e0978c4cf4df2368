"""confidence_annealing: only weights near a threshold between two levels go on learning."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxweights.core._apply import LayoutLike
from jaxweights.core._paths import Params, flatten, unflatten
from jaxweights.quantize._settings import check_numbers
from jaxweights.quantize.training._thresholds import (
    Quantizer,
    grid_of,
    latent_matrix,
    quantizer_of,
    threshold_distance,
)
from jaxweights.weights._learned_step import LearnedStep

if TYPE_CHECKING:
    import optax

_NAME = "quantize.confidence_annealing"


def confidence_annealing(
    quantizer: Quantizer, *, boundary: float = 0.005, layout: LayoutLike = None
) -> optax.GradientTransformation:
    """Freezes weights that are sure of their level, in the last epochs of training on a grid.

    Weights that lie within `boundary` steps of a threshold between two levels are the ones that
    swing; they go on learning while all others stand still, so that they settle. Begin when the
    training has otherwise ended, since little more is learned. Put it last in an `optax.chain`,
    after weight decay and momentum, and frozen weights do not change by a bit; put it first as
    well, and momentum does not gather what their gradients say meanwhile, as in the authors' code.
    Leaves that the quantizer leaves alone, and learned steps, train as before.

    Args:
      quantizer: The transform that `fake_quant` uses, or a function from parameters to quantized
        ones, such as `settle` for trees of `lsq`.
      boundary: How near a threshold a weight must be to learn, as a share of the distance between
        its two levels; 0.003 to 0.01 have been used. From 0.5 on nothing between the outermost
        levels is frozen.
      layout: As in `apply`, for a transform.

    Returns:
      The optax transformation. Its `update` must be given `params`.

    Raises:
      TypeError: If `quantizer` is neither a transform nor a function.
      ValueError: If `boundary` is negative; at `init`, if nothing is quantized; at an update,
        without `params`.

    Example:
      >>> import optax
      >>> tx = jw.quantize.round_to_nearest(bits=2, grid="narrow")
      >>> annealing = jw.quantize.confidence_annealing(tx, boundary=0.1)
      >>> optimizer = optax.chain(optax.adamw(0.1), annealing)
      >>> params = {"kernel": jnp.array([[1.0], [0.45], [0.2]])}  # levels -1, 0, 1
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
      >>> (updates["kernel"] != 0).ravel().tolist()
      [False, True, False]

    Source: Liu et al. 2023, arXiv:2302.02210, section 4.2, and the authors' code.
    Differs: any grid will do. The thresholds of `binary`, and those of `ternary` with a fitted
      scale, are taken halfway between the nearest weights on either side of them.
    """
    import optax

    check_numbers(_NAME, boundary=boundary)
    if not boundary >= 0:
        raise ValueError(f"{_NAME}: boundary={boundary} must be at least 0.")
    leaves = quantizer_of(_NAME, quantizer, layout)

    def init(params: Params) -> optax.EmptyState:
        if not any(grid_of(leaf) is not None for leaf in jax.eval_shape(leaves, params).values()):
            raise ValueError(
                f"{_NAME}: the quantizer quantizes nothing of {list(flatten(params)[0])[:5]}. Pass "
                "the one that the loss uses."
            )
        return optax.EmptyState()

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        if params is None:
            raise ValueError(
                f"{_NAME}: params is missing: call optimizer.update(grads, state, params)."
            )
        quantized = leaves(params)
        latent = flatten(params)[0]
        flat, structure = flatten(updates)
        for path, leaf in quantized.items():
            grid = grid_of(leaf)
            if grid is None:
                continue
            distance = threshold_distance(latent_matrix(latent[path], grid), grid)
            free = distance <= boundary
            change = flat[path]
            if isinstance(change, LearnedStep):
                kept = jnp.where(free, change.latent, jnp.zeros_like(change.latent))
                flat[path] = dataclasses.replace(change, latent=kept)
            else:
                flat[path] = jnp.where(grid.view.from_matrix(free), change, jnp.zeros_like(change))
        return unflatten(structure, flat), state

    return optax.GradientTransformation(init, update)
