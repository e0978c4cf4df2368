"""What a sequence of batches is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def refuse_one_batch(asker: str, batches: Any) -> None:
    """Refuses a single batch in place of several: its rows, or its keys, would be taken for them.

    Args:
      asker: Start of the error message.
      batches: What was given.

    Raises:
      TypeError: If it is an array, or a mapping.

    Example:
      >>> refuse_one_batch("calibrate", np.ones((4, 8)))
      Traceback (most recent call last):
        ...
      TypeError: calibrate: batches is an array (4, 8), each row of which would be taken for a ...
    """
    if isinstance(batches, jax.Array | np.ndarray):
        raise TypeError(
            f"{asker}: batches is an array {tuple(batches.shape)}, each row of which would be "
            "taken for a batch. Pass [array], or list(array) where every row is one."
        )
    if isinstance(batches, Mapping):
        raise TypeError(
            f"{asker}: batches is a mapping with the keys {list(batches)[:5]}, each of which would "
            "be taken for a batch. Pass [batch]."
        )
