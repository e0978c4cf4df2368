"""Trees to save, and how saved ones are read back."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.weights import Quantized


def assert_same(got, want) -> None:
    """The same structure, settings included, and the same kinds, dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if not hasattr(other, "dtype"):
            assert type(one) is type(other) and one == other
            continue
        assert isinstance(one, jax.Array) == isinstance(other, jax.Array)
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def quantized(key=0, bits=4, stack=(), **settings):
    codes = np.random.default_rng(key).integers(0, 2**bits, (*stack, 8, 6))
    scale = np.broadcast_to(np.linspace(0.1, 1, 12).reshape(2, 6), (*stack, 2, 6))
    codes, scale = jnp.asarray(codes, jnp.uint8), jnp.asarray(scale, jnp.float32)
    zero = jnp.full_like(scale, 3)
    return Quantized.from_codes(codes, scale, zero, bits=bits, **settings)
