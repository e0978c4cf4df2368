"""scales: the filter that trains the steps of quantized weights and nothing else."""

from __future__ import annotations

from typing import Any

from jaxweights.core._paths import Path
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._weight import Weight


def scales(path: Path, leaf: Any) -> tuple[str, ...]:
    """Names the scales and offsets of a `Quantized` leaf: the filter for `split`.

    Training scales against the float model's outputs, all layers at once with the codes as they
    are, recovers much of what few bits cost, and changes no byte count. Scales in float16 are to be
    trained in float32 and cast back at the end.

    Args:
      path: Path of the leaf; not read.
      leaf: Leaf of a tree.

    Returns:
      Names of fields: `("scale",)` or `("scale", "offset")` for a `Quantized` and none for anything
      else; fields of a `Quantized` inside another representation come with the path to them, such
      as `base/scale`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxweights as jw
      >>> rounded = jw.quantize.round_to_nearest(bits=3)
      >>> params = jw.apply(rounded, {"kernel": jnp.eye(8), "bias": jnp.zeros(8)})
      >>> trainable, frozen = jw.split(params, jw.quantize.scales)
      >>> sorted(trainable)
      ['kernel/scale']

    Source: Kim et al. 2023, arXiv:2305.14152 (PEQA); Chen et al. 2024, arXiv:2407.11062
      (EfficientQAT), section 3.3.
    """
    if isinstance(leaf, Quantized):
        return ("scale",) if leaf.offset is None else ("scale", "offset")
    base = getattr(leaf, "base", None)
    inner = scales(path, base) if isinstance(base, Weight) else ()
    return tuple(f"base/{name}" for name in inner)
