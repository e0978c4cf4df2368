"""Where the range of a grid ends: the setting, and the root mean squares of groups."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxweights.quantize._extremes import largest_magnitude
from jaxweights.quantize._ordered_sum import ordered_sum
from jaxweights.quantize._settings import check_numbers, is_word
from jaxweights.weights._divide import divide

Search = Literal["absmax", "mse"] | tuple[Literal["rms"], float] | float


def check_search(asker: str, search: Any, *, grid: str, pad: Any) -> Search:
    """Refuses what is no end of a range, or none for this grid.

    Args:
      asker: What errors call the caller.
      search: As in `Grid`.
      grid: Kind of the grid.
      pad: As in `Grid`.

    Returns:
      The search, its number a float of Python: grids are static under `jit`.

    Raises:
      TypeError: If it is of the wrong kind.
      ValueError: If it is unknown, out of range, or means nothing to the grid.
    """
    if isinstance(search, tuple) and search and is_word(search[0], ["rms"]):
        return _check_rms(asker, search, grid, pad)
    if isinstance(search, str):
        if search not in ("absmax", "mse"):
            raise ValueError(
                f"{asker}: search={search!r} is unknown. Choose 'absmax', 'mse', a percentile "
                "such as 99.9, or a multiple of the root mean square such as ('rms', 2.5)."
            )
        return search  # type: ignore[return-value]
    check_numbers(asker, search=search)
    percentile: Any = search
    if not 50 < percentile <= 100:
        raise ValueError(f"{asker}: search={search} must be a percentile above 50, up to 100.")
    return float(percentile)


def _check_rms(asker: str, search: tuple[Any, ...], grid: str, pad: Any) -> Search:
    if len(search) != 2:
        raise ValueError(
            f"{asker}: search={search} must be ('rms', multiple), such as ('rms', 2.5)."
        )
    check_numbers(asker, search=search[1])
    multiple = float(search[1])
    if not 0 < multiple < float("inf"):
        raise ValueError(f"{asker}: search={search}: the multiple must be positive and finite.")
    if grid == "affine":
        raise ValueError(
            f"{asker}: search={search} ends a range as far below 0 as above, which grid='affine' "
            "does not have. Choose a symmetric grid, such as 'half', or another search."
        )
    if pad is not None:
        raise ValueError(
            f"{asker}: search={search} is a mean, to which the zeros of pad={pad!r} do not belong. "
            "Leave one of them out."
        )
    return "rms", multiple


def rms_end(groups: jax.Array, multiple: float) -> jax.Array:
    """A multiple of the root mean square of each group, with the sign of its largest entry.

    Args:
      groups: `(rows, group, out)`, float32, at least one entry each.
      multiple: Positive.

    Returns:
      `(rows, 1, out)`, float32; NaN where a group holds a value that is not finite.

    Example:
      >>> rms_end(jnp.array([3.0, -4.0, 0.0, 0.0]).reshape(1, 4, 1), 2.0).tolist()
      [[[-5.0]]]
    """
    largest = largest_magnitude(groups)
    # In units of the largest entry no square overflows or vanishes.
    units = divide(groups, jnp.where(largest == 0, jnp.ones_like(largest), largest))
    mean = divide(jax.vmap(ordered_sum)(units * units), groups.shape[1])
    return largest * jnp.sqrt(mean) * jnp.float32(multiple)
