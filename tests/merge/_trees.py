"""Small models that the merging tests share, so that they compile once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

ULP = 2.0**-23  # of float32 numbers near 1


def tree(seed: int, scale: float = 1.0, dtype=jnp.float32) -> dict:
    """A model with a matrix, a bias and a counter."""
    draw = np.random.default_rng(seed).normal
    return {
        "dense": {
            "bias": jnp.asarray(scale * draw(size=5), dtype),
            "kernel": jnp.asarray(scale * draw(size=(7, 5)), dtype),
        },
        "step": jnp.asarray(seed, jnp.int32),
    }


def finetuned(base: dict, seed: int, scale: float = 1e-2) -> dict:
    """The base with a small change of its own."""
    return jax.tree.map(
        lambda x, d: x + d if jnp.issubdtype(x.dtype, jnp.floating) else x,
        base,
        tree(seed, scale),
    )


def copy(model: dict) -> dict:
    """Equal arrays that are not the same objects."""
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), model)


def floats(model: dict) -> list[np.ndarray]:
    """The floating leaves."""
    leaves = [np.asarray(x, np.float32) for x in (model["dense"]["bias"], model["dense"]["kernel"])]
    return leaves


def assert_close(got: dict, want: dict, ulps: float = 2.0, largest: float = 1.0) -> None:
    """Equal to some steps of float32 at the size of the numbers involved, which reach 2 to 4."""
    for ours, theirs in zip(floats(got), floats(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=ulps * ULP * 2 * largest)


def assert_same_bits(got: dict, want: dict) -> None:
    """Equal in every bit."""
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
