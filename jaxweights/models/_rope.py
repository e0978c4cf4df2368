"""Rotary position embedding: frequencies, their rescaling for longer contexts, the rotation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.models._checks import Fields

RopeKind = Literal["linear", "llama3", "factors"]

# Which fields each kind reads; any other field set is refused, never ignored.
_FIELDS_OF_KIND = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "factors": ("factors",),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    r"""How the rotary frequencies were changed to reach a longer context.

    Attributes:
      kind: "linear" divides every frequency by `factor`. "llama3" divides only those whose
        wavelength exceeds `original_max_positions / low_freq_factor`, keeps those below
        `original_max_positions / high_freq_factor`, and blends between. "factors" divides
        frequency i by `factors[i]`, as GGUF files store it.
      factor: Extension of the context, at least 1.
      low_freq_factor: Turns within the old context below which a frequency is slowed fully.
      high_freq_factor: Turns within the old context above which a frequency is kept.
      original_max_positions: Context length before the extension.
      factors: One divisor for each of the `head_dim / 2` frequencies.

    Example:
      >>> RopeScaling("linear", factor=4.0).kind
      'linear'
    """

    kind: RopeKind
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_positions: int | None = None
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuses an unknown kind, a missing field and a field that the kind would ignore."""
        fields = Fields("models.RopeScaling", self)
        if fields.one_of("kind", tuple(_FIELDS_OF_KIND)):
            wanted = _FIELDS_OF_KIND[self.kind]
            for field in dataclasses.fields(self)[1:]:
                value = getattr(self, field.name)
                if field.name in wanted and value is None:
                    fields.add(f"{field.name} is missing. kind={self.kind!r} needs {list(wanted)}.")
                elif field.name not in wanted and value is not None:
                    fields.add(
                        f"{field.name}={value!r} has no meaning for kind={self.kind!r}. "
                        "Leave it out."
                    )
        if self.factor is not None:
            fields.number("factor", minimum=1.0)
        if self.original_max_positions is not None:
            fields.integer("original_max_positions", minimum=1)
        if self.low_freq_factor is not None and self.high_freq_factor is not None:
            low = fields.number("low_freq_factor", above=0.0)
            high = fields.number("high_freq_factor", above=0.0)
            if low and high and not self.low_freq_factor < self.high_freq_factor:
                fields.add(
                    f"low_freq_factor={self.low_freq_factor} must lie below "
                    f"high_freq_factor={self.high_freq_factor}."
                )
        if self.factors is not None and not (
            isinstance(self.factors, tuple)
            and all(isinstance(f, float) and math.isfinite(f) and f > 0 for f in self.factors)
        ):
            fields.add(f"factors={self.factors!r} must be a tuple of positive floats.")
        fields.check()


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    r"""Angles per position, one for each pair of features.

    Args:
      head_dim: Features a head, even.
      theta: Base; frequency i is :math:`\theta^{-2i / \mathrm{head\_dim}}`.
      scaling: Change for longer contexts, or None.

    Returns:
      Radians per position, `(head_dim / 2,)`, float32.

    Example:
      >>> rope_frequencies(4, 10000.0)
      array([1.  , 0.01], dtype=float32)

    Source: Su et al. 2021, arXiv:2104.09864, equation 15; linear: Chen et al. 2023,
      arXiv:2306.15595; llama3: the Llama 3.1 release.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        frequencies = frequencies / _DIVISORS[scaling.kind](frequencies, scaling)
    return frequencies.astype(np.float32)


def rotary_angles(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position, each `(batch, time, 1, head_dim / 2)`, float32."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Turns feature pairs (i, i + head_dim / 2) by their angle, in float32.

    Args:
      x: Queries or keys, `(batch, time, heads, head_dim)`.
      cosines: From `rotary_angles`.
      sines: From `rotary_angles`.

    Returns:
      The rotated features in the dtype of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _linear_divisors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    return np.full_like(frequencies, scaling.factor)


def _llama3_divisors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    assert scaling.original_max_positions and scaling.factor
    assert scaling.low_freq_factor and scaling.high_freq_factor
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    # The frequency itself is blended: f * (kept + (1 - kept) / factor).
    return 1.0 / (kept + (1.0 - kept) / scaling.factor)


def _given_divisors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    assert scaling.factors is not None
    if len(scaling.factors) != len(frequencies):
        raise ValueError(
            f"models.rope_frequencies: factors has {len(scaling.factors)} entries, but a head has "
            f"{len(frequencies)} frequencies (head_dim / 2). Give one factor a frequency."
        )
    return np.asarray(scaling.factors, np.float64)


_DIVISORS: dict[str, Callable[[np.ndarray, RopeScaling], np.ndarray]] = {
    "linear": _linear_divisors,
    "llama3": _llama3_divisors,
    "factors": _given_divisors,
}
