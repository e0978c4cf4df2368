import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.weights import hadamard_matrix, hadamard_order, hadamard_transform
from jaxweights.weights._hadamard import _factors, kronecker_transform
from tests._fixtures import fixture

# Of the orders up to 200 that a Hadamard matrix can have, those that no Paley construction over a
# prime or the square of one gives, nor a power of two times one.
WITHOUT = {92, 116, 156, 172, 184, 188}


def test_every_order_that_paley_and_sylvester_give_is_a_hadamard_matrix():
    built = [n for n in range(1, 201) if hadamard_order(n) == n]
    assert set(built) == {1, 2, *range(4, 201, 4)} - WITHOUT
    for n in built:
        h = hadamard_matrix(n)
        assert set(np.unique(h)) <= {-1, 1}
        np.testing.assert_array_equal(h @ h.T, n * np.eye(n), err_msg=str(n))


@pytest.mark.parametrize("length, order", [(1, 1), (6, 2), (11008, 256), (4096, 4096), (92, 4)])
def test_lengths_without_a_construction_are_mixed_in_blocks(length, order):
    assert hadamard_order(length) == order


@pytest.mark.parametrize("length", [1, 6, 12, 64, 92, 160])
def test_the_fast_transform_is_the_product_with_the_block_diagonal_matrix(length):
    order = hadamard_order(length)
    dense = np.kron(np.eye(length // order), hadamard_matrix(order)) / np.sqrt(order)
    x = np.random.default_rng(0).normal(size=(2, 3, length)).astype(np.float32)
    np.testing.assert_allclose(hadamard_transform(jnp.asarray(x)), x @ dense.T, atol=2e-6)
    back = hadamard_transform(jnp.asarray(x), transposed=True)
    np.testing.assert_allclose(back, x @ dense, atol=2e-6)
    assert np.abs(dense.T @ dense - np.eye(length)).max() < 1e-6


@pytest.mark.parametrize("case", ["n16", "n24", "n40", "n56"])
def test_the_passes_equal_the_authors(case):
    arrays = fixture("quantize/hadamard.npz")
    core = [arrays[f"{case}/hadK"]] if f"{case}/hadK" in arrays else []
    order = arrays[f"{case}/x"].shape[-1]
    power = order // (len(core[0]) if core else 1)
    factors = [*core, *(_factors(power) if power > 1 else [])]
    with jax.enable_x64(True):
        x = jnp.asarray(arrays[f"{case}/x"])
        for name, parts in (("xH", factors), ("xHt", [f.T for f in factors])):
            np.testing.assert_allclose(
                kronecker_transform(x, parts), arrays[f"{case}/{name}"], atol=1e-10
            )
        # Random signs on the inputs, then the transform: the authors' randomized matrix.
        random = arrays[f"{case}/random_hadamard"]
        signs = jnp.asarray(
            np.sign(random[:, 0] * np.asarray(kronecker_transform(jnp.eye(order), factors))[:, 0])
        )
        mine = kronecker_transform(jnp.diag(signs), factors)
        np.testing.assert_allclose(mine, random, atol=1e-10)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    x = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    y = hadamard_transform(x)
    assert y.dtype == jnp.bfloat16
    wide = hadamard_transform(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(*(np.asarray(v, np.float32) for v in (y, wide)))


def test_orders_without_a_construction_are_refused():
    with pytest.raises(ValueError, match=r"order=92 is neither .* Use blocks of order 4"):
        hadamard_matrix(92)
    with pytest.raises(ValueError, match=r"order=5 for an axis of length 12.*; 12 does"):
        hadamard_transform(jnp.ones(12), order=5)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        hadamard_order(0)
